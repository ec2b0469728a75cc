"""RWKV-7 recurrence in Triton: chunked, parallel in time, S [key, value].

    S_t = (diag(w_t) + b_t z_t^T) S_{t-1} + k_t v_t^T,      y_t = r_t S_t,      z = -kappa,  b = a kappa

(Peng et al. 2025, "RWKV-7 Goose", section 4; the WY form of :mod:`rwkv_rev.wkv.chunked_wkv7`.) With Z_t = e^{c_{t-1}}
z_t, R_t = e^{c_t} r_t, B_t = e^{-c_t} b_t, K_t = e^{-c_t} k_t, and b', k' the two decayed to the chunk's end instead,
c = the sum of log w in the chunk, everything that does not depend on the state is made for all chunks at once:

    A = (I - tril(Z B^T, -1))^{-1},      W = A Z,      X = A tril(Z K^T, -1),
    P = diag(e^{c_n}) + b'^T W,          U = (k' + X^T b')^T v,
    Q = R + tril(R B^T) W,               y_0 = (tril(R K^T) + tril(R B^T) X) v;

1. one launch makes P, U, Q, A and y_0 of every chunk;
2. a scan over chunks, S <- P S + U, keeps the state before each; values are independent of each other in it, so that
   it has B H N / 16 programs, each a chain of one small product a chunk;
3. one makes y = y_0 + Q S.

Backwards: Q^T dy, the same scan reversed with P^T, then one launch for all gradients of a chunk from the states before
and the gradients after it: with u = A (Z S + tril(Z K^T, -1) v), what is removed, and f = A^T (b' dS + tril(R B^T)^T
dy), every gradient is a product of two of r, v, u, f, dy, S, dS.

A is found by forward substitution in blocks of 16 tokens and by merging neighbours; powers of Z B^T would lose all
digits where one key comes again and again. e^{-c} stays below e^{0.607 n}, 7e16 for 64 tokens. diag(e^{c_n}) is kept
apart and multiplied in float32: masked tokens change no bit of the state, and a = 1, w = 1 is nothing special.

Estimate for an H100, bfloat16, (B, T, H, N) = (8, 4096, 32, 64), 16384 chunks of 64: forwards 18 products of 64^3,
seven of them in three parts, and 3.6 GB; backwards 33 and 4.0 GB; that is 0.6 Tflop and 3 ms of memory traffic. A walk
over chunks of 16 with the state in registers would move half of that, but for T = 32768 it has 2048 dependent steps of
five products each in only H N / 16 = 128 programs; P makes it 512 steps of one product. Kept for the backward pass: P,
Q, A and S, 12 bytes for each number of r.

All sums are float32. bfloat16 inputs: A, W, P and the scan in bfloat16 parts of their factors (relative error 2^-17),
all else with factors rounded to bfloat16 (errors of 3e-3, of the order of what rounding the results to that dtype
takes); float16 in such parts throughout, float32 in three parts of each factor (2^-24). No atomic operation: results
are the same to the bit. One configuration per head size, nothing is tuned at run time. float64 is refused. Over 400
lines, because both directions share every helper and the scan.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.first_order import first_order
from rwkv_rev.wkv.dispatch import KernelError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of what states pass through, and of all else
PRECISIONS = {
    torch.float32: ("bf16x6", "bf16x6"),
    torch.float16: ("bf16x3", "bf16x3"),
    torch.bfloat16: ("bf16x3", "bf16"),
}
MERGES = 2
CHUNK = 16 << MERGES  # fewer tokens, and products are too small for the tensor cores' best instructions
VALUE_TILE, KEY_TILE = 64, 32
PREPARE_WARPS, READ_WARPS, GRADIENT_WARPS = 4, 4, 4
SCAN_TILE, SCAN_WARPS, SCAN_STAGES = 16, 1, 3
MAX_HEAD_SIZE = 128
_BLOCK = tl.constexpr(16)  # tokens within which the triangular system is solved row by row
_LARGEST_EXPONENT = tl.constexpr(80.0)  # no model reaches it; beyond 88 a factor would be infinite


@triton.jit
def _thirds(x):
    """Three bfloat16 whose sum is x in float32."""
    high = x.to(tl.bfloat16)
    rest = x.to(tl.float32) - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b. In "bf16x3" a float32 operand is the sum of two bfloat16, in "bf16x6" of three; the lowest products
    are left out."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "bf16x3":
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        if a.dtype != tl.bfloat16:
            total = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, total)
        if b.dtype != tl.bfloat16:
            total = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), total)
        total = tl.dot(a_high, b_high, total)
    elif PRECISION == "bf16x6":
        a_high, a_middle, a_low = _thirds(a)
        b_high, b_middle, b_low = _thirds(b)
        total = tl.dot(a_low, b_high, tl.dot(a_high, b_low, tl.dot(a_middle, b_middle, total)))
        total = tl.dot(a_high, b_high, tl.dot(a_middle, b_high, tl.dot(a_high, b_middle, total)))
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _factor(x, PRECISION: tl.constexpr):
    """As products will take it: what is rounded once needs half the registers until then."""
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _place(mask, T, H, chunks, TILES: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """Of the launch's flat index (heads are neighbours in memory): head, value tile, number among all chunks,
    tokens' places in [B * T], which of them exist, and which are valid."""
    program = tl.program_id(0)
    head = program % H
    program = program // H
    tile = program % TILES
    program = program // TILES
    chunk = program % chunks
    row = (program // chunks).to(tl.int64)
    t = chunk * C + tl.arange(0, C)
    token = row * T + t
    exists = t < T
    valid = exists
    if MASKED:
        valid = exists & (tl.load(mask + token, mask=exists, other=0) != 0)
    return head, tile, (row * chunks + chunk) * H + head, token, exists, valid


@triton.jit
def _load(x, token, valid, head, channel, H, N: tl.constexpr):
    """Rows of [B * T, H, N]; rows that are not valid and channels beyond N are zero."""
    at = x + (token[:, None] * H + head) * N + channel[None, :]
    return tl.load(at, mask=valid[:, None] & (channel[None, :] < N), other=0.0)


@triton.jit
def _store(x, value, token, exists, head, channel, H, N: tl.constexpr):
    at = x + (token[:, None] * H + head) * N + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=exists[:, None] & (channel[None, :] < N))


@triton.jit
def _matrix(x, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers into the matrix number ``slot`` and the mask of what exists there."""
    at = x + slot * ROWS * COLUMNS + i[:, None] * COLUMNS + c[None, :]
    return at, (i[:, None] < ROWS) & (c[None, :] < COLUMNS)


@triton.jit
def _keys(removal, rate, k, token, valid, head, channel, H, N: tl.constexpr):
    """kappa, a, k in float32."""
    kappa = _load(removal, token, valid, head, channel, H, N).to(tl.float32)
    share = _load(rate, token, valid, head, channel, H, N).to(tl.float32)
    key = _load(k, token, valid, head, channel, H, N).to(tl.float32)
    return kappa, share, key


@triton.jit
def _sums(kept, x):
    """Sums over the rows of x that ``kept`` names, as products: a scan over rows costs more. Exact but for float32."""
    kept = tl.where(kept, 1.0, 0.0).to(tl.bfloat16)
    total = tl.zeros(x.shape, tl.float32)
    if x.dtype == tl.bfloat16:
        total = _dot(kept, x, total, "bf16")
    else:
        high, middle, low = _thirds(x)
        total = _dot(kept, low, total, "bf16")
        total = _dot(kept, middle, total, "bf16")
        total = _dot(kept, high, total, "bf16")
    return total


@triton.jit
def _decays(log_decay, token, valid, head, channel, H, N: tl.constexpr, C: tl.constexpr):
    """c_{t-1} and c_t; of tokens that are not valid w = 1."""
    t = tl.arange(0, C)
    step = _load(log_decay, token, valid, head, channel, H, N)
    until = _sums(t[:, None] >= t[None, :], step)
    return until - step.to(tl.float32), until


@triton.jit
def _grown(until):
    """e^{-c_t}."""
    return tl.exp(tl.minimum(-until, _LARGEST_EXPONENT))


@triton.jit
def _pairs(a, b, C: tl.constexpr, ITSELF: tl.constexpr, PRECISION: tl.constexpr):
    """tril(a b^T), with the diagonal or without."""
    t = tl.arange(0, C)
    product = _dot(a, tl.trans(b), tl.zeros([C, C], tl.float32), PRECISION)
    kept = t[:, None] > t[None, :]
    if ITSELF:
        kept = t[:, None] >= t[None, :]
    return tl.where(kept, product, 0.0)


@triton.jit
def _inverse(a, C: tl.constexpr, MERGES: tl.constexpr, PRECISION: tl.constexpr):
    """(I - a)^{-1} of a strictly lower triangular [C, C], C = 16 << MERGES."""
    BLOCKS: tl.constexpr = C // _BLOCK
    t = tl.arange(0, C)
    i = tl.arange(0, _BLOCK)
    same = (t[:, None] // _BLOCK) == (t[None, :] // _BLOCK)
    blocks = tl.sum(tl.reshape(tl.where(same, a, 0.0), [C, BLOCKS, _BLOCK]), 1)
    blocks = tl.reshape(blocks, [BLOCKS, _BLOCK, _BLOCK])
    unit = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    solved = tl.broadcast_to(unit[None, :, :], [BLOCKS, _BLOCK, _BLOCK])
    for step in range(_BLOCK - 1):  # row ``step`` is final: take it into those below
        column = tl.sum(tl.where(i[None, None, :] == step, blocks, 0.0), 2)
        row = tl.sum(tl.where(i[None, :, None] == step, solved, 0.0), 1)
        solved += column[:, :, None] * row[:, None, :]
    spread = tl.broadcast_to(tl.reshape(solved, [C, 1, _BLOCK]), [C, BLOCKS, _BLOCK])
    inverse = tl.where(same, tl.reshape(spread, [C, C]), 0.0)
    nothing = tl.zeros([C, C], tl.float32)
    for merge in tl.static_range(MERGES):
        block = t // (_BLOCK << merge)
        neighbours = ((block[:, None] ^ block[None, :]) == 1) & (block[:, None] > block[None, :])
        between = tl.where(neighbours, a, 0.0)
        inverse += _dot(inverse, _dot(between, inverse, nothing, PRECISION), nothing, PRECISION)
    return inverse


@triton.jit
def _between_tokens(
    r, k, v, log_decay, removal, rate, ends, inverses, out, head, slot, token, exists, valid, H,
    N: tl.constexpr, C: tl.constexpr, MERGES: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    TILES: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """A, X, tril(R B^T) and b'; stores c_n, A and y_0."""
    t = tl.arange(0, C)
    i = tl.arange(0, BN)
    before, until = _decays(log_decay, token, valid, head, i, H, N, C)
    end = tl.sum(tl.where(t[:, None] == C - 1, until, 0.0), 0)
    tl.store(ends + slot * N + i, end, mask=i < N)
    kappa, share, key = _keys(removal, rate, k, token, valid, head, i, H, N)
    receptance = _load(r, token, valid, head, i, H, N).to(tl.float32) * tl.exp(until)
    receptance = _factor(receptance, LOW)
    z = -kappa * tl.exp(before)
    key *= _grown(until)
    b = kappa * share * _grown(until)
    inverse = _inverse(_pairs(z, b, C, False, HIGH), C, MERGES, HIGH)
    among = _pairs(z, key, C, False, LOW)
    removed = _factor(_pairs(receptance, b, C, True, LOW), LOW)
    of_values = _factor(_dot(inverse, among, tl.zeros([C, C], tl.float32), LOW), LOW)
    scores = _pairs(receptance, key, C, True, LOW)
    scores = _factor(_dot(removed, of_values, scores, LOW), LOW)
    at, inside = _matrix(inverses, slot, t, t, C, C)
    tl.store(at, inverse.to(inverses.dtype.element_ty), mask=inside)
    for tile in tl.static_range(TILES):
        c = tile * BV + tl.arange(0, BV)
        value = _load(v, token, valid, head, c, H, N)
        _store(out, _dot(scores, value, tl.zeros([C, BV], tl.float32), LOW), token, exists, head, c, H, N)
    return inverse, of_values, removed, b * tl.exp(end)[None, :]


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _prepare_kernel(
    r, k, v, log_decay, removal, rate, mask, moves, rests, ends, readers, inverses, products, out, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, MERGES: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    TILES: tl.constexpr, BK: tl.constexpr, KEY_TILES: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Of each chunk what does not depend on the state: P without its diagonal (``moves``, with ``rests`` what its
    rounding left), c_n (``ends``), Q (``readers``), A (``inverses``), U^T (``products``) and y_0 (``out``)."""
    head, _tile, slot, token, exists, valid = _place(mask, T, H, chunks, 1, C, MASKED)
    t = tl.arange(0, C)
    every = tl.arange(0, BN)
    inverse, of_values, removed, last_b = _between_tokens(
        r, k, v, log_decay, removal, rate, ends, inverses, out, head, slot, token, exists, valid, H,
        N, C, MERGES, BN, BV, TILES, HIGH, LOW,
    )  # fmt: skip
    for key_tile in range(KEY_TILES):  # all at once needs more registers than there are
        i = key_tile * BK + tl.arange(0, BK)
        wide = tl.zeros([C, BK], tl.float32)
        before, until = _decays(log_decay, token, valid, head, i, H, N, C)
        kappa, share, key = _keys(removal, rate, k, token, valid, head, i, H, N)
        of_state = _dot(inverse, -kappa * tl.exp(before), wide, HIGH)
        move = _dot(tl.trans(last_b), of_state, tl.zeros([BN, BK], tl.float32), HIGH)
        at, inside = _matrix(moves, slot, every, i, N, N)
        rounded = move.to(moves.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        if SPLIT:
            at, inside = _matrix(rests, slot, every, i, N, N)
            tl.store(at, (move - rounded.to(tl.float32)).to(rests.dtype.element_ty), mask=inside)
        reader = _load(r, token, valid, head, i, H, N).to(tl.float32) * tl.exp(until)
        reader = _dot(removed, of_state, reader, LOW)
        at, inside = _matrix(readers, slot, t, i, C, N)
        tl.store(at, reader.to(readers.dtype.element_ty), mask=inside)
        end = tl.sum(tl.where(t[:, None] == C - 1, until, 0.0), 0)
        left = tl.exp(end)[None, :] * _grown(until)
        writer = _factor(_dot(tl.trans(of_values), kappa * share * left, key * left, LOW), LOW)
        for tile in tl.static_range(TILES):
            c = tile * BV + tl.arange(0, BV)
            value = _load(v, token, valid, head, c, H, N)
            product = _dot(tl.trans(value), writer, tl.zeros([BV, BK], tl.float32), LOW)
            at, inside = _matrix(products, slot, c, i, N, N)
            tl.store(at, product, mask=inside)


@triton.jit(do_not_specialize=["H", "chunks"])
def _scan_kernel(
    moves, rests, ends, products, outside, total_out, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From ``outside`` S <- P S + U over the chunks, or with P^T from the last to the first; ``products``, U^T, are
    replaced by the S^T that each chunk begins with (ends with, if reversed)."""
    program = tl.program_id(0)
    c = (program % TILES) * BV + tl.arange(0, BV)
    i = tl.arange(0, BN)
    slot = (program // TILES).to(tl.int64)
    row, head = slot // H, slot % H
    border = slot * N * N + i[None, :] * N + c[:, None]
    inside = (i[None, :] < N) & (c[:, None] < N)
    state = tl.load(outside + border, mask=inside, other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSE else step
        here = (row * chunks + chunk) * H + head
        at, present = _matrix(products, here, c, i, N, N)
        product = tl.load(at, mask=present, other=0.0)
        tl.store(at, state, mask=present)
        end = tl.load(ends + here * N + i, mask=i < N, other=0.0)
        product += tl.exp(end)[None, :] * state
        at, present = _matrix(moves, here, i, i, N, N)
        move = tl.load(at, mask=present, other=0.0)
        if not REVERSE:
            move = tl.trans(move)
        if SPLIT:
            at, present = _matrix(rests, here, i, i, N, N)
            rest = tl.load(at, mask=present, other=0.0)
            if not REVERSE:
                rest = tl.trans(rest)
            product = tl.dot(state.to(tl.bfloat16), rest, product)
        state = _dot(state, move, product, HIGH)
    tl.store(total_out + border, state, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _read_kernel(
    readers, states, mask, out, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """out += Q S."""
    head, tile, slot, token, exists, _valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    at, inside = _matrix(readers, slot, tl.arange(0, C), i, C, N)
    reader = tl.load(at, mask=inside, other=0.0)
    at, inside = _matrix(states, slot, c, i, N, N)
    state = tl.load(at, mask=inside, other=0.0)
    own = _load(out, token, exists, head, c, H, N)
    _store(out, _dot(reader, tl.trans(state), own, LOW), token, exists, head, c, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _pull_kernel(
    readers, d_out, mask, products, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """products = d_y^T Q."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    at, inside = _matrix(readers, slot, tl.arange(0, C), i, C, N)
    reader = tl.load(at, mask=inside, other=0.0)
    d_y = _load(d_out, token, valid, head, c, H, N)
    product = _dot(tl.trans(d_y), reader, tl.zeros([BV, BN], tl.float32), LOW)
    at, inside = _matrix(products, slot, c, i, N, N)
    tl.store(at, product, mask=inside)


@triton.jit
def _between_values(
    r, k, v, log_decay, removal, rate, inverses, ends, states, d_states, d_out, d_v, head, slot, token, exists, valid,
    c, H, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Stores d_v; u, f, v and d_y of the value channels c, as factors."""
    t = tl.arange(0, C)
    i = tl.arange(0, BN)
    nothing = tl.zeros([C, BV], tl.float32)
    at, inside = _matrix(states, slot, c, i, N, N)
    state = tl.load(at, mask=inside, other=0.0)
    at, inside = _matrix(d_states, slot, c, i, N, N)
    d_state = tl.load(at, mask=inside, other=0.0)
    state = _factor(state, LOW)
    d_state = _factor(d_state, LOW)
    value = _load(v, token, valid, head, c, H, N)
    d_y = _factor(_load(d_out, token, valid, head, c, H, N), LOW)
    at, inside = _matrix(inverses, slot, t, t, C, C)
    inverse = tl.load(at, mask=inside, other=0.0)

    before, until = _decays(log_decay, token, valid, head, i, H, N, C)
    end = tl.load(ends + slot * N + i, mask=i < N, other=0.0)
    kappa, share, key = _keys(removal, rate, k, token, valid, head, i, H, N)
    grown = _grown(until)
    left = tl.exp(end)[None, :] * grown
    receptance = _load(r, token, valid, head, i, H, N).to(tl.float32) * tl.exp(until)
    key_grown = _factor(key * grown, LOW)
    read_key = _factor(_pairs(receptance, key_grown, C, True, LOW), LOW)
    d_value = _dot(tl.trans(read_key), d_y, nothing, LOW)
    d_value = _dot(key * left, tl.trans(d_state), d_value, LOW)
    read_b = _factor(_pairs(receptance, kappa * share * grown, C, True, LOW), LOW)
    f = _dot(tl.trans(read_b), d_y, nothing, LOW)
    f = _factor(_dot(kappa * share * left, tl.trans(d_state), f, LOW), LOW)
    f = _factor(_dot(tl.trans(inverse), f, nothing, LOW), LOW)
    z = _factor(-kappa * tl.exp(before), LOW)
    among = _factor(_pairs(z, key_grown, C, False, LOW), LOW)  # what a token finds of those before it
    d_value = _dot(tl.trans(among), f, d_value, LOW)
    _store(d_v, d_value, token, exists, head, c, H, N)
    u = _factor(_dot(z, tl.trans(state), _dot(among, value, nothing, LOW), LOW), LOW)
    u = _factor(_dot(inverse, u, nothing, LOW), LOW)

    return u, f, value, d_y


@triton.jit(do_not_specialize=["T", "H", "chunks", "stride"])
def _gradient_kernel(
    r, k, v, log_decay, removal, rate, mask, inverses, ends, states, d_states, d_out,
    d_r, d_k, d_v, d_log_decay, d_removal, d_rate, T, H, chunks, stride,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    BK: tl.constexpr, KEY_TILES: tl.constexpr, MASKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's tokens, given the state before it and the gradient of the state after it: of one tile
    of values all, of the others the part that passes through these values, ``stride`` elements from tile to tile."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BV + tl.arange(0, BV)
    u, f, value, d_y = _between_values(
        r, k, v, log_decay, removal, rate, inverses, ends, states, d_states, d_out, d_v, head, slot, token, exists,
        valid, c, H, N, C, BN, BV, LOW,
    )  # fmt: skip
    earlier = t[:, None] > t[None, :]
    not_later = t[:, None] >= t[None, :]
    square = tl.zeros([C, C], tl.float32)
    d_read_b = _factor(tl.where(not_later, _dot(d_y, tl.trans(u), square, LOW), 0.0), LOW)
    d_read_key = _factor(tl.where(not_later, _dot(d_y, tl.trans(value), square, LOW), 0.0), LOW)
    d_found_b = _factor(tl.where(earlier, _dot(f, tl.trans(u), square, LOW), 0.0), LOW)
    d_found_key = _factor(tl.where(earlier, _dot(f, tl.trans(value), square, LOW), 0.0), LOW)
    part = tile.to(tl.int64) * stride
    for key_tile in range(KEY_TILES):  # all at once needs more registers than there are
        i = key_tile * BK + tl.arange(0, BK)
        nothing = tl.zeros([C, BK], tl.float32)
        before, until = _decays(log_decay, token, valid, head, i, H, N, C)
        kappa, share, key = _keys(removal, rate, k, token, valid, head, i, H, N)
        grown = _grown(until)
        # as the products take them: what pairs of tokens give c_t and c_s then cancels but for float32's rounding
        key_grown = _factor(key * grown, LOW)
        b = _factor(kappa * share * grown, LOW)
        at, inside = _matrix(states, slot, c, i, N, N)
        state = tl.load(at, mask=inside, other=0.0)
        at, inside = _matrix(d_states, slot, c, i, N, N)
        d_state = tl.load(at, mask=inside, other=0.0)
        end = tl.exp(tl.load(ends + slot * N + i, mask=i < N, other=0.0))
        carried = end * tl.sum(state * d_state, 0)

        decayed = tl.exp(until)
        receptance = _factor(_load(r, token, valid, head, i, H, N).to(tl.float32) * decayed, LOW)
        d_receptance = _dot(d_y, state, nothing, LOW)
        d_receptance = _dot(d_read_b, b, _dot(d_read_key, key_grown, d_receptance, LOW), LOW)
        _store(d_r + part, d_receptance * decayed, token, exists, head, i, H, N)
        d_until = receptance.to(tl.float32) * d_receptance
        before = tl.exp(before)
        z = _factor(-kappa * before, LOW)
        d_z = _dot(f, state, nothing, LOW)
        d_z = _dot(d_found_b, b, _dot(d_found_key, key_grown, d_z, LOW), LOW)
        found = z.to(tl.float32) * d_z
        d_z *= before

        d_key = _dot(tl.trans(d_read_key), receptance, nothing, LOW)
        d_key = _dot(tl.trans(d_found_key), z, d_key, LOW)
        d_last = _dot(value, d_state, nothing, LOW) * end[None, :]
        d_until -= key_grown.to(tl.float32) * d_key
        d_after = key_grown.to(tl.float32) * d_last
        _store(d_k + part, grown * (d_key + d_last), token, exists, head, i, H, N)
        d_b = _dot(tl.trans(d_read_b), receptance, nothing, LOW)
        d_b = _dot(tl.trans(d_found_b), z, d_b, LOW)
        d_last = _dot(u, d_state, nothing, LOW) * end[None, :]
        d_until -= b.to(tl.float32) * d_b
        d_after += b.to(tl.float32) * d_last
        d_b = grown * (d_b + d_last)
        _store(d_rate + part, d_b * kappa, token, exists, head, i, H, N)
        _store(d_removal + part, d_b * share - d_z, token, exists, head, i, H, N)
        # log w_t stands in c_s of s >= t, in c_{s-1} of s > t, in c_n - c_s of s < t
        d_step = _sums(t[:, None] <= t[None, :], d_until)
        d_step += _sums(t[:, None] < t[None, :], found)
        d_step += _sums(earlier, d_after) + carried[None, :]
        d_step = tl.where(valid[:, None], d_step, 0.0)
        _store(d_log_decay + part, d_step, token, exists, head, i, H, N)


class _Prepared(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    moves: Tensor  # [B, J, H, N, N], P without its diagonal e^{c_n}
    rests: Tensor | None  # what its rounding left
    ends: Tensor  # [B, J, H, N], c_n
    readers: Tensor  # [B, J, H, C, N], Q
    inverses: Tensor  # [B, J, H, C, C], A
    states: Tensor  # [B, J, H, N, N], S^T before each chunk


class _Launcher:
    """Shapes, block sizes and launches shared by the two directions. One configuration per head size."""

    def __init__(self, like: Tensor, mask: Tensor | None) -> None:
        self.B, self.T, self.H, self.N = like.shape
        self.like = like
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.high, self.low = PRECISIONS[like.dtype]
        self.block = max(16, triton.next_power_of_2(self.N))
        self.chunks = triton.cdiv(self.T, CHUNK)
        self.split = self.high == "bf16x3"
        self.sizes = (self.T, self.H, self.chunks)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def matrices(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(self.B, self.chunks, self.H, rows, columns, dtype=dtype)

    def tiles(self, size: int) -> dict[str, int]:
        """Width and number of the tiles that the values of a head are cut into."""
        size = min(size, self.block)
        return {"BV": size, "TILES": triton.cdiv(self.N, size)}

    def over_tokens(self) -> dict[str, Any]:
        return {"N": self.N, "C": CHUNK, "BN": self.block, "MASKED": self.mask is not None,
                "LOW": self.low, "num_stages": 1, **self.tiles(VALUE_TILE)}  # fmt: skip

    def over_keys(self) -> dict[str, int]:
        size = min(KEY_TILE, self.block)
        return {"BK": size, "KEY_TILES": triton.cdiv(self.N, size)}

    def warps(self, number: int) -> int:
        return 8 if self.block > 64 else number

    def prepare(self, r: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[_Prepared, Tensor]:
        """``states`` are U^T yet, and the outputs are y_0."""
        exact = torch.bfloat16 if self.split else torch.float32
        rounded = torch.bfloat16 if self.low == "bf16" else torch.float32
        moves = self.matrices(self.N, self.N, exact)
        prepared = _Prepared(
            moves,
            torch.empty_like(moves) if self.split else None,
            self.empty(self.B, self.chunks, self.H, self.N),
            self.matrices(CHUNK, self.N, rounded),
            self.matrices(CHUNK, CHUNK, rounded),
            self.matrices(self.N, self.N),
        )
        out = self.empty(*k.shape)
        _prepare_kernel[(self.B * self.chunks * self.H,)](
            r, k, v, *others, self.mask, *prepared, out, *self.sizes, MERGES=MERGES, SPLIT=self.split,
            HIGH=self.high, num_warps=self.warps(PREPARE_WARPS), **self.over_keys(), **self.over_tokens(),
        )  # fmt: skip
        return prepared, out

    def scan(self, prepared: _Prepared, products: Tensor, outside: Tensor, *, reverse: bool) -> Tensor:
        """What comes out at the other end; ``products`` become the states on the way."""
        total = torch.empty_like(outside)
        tiles = self.tiles(SCAN_TILE)
        _scan_kernel[(self.B * self.H * tiles["TILES"],)](
            prepared.moves, prepared.rests, prepared.ends, products, outside, total, self.H, self.chunks,
            N=self.N, BN=self.block, REVERSE=reverse, SPLIT=self.split, HIGH=self.high, STAGES=SCAN_STAGES,
            num_warps=SCAN_WARPS if self.split and self.block <= 64 else 4, **tiles,
        )  # fmt: skip
        return total

    def read(self, prepared: _Prepared, out: Tensor) -> None:
        fixed = self.over_tokens()
        _read_kernel[(self.B * self.chunks * self.H * fixed["TILES"],)](
            prepared.readers, prepared.states, self.mask, out, *self.sizes,
            num_warps=self.warps(READ_WARPS), **fixed,
        )  # fmt: skip

    def pull(self, prepared: _Prepared, d_out: Tensor) -> Tensor:
        products = self.matrices(self.N, self.N)
        fixed = self.over_tokens()
        _pull_kernel[(self.B * self.chunks * self.H * fixed["TILES"],)](
            prepared.readers, d_out, self.mask, products, *self.sizes,
            num_warps=self.warps(READ_WARPS), **fixed,
        )  # fmt: skip
        return products

    def gradients(
        self, tokens: list[Tensor], prepared: _Prepared, d_states: Tensor, d_out: Tensor
    ) -> list[Tensor]:
        """Of r, k, v, log_decay, removal and rate, in their dtypes."""
        fixed = self.over_tokens()
        tiles = fixed["TILES"]
        found = [torch.empty_like(x) for x in tokens]
        parts = found
        if tiles > 1:  # d_v, in the middle, has a tile of its own for each
            parts = [x if n == 2 else self.empty(tiles, *x.shape) for n, x in enumerate(found)]
        _gradient_kernel[(self.B * self.chunks * self.H * tiles,)](
            *tokens, self.mask, prepared.inverses, prepared.ends, prepared.states, d_states, d_out, *parts,
            *self.sizes, self.like.numel(), num_warps=self.warps(GRADIENT_WARPS), **self.over_keys(), **fixed,
        )  # fmt: skip
        if tiles > 1:
            found = [
                x if n == 2 else part.sum(0).to(x.dtype)
                for n, (x, part) in enumerate(zip(found, parts, strict=True))
            ]
        return found


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        removal: Tensor,
        rate: Tensor,
        state: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(k):
            launch = _Launcher(k, mask)
            prepared, out = launch.prepare(r, k, v, log_decay, removal, rate)
            after = launch.scan(prepared, prepared.states, state, reverse=False)
            launch.read(prepared, out)
        ctx.save_for_backward(r, k, v, log_decay, removal, rate, mask, *prepared)
        return out, after

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        *tokens, mask = ctx.saved_tensors[:7]
        prepared = _Prepared(*ctx.saved_tensors[7:])
        d_out, d_after = d_out.contiguous(), d_after.contiguous()
        with torch.cuda.device_of(d_out):
            launch = _Launcher(tokens[1], mask)
            d_states = launch.pull(prepared, d_out)
            d_state = launch.scan(prepared, d_states, d_after, reverse=True)
            found = launch.gradients(tokens, prepared, d_states, d_out)
        return *found, d_state, None


def wkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, N] and the state after the chunk [B, H, N, N] (key index first), both float32.

    Arguments as in :func:`rwkv_rev.wkv.wkv7`; those of tokens in bfloat16, float16 or float32, N at most 128.

    Raises:
        KernelError: another dtype or a larger head.
    """
    size = k.shape[-1]
    if size > MAX_HEAD_SIZE:
        raise KernelError(
            f'the triton kernel takes head sizes up to {MAX_HEAD_SIZE}, not {size}; use kernel="chunked"'
        )
    tokens = [x.contiguous() for x in (r, k, v, log_decay, removal, rate)]
    for x in tokens:
        if x.dtype not in DTYPES:
            raise KernelError(
                f'the triton kernel takes bfloat16, float16 and float32, not {x.dtype}; use kernel="chunked"'
            )
    valid = None if mask is None else mask.contiguous()
    return _WKV7.apply(*tokens, state.float().contiguous(), valid)
