"""RWKV-7 recurrence in Triton: chunked, parallel in time, S [key, value].

    S_t = (diag(w_t) + b_t z_t^T) S_{t-1} + k_t v_t^T,      y_t = r_t S_t,      z = -kappa,  b = a kappa

(Peng et al. 2025, "RWKV-7 Goose", section 4; the WY form of :mod:`rwkv_rev.wkv.chunked_wkv7`.) With Z_t = e^{c_{t-1}}
z_t, R_t = e^{c_t} r_t, B_t = e^{-c_t} b_t, K_t = e^{-c_t} k_t, and b', k' the two decayed to the chunk's end instead,
c = the sum of log w in the chunk, everything that does not depend on the state is made for all chunks at once:

    A = (I - tril(Z B^T, -1))^{-1},      W = A Z,      X = A tril(Z K^T, -1),
    P = diag(e^{c_n}) + b'^T W,          U = (k' + X^T b')^T v,
    Q = R + tril(R B^T) W,               y_0 = (tril(R K^T) + tril(R B^T) X) v;

1. four launches make R, K; Z, B, A; W, P; U, Q and what stands before v in y_0, of every chunk;
2. a scan over chunks, S <- P S + U, keeps the state before each; values are independent of each other in it, so that
   it has B H N / 16 programs, each a chain of one small product a chunk;
3. one makes y = y_0 + Q S.

Backwards: Q^T dy, the same scan reversed with P^T, then three launches for the gradients of a chunk from the states
before and the gradients after it: with u = A (Z S + tril(Z K^T, -1) v), what is removed, and f = A^T (b' dS +
tril(R B^T)^T dy), every gradient is a product of two of r, v, u, f, dy, S, dS. They are that many because one that
holds all of it spills registers, and memory is the cheaper: a factor written and read again takes 0.1 ms of the below.

A is found by forward substitution in blocks of 16 tokens and by merging neighbours; powers of Z B^T would lose all
digits where one key comes again and again. e^{-c} stays below e^{0.607 n}, 7e16 for 64 tokens. diag(e^{c_n}) is kept
apart and multiplied in float32: masked tokens change no bit of the state, and a = 1, w = 1 is nothing special.

Estimate for an H100, bfloat16, (B, T, H, N) = (8, 4096, 32, 64), 16384 chunks of 64: 0.134 GB for each bfloat16
factor, 5.9 GB forwards and 8.2 GB backwards, 4.7 ms of memory traffic; 0.7 Tflop in products, 1 ms. A walk over chunks
of 16 with the state in registers would move half of that, but for T = 32768 it has 2048 dependent steps of five
products each in only H N / 16 = 128 programs; P makes it 512 steps of one product. Kept for the backward pass: R, Z, B,
K, P, Q, A and S, 20 bytes for each number of r.

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
# of channels, padded in smaller heads. Triton 3.6 compiles products with sides of 16 or 32 wrongly for Hopper.
TILE, WARPS = 64, 4
# of a thread at most, for factors that are rounded once: 168 let three programs share a multiprocessor, 128 four
SOLVE_REGISTERS: int | None = 168
TRANSITION_REGISTERS: int | None = 168
PREPARE_REGISTERS: int | None = 128
VALUE_REGISTERS: int | None = 168
READER_REGISTERS: int | None = 168
WRITER_REGISTERS: int | None = None
FUSED = False  # the gradients of readers and writers in one launch
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
def _at(x, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x + slot * ROWS * COLUMNS + (i[:, None] * COLUMNS + c[None, :])


@triton.jit
def _inside(i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (i[:, None] < ROWS) & (c[None, :] < COLUMNS)


@triton.jit
def _get(x, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows i and columns c of the matrix number ``slot``; zero where there are none."""
    at = _at(x, slot, i, c, ROWS, COLUMNS)
    if ROWS % 64 == 0 and COLUMNS % 64 == 0:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=_inside(i, c, ROWS, COLUMNS), other=0.0)
    return value


@triton.jit
def _put(x, value, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = _at(x, slot, i, c, ROWS, COLUMNS)
    value = value.to(x.dtype.element_ty)
    if ROWS % 64 == 0 and COLUMNS % 64 == 0:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=_inside(i, c, ROWS, COLUMNS))


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
def _decay(log_decay, token, valid, head, channel, H, N: tl.constexpr, C: tl.constexpr, ITSELF: tl.constexpr):
    """c_t, or c_{t-1}; of tokens that are not valid w = 1."""
    t = tl.arange(0, C)
    kept = t[:, None] > t[None, :]
    if ITSELF:
        kept = t[:, None] >= t[None, :]
    return _sums(kept, _load(log_decay, token, valid, head, channel, H, N))


@triton.jit
def _grown(until):
    """e^{-c_t}."""
    return tl.exp(tl.minimum(-until, _LARGEST_EXPONENT))


@triton.jit
def _pairs(
    a, b, slot, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr
):
    """A B^T of two factors."""
    t = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        total = _dot(_get(a, slot, t, i, C, N), tl.trans(_get(b, slot, t, i, C, N)), total, LOW)
    return total


@triton.jit
def _lower(x, C: tl.constexpr, ITSELF: tl.constexpr, LOW: tl.constexpr):
    """What a token (row) has of those before it, and of itself or not, as a factor."""
    t = tl.arange(0, C)
    kept = t[:, None] > t[None, :]
    if ITSELF:
        kept = t[:, None] >= t[None, :]
    return _factor(tl.where(kept, x, 0.0), LOW)


@triton.jit
def _upper(x, C: tl.constexpr, ITSELF: tl.constexpr, LOW: tl.constexpr):
    """The same transposed: what a token (row) gives to those after it."""
    t = tl.arange(0, C)
    kept = t[:, None] < t[None, :]
    if ITSELF:
        kept = t[:, None] <= t[None, :]
    return _factor(tl.where(kept, x, 0.0), LOW)


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


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _scale_kernel(
    r, k, log_decay, mask, read, keys, ends, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """R (``read``), K (``keys``) and c_n (``ends``) of one tile of key channels."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    receptance = _load(r, token, valid, head, i, H, N).to(tl.float32) * tl.exp(until)
    _put(read, _factor(receptance, LOW), slot, t, i, C, N)
    key = _load(k, token, valid, head, i, H, N).to(tl.float32) * _grown(until)
    _put(keys, _factor(key, LOW), slot, t, i, C, N)
    end = tl.sum(tl.where(t[:, None] == C - 1, until, 0.0), 0)
    tl.store(ends + slot * N + i, end, mask=i < N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _solve_kernel(
    log_decay, removal, rate, mask, found, given, inverses, finer, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, MERGES: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Of each chunk Z (``found``), B (``given``) and A (``inverses``, with ``finer`` what its rounding left)."""
    head, _tile, slot, token, _exists, valid = _place(mask, T, H, chunks, 1, C, MASKED)
    t = tl.arange(0, C)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        kappa = _load(removal, token, valid, head, i, H, N).to(tl.float32)
        b = kappa * _load(rate, token, valid, head, i, H, N).to(tl.float32)
        b *= _grown(_decay(log_decay, token, valid, head, i, H, N, C, True))
        _put(given, _factor(b, LOW), slot, t, i, C, N)
        z = -kappa * tl.exp(_decay(log_decay, token, valid, head, i, H, N, C, False))
        _put(found, _factor(z, LOW), slot, t, i, C, N)
        pairs = _dot(z, tl.trans(b), pairs, HIGH)
    inverse = _inverse(tl.where(t[:, None] > t[None, :], pairs, 0.0), C, MERGES, HIGH)
    rounded = _factor(inverse, LOW)
    _put(inverses, rounded, slot, t, t, C, C)
    if LOW == "bf16":
        _put(finer, inverse - rounded.to(tl.float32), slot, t, t, C, C)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _transition_kernel(
    log_decay, removal, rate, mask, ends, inverses, finer, corrected, moves, rests, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr,
    MASKED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Of one tile of key channels W (``corrected``) and P without its diagonal (``moves``, with ``rests`` what its
    rounding left)."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    inverse = _get(inverses, slot, t, t, C, C)
    if LOW == "bf16":
        inverse = inverse.to(tl.float32) + _get(finer, slot, t, t, C, C).to(tl.float32)
    z = -_load(removal, token, valid, head, i, H, N).to(tl.float32)
    z *= tl.exp(_decay(log_decay, token, valid, head, i, H, N, C, False))
    of_state = _dot(inverse, z, tl.zeros([C, BN], tl.float32), HIGH)
    _put(corrected, _factor(of_state, LOW), slot, t, i, C, N)
    for other in range(TILES):
        j = other * BN + tl.arange(0, BN)
        left = _grown(_decay(log_decay, token, valid, head, j, H, N, C, True))
        left *= tl.exp(tl.load(ends + slot * N + j, mask=j < N, other=0.0))[None, :]
        left *= _load(removal, token, valid, head, j, H, N).to(tl.float32)
        left *= _load(rate, token, valid, head, j, H, N).to(tl.float32)
        move = _dot(tl.trans(left), of_state, tl.zeros([BN, BN], tl.float32), HIGH)
        rounded = move.to(moves.dtype.element_ty)
        _put(moves, rounded, slot, j, i, N, N)
        if SPLIT:
            _put(rests, move - rounded.to(tl.float32), slot, j, i, N, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _prepare_kernel(
    v, mask, read, found, given, keys, ends, inverses, corrected, readers, scores, products, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """Q (``readers``), what stands before v in y_0 (``scores``) and U^T (``products``)."""
    head, _tile, slot, token, _exists, valid = _place(mask, T, H, chunks, 1, C, MASKED)
    t = tl.arange(0, C)
    among = _lower(_pairs(found, keys, slot, C, N, BN, TILES, LOW), C, False, LOW)
    square = tl.zeros([C, C], tl.float32)
    of_values = _factor(_dot(_get(inverses, slot, t, t, C, C), among, square, LOW), LOW)
    removed = _lower(_pairs(read, given, slot, C, N, BN, TILES, LOW), C, True, LOW)
    score = _pairs(read, keys, slot, C, N, BN, TILES, LOW)
    score = tl.where(t[:, None] >= t[None, :], score, 0.0)
    _put(scores, _factor(_dot(removed, of_values, score, LOW), LOW), slot, t, t, C, C)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        reader = _get(read, slot, t, i, C, N).to(tl.float32)
        reader = _dot(removed, _get(corrected, slot, t, i, C, N), reader, LOW)
        _put(readers, _factor(reader, LOW), slot, t, i, C, N)
        writer = _get(keys, slot, t, i, C, N).to(tl.float32)
        writer = _dot(tl.trans(of_values), _get(given, slot, t, i, C, N), writer, LOW)
        end = tl.load(ends + slot * N + i, mask=i < N, other=0.0)
        writer = _factor(writer * tl.exp(end)[None, :], LOW)
        for value_tile in range(TILES):
            c = value_tile * BN + tl.arange(0, BN)
            value = _load(v, token, valid, head, c, H, N)
            product = _dot(tl.trans(value), writer, tl.zeros([BN, BN], tl.float32), LOW)
            _put(products, product, slot, c, i, N, N)


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
        product = _get(products, here, c, i, N, N)
        _put(products, state, here, c, i, N, N)
        end = tl.load(ends + here * N + i, mask=i < N, other=0.0)
        product += tl.exp(end)[None, :] * state
        move = _get(moves, here, i, i, N, N)
        if not REVERSE:
            move = tl.trans(move)
        if SPLIT:
            rest = _get(rests, here, i, i, N, N)
            if not REVERSE:
                rest = tl.trans(rest)
            product = tl.dot(state.to(tl.bfloat16), rest, product)
        state = _dot(state, move, product, HIGH)
    tl.store(total_out + border, state, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _read_kernel(
    v, mask, readers, scores, states, out, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """y = y_0 + Q S."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BN + tl.arange(0, BN)
    total = tl.zeros([C, BN], tl.float32)
    total = _dot(_get(scores, slot, t, t, C, C), _load(v, token, valid, head, c, H, N), total, LOW)
    for key_tile in range(TILES):
        i = key_tile * BN + tl.arange(0, BN)
        state = _get(states, slot, c, i, N, N)
        total = _dot(_get(readers, slot, t, i, C, N), tl.trans(state), total, LOW)
    _store(out, total, token, exists, head, c, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _pull_kernel(
    readers, d_out, mask, arrived, products, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """products = d_y^T Q, and d_y as a factor."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BN + tl.arange(0, BN)
    d_y = _factor(_load(d_out, token, valid, head, c, H, N), LOW)
    _put(arrived, d_y, slot, t, c, C, N)
    for key_tile in range(TILES):
        i = key_tile * BN + tl.arange(0, BN)
        reader = _get(readers, slot, t, i, C, N)
        product = _dot(tl.trans(d_y), reader, tl.zeros([BN, BN], tl.float32), LOW)
        _put(products, product, slot, c, i, N, N)


@triton.jit
def _through(
    x, states, total, slot, c, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """total + X S of a factor, for the value channels c."""
    t = tl.arange(0, C)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        state = _factor(_get(states, slot, c, i, N, N), LOW)
        total = _dot(_get(x, slot, t, i, C, N), tl.trans(state), total, LOW)
    return total


@triton.jit
def _through_end(
    x, d_states, ends, total, slot, c, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """total + X diag(e^{c_n}) dS."""
    t = tl.arange(0, C)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        end = tl.exp(tl.load(ends + slot * N + i, mask=i < N, other=0.0))
        state = _factor(_get(d_states, slot, c, i, N, N) * end[None, :], LOW)
        total = _dot(_get(x, slot, t, i, C, N), tl.trans(state), total, LOW)
    return total


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _value_gradient_kernel(
    v, mask, read, found, given, keys, ends, inverses, states, d_states, arrived, removed, fed, parts, d_v,
    T, H, chunks, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """u (``removed``), f (``fed``), d_v and the sum of S dS (``parts``; with e^{c_n}, what c_n receives through the
    diagonal of P) of one tile of value channels. Everything is read again where it is needed: what is held in
    registers meanwhile costs more."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BN + tl.arange(0, BN)
    nothing = tl.zeros([C, BN], tl.float32)
    pairs = _upper(_pairs(given, read, slot, C, N, BN, TILES, LOW), C, True, LOW)
    f = _dot(pairs, _get(arrived, slot, t, c, C, N), nothing, LOW)
    f = _factor(_through_end(given, d_states, ends, f, slot, c, C, N, BN, TILES, LOW), LOW)
    f = _factor(_dot(tl.trans(_get(inverses, slot, t, t, C, C)), f, nothing, LOW), LOW)
    _put(fed, f, slot, t, c, C, N)
    pairs = _upper(_pairs(keys, found, slot, C, N, BN, TILES, LOW), C, False, LOW)
    d_value = _dot(pairs, f, nothing, LOW)
    pairs = _upper(_pairs(keys, read, slot, C, N, BN, TILES, LOW), C, True, LOW)
    d_value = _dot(pairs, _get(arrived, slot, t, c, C, N), d_value, LOW)
    d_value = _through_end(keys, d_states, ends, d_value, slot, c, C, N, BN, TILES, LOW)
    _store(d_v, d_value, token, exists, head, c, H, N)
    pairs = _lower(_pairs(found, keys, slot, C, N, BN, TILES, LOW), C, False, LOW)
    u = _dot(pairs, _load(v, token, valid, head, c, H, N), nothing, LOW)
    u = _factor(_through(found, states, u, slot, c, C, N, BN, TILES, LOW), LOW)
    u = _dot(_get(inverses, slot, t, t, C, C), u, nothing, LOW)
    _put(removed, _factor(u, LOW), slot, t, c, C, N)
    for key_tile in range(TILES):
        i = key_tile * BN + tl.arange(0, BN)
        part = tl.zeros([BN], tl.float32)
        for quarter in range(4):
            few = tile * BN + quarter * (BN // 4) + tl.arange(0, BN // 4)
            part += tl.sum(_get(states, slot, few, i, N, N) * _get(d_states, slot, few, i, N, N), 0)
        tl.store(parts + (slot * TILES + tile) * N + i, part, mask=i < N)


@triton.jit
def _of_readers(
    x, v, removed, states, given, keys, slot, token, valid, head, i, H, ITSELF: tl.constexpr, C: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """x S^T + tril(x u^T) B + tril(x v^T) K: the gradient of R from x = d_y, of Z from x = f (without diagonals)."""
    t = tl.arange(0, C)
    total = tl.zeros([C, BN], tl.float32)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        pairs = _dot(_get(x, slot, t, c, C, N), tl.trans(_get(removed, slot, t, c, C, N)), pairs, LOW)
    total = _dot(_lower(pairs, C, ITSELF, LOW), _get(given, slot, t, i, C, N), total, LOW)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        value = _load(v, token, valid, head, c, H, N)
        pairs = _dot(_get(x, slot, t, c, C, N), tl.trans(value), pairs, LOW)
    total = _dot(_lower(pairs, C, ITSELF, LOW), _get(keys, slot, t, i, C, N), total, LOW)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        total = _dot(_get(x, slot, t, c, C, N), _factor(_get(states, slot, c, i, N, N), LOW), total, LOW)
    return total


@triton.jit
def _leaving(x, slot, token, valid, head, t, c, H, MATRIX: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """v from among the tokens, or u, a matrix."""
    return _get(x, slot, t, c, C, N) if MATRIX else _load(x, token, valid, head, c, H, N)


@triton.jit
def _after(
    x, d_states, slot, token, valid, head, i, H, MATRIX: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """x dS^T: with diag(e^{c_n}), what K (x = v) or B (x = u) receives from after the chunk."""
    t = tl.arange(0, C)
    total = tl.zeros([C, BN], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        leaving = _leaving(x, slot, token, valid, head, t, c, H, MATRIX, C, N)
        total = _dot(leaving, _factor(_get(d_states, slot, c, i, N, N), LOW), total, LOW)
    return total


@triton.jit
def _of_writers(
    x, arrived, fed, read, found, total, slot, token, valid, head, i, H, MATRIX: tl.constexpr, C: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """total + triu(x d_y^T) R + triu(x f^T, 1) Z: what K or B receives within the chunk."""
    t = tl.arange(0, C)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        leaving = _leaving(x, slot, token, valid, head, t, c, H, MATRIX, C, N)
        pairs = _dot(leaving, tl.trans(_get(arrived, slot, t, c, C, N)), pairs, LOW)
    total = _dot(_upper(pairs, C, True, LOW), _get(read, slot, t, i, C, N), total, LOW)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        leaving = _leaving(x, slot, token, valid, head, t, c, H, MATRIX, C, N)
        pairs = _dot(leaving, tl.trans(_get(fed, slot, t, c, C, N)), pairs, LOW)
    return _dot(_upper(pairs, C, False, LOW), _get(found, slot, t, i, C, N), total, LOW)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _reader_gradient_kernel(
    v, log_decay, mask, read, found, given, keys, states, arrived, removed, fed, d_r, d_found, steps, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """d_r, the part of the removal's gradient that passes through Z (``d_found``) and that of log_decay's that passes
    through R and Z (``steps``), of one tile of key channels."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    gradient = _of_readers(
        arrived, v, removed, states, given, keys, slot, token, valid, head, i, H, True, C, N, BN, TILES, LOW
    )
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    _store(d_r, gradient * tl.exp(until), token, exists, head, i, H, N)
    step = _get(read, slot, t, i, C, N).to(tl.float32) * gradient
    gradient = _of_readers(
        fed, v, removed, states, given, keys, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW
    )
    before = _decay(log_decay, token, valid, head, i, H, N, C, False)
    _put(d_found, _factor(gradient * tl.exp(before), LOW), slot, t, i, C, N)
    own = _get(found, slot, t, i, C, N).to(tl.float32) * gradient
    step = _sums(t[:, None] <= t[None, :], step + own) - own
    _put(steps, step, slot, t, i, C, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _writer_gradient_kernel(
    v, log_decay, removal, rate, mask, read, found, given, keys, ends, d_states, arrived, removed, fed, parts,
    d_found, steps, d_k, d_log_decay, d_removal, d_rate, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """The other gradients.

    log w_t stands in c_s of s >= t (factors of R, -K, -B), in c_{s-1} of s > t (of Z) and in c_n - c_s of s < t (of
    what K and B leave after the chunk). The last two are the first's sum less what is not in theirs. All take factors
    as products do, so that what pairs of tokens give cancels but for float32's rounding."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    end = tl.exp(tl.load(ends + slot * N + i, mask=i < N, other=0.0))
    carried = tl.zeros([BN], tl.float32)
    for value_tile in range(TILES):
        carried += tl.load(parts + (slot * TILES + value_tile) * N + i, mask=i < N, other=0.0)
    carried *= end
    gradient = _after(v, d_states, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW) * end[None, :]
    carried += tl.sum(_get(keys, slot, t, i, C, N).to(tl.float32) * gradient, 0)
    gradient = _of_writers(
        v, arrived, fed, read, found, gradient, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW
    )
    step = _get(keys, slot, t, i, C, N).to(tl.float32) * gradient
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    _store(d_k, gradient * _grown(until), token, exists, head, i, H, N)

    gradient = (
        _after(removed, d_states, slot, token, valid, head, i, H, True, C, N, BN, TILES, LOW) * end[None, :]
    )
    carried += tl.sum(_get(given, slot, t, i, C, N).to(tl.float32) * gradient, 0)
    gradient = _of_writers(
        removed,
        arrived,
        fed,
        read,
        found,
        gradient,
        slot,
        token,
        valid,
        head,
        i,
        H,
        True,
        C,
        N,
        BN,
        TILES,
        LOW,
    )
    step += _get(given, slot, t, i, C, N).to(tl.float32) * gradient
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    gradient *= _grown(until)
    kappa = _load(removal, token, valid, head, i, H, N).to(tl.float32)
    _store(d_rate, gradient * kappa, token, exists, head, i, H, N)
    gradient *= _load(rate, token, valid, head, i, H, N).to(tl.float32)
    gradient -= _get(d_found, slot, t, i, C, N).to(tl.float32)
    _store(d_removal, gradient, token, exists, head, i, H, N)

    step = _get(steps, slot, t, i, C, N) - _sums(t[:, None] <= t[None, :], step)
    step = tl.where(valid[:, None], step + carried[None, :], 0.0)
    _store(d_log_decay, step, token, exists, head, i, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _key_gradient_kernel(
    v, log_decay, removal, rate, mask, read, found, given, keys, ends, states, d_states, arrived, removed, fed, parts,
    d_r, d_k, d_log_decay, d_removal, d_rate, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """The two above in one."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    end = tl.exp(tl.load(ends + slot * N + i, mask=i < N, other=0.0))
    carried = tl.zeros([BN], tl.float32)
    for value_tile in range(TILES):
        carried += tl.load(parts + (slot * TILES + value_tile) * N + i, mask=i < N, other=0.0)
    carried *= end

    gradient = _after(v, d_states, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW) * end[None, :]
    carried += tl.sum(_get(keys, slot, t, i, C, N).to(tl.float32) * gradient, 0)
    gradient = _of_writers(
        v, arrived, fed, read, found, gradient, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW
    )
    step = -_get(keys, slot, t, i, C, N).to(tl.float32) * gradient
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    _store(d_k, gradient * _grown(until), token, exists, head, i, H, N)

    gradient = _of_readers(
        arrived, v, removed, states, given, keys, slot, token, valid, head, i, H, True, C, N, BN, TILES, LOW
    )
    step += _get(read, slot, t, i, C, N).to(tl.float32) * gradient
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    _store(d_r, gradient * tl.exp(until), token, exists, head, i, H, N)

    gradient = (
        _after(removed, d_states, slot, token, valid, head, i, H, True, C, N, BN, TILES, LOW) * end[None, :]
    )
    carried += tl.sum(_get(given, slot, t, i, C, N).to(tl.float32) * gradient, 0)
    gradient = _of_writers(
        removed,
        arrived,
        fed,
        read,
        found,
        gradient,
        slot,
        token,
        valid,
        head,
        i,
        H,
        True,
        C,
        N,
        BN,
        TILES,
        LOW,
    )
    step -= _get(given, slot, t, i, C, N).to(tl.float32) * gradient
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    gradient *= _grown(until)
    kappa = _load(removal, token, valid, head, i, H, N).to(tl.float32)
    _store(d_rate, gradient * kappa, token, exists, head, i, H, N)
    through_b = _factor(gradient * _load(rate, token, valid, head, i, H, N).to(tl.float32), LOW)

    gradient = _of_readers(
        fed, v, removed, states, given, keys, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW
    )
    own = _get(found, slot, t, i, C, N).to(tl.float32) * gradient
    before = _decay(log_decay, token, valid, head, i, H, N, C, False)
    through_z = gradient * tl.exp(before)
    _store(d_removal, through_b.to(tl.float32) - through_z, token, exists, head, i, H, N)
    step = _sums(t[:, None] <= t[None, :], step + own) - own
    step = tl.where(valid[:, None], step + carried[None, :], 0.0)
    _store(d_log_decay, step, token, exists, head, i, H, N)


class _Factors(NamedTuple):
    """What products take of the tokens, [B, J, H, C, N]."""

    read: Tensor  # R
    found: Tensor  # Z
    given: Tensor  # B
    keys: Tensor  # K
    ends: Tensor  # [B, J, H, N], c_n
    inverses: Tensor  # [B, J, H, C, C], A


class _Prepared(NamedTuple):
    """What the scans take, and the states."""

    moves: Tensor  # [B, J, H, N, N], P without its diagonal e^{c_n}
    rests: Tensor | None  # what its rounding left
    readers: Tensor  # [B, J, H, C, N], Q
    states: Tensor  # [B, J, H, N, N], S^T before each chunk


class _Launcher:
    """Shapes, block sizes and launches shared by the two directions. One configuration per head size."""

    def __init__(self, like: Tensor, mask: Tensor | None) -> None:
        self.B, self.T, self.H, self.N = like.shape
        self.like = like
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.high, self.low = PRECISIONS[like.dtype]
        self.chunks = triton.cdiv(self.T, CHUNK)
        self.tiles = triton.cdiv(self.N, TILE)
        self.split = self.high == "bf16x3"
        self.sizes = (self.T, self.H, self.chunks)
        self.rounded = torch.bfloat16 if self.low == "bf16" else torch.float32
        self.fixed: dict[str, Any] = {
            "N": self.N, "C": CHUNK, "BN": TILE, "TILES": self.tiles, "MASKED": mask is not None, "LOW": self.low,
            "num_warps": WARPS, "num_stages": 1,
        }  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def matrices(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(self.B, self.chunks, self.H, rows, columns, dtype=dtype)

    def factor(self) -> Tensor:
        return self.matrices(CHUNK, self.N, self.rounded)

    def options(self, registers: int | None) -> dict[str, Any]:
        """Factors in parts take all registers that there are."""
        return self.fixed | ({"maxnreg": registers} if registers and self.low == "bf16" else {})

    def grid(self, tiles: int) -> tuple[int]:
        return (self.B * self.chunks * self.H * tiles,)

    def prepare(self, r: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> tuple[_Factors, _Prepared, Tensor]:
        """``states`` are U^T yet; last what stands before v in y_0."""
        squares = [self.matrices(CHUNK, CHUNK, self.rounded) for _ in range(2)]
        ends = self.empty(self.B, self.chunks, self.H, self.N)
        read, found, given, keys = (self.factor() for _ in range(4))
        factors = _Factors(read, found, given, keys, ends, squares[0])
        moves = self.matrices(self.N, self.N, torch.bfloat16 if self.split else torch.float32)
        rests = torch.empty_like(moves) if self.split else None
        corrected = self.factor()
        finer = torch.empty_like(squares[0]) if self.low == "bf16" else None
        _scale_kernel[self.grid(self.tiles)](
            r, k, gates[0], self.mask, factors.read, factors.keys, ends, *self.sizes, **self.fixed
        )
        _solve_kernel[self.grid(1)](
            *gates, self.mask, factors.found, factors.given, factors.inverses, finer, *self.sizes, MERGES=MERGES,
            HIGH=self.high, **self.options(SOLVE_REGISTERS),
        )  # fmt: skip
        _transition_kernel[self.grid(self.tiles)](
            *gates, self.mask, factors.ends, factors.inverses, finer, corrected, moves, rests, *self.sizes,
            SPLIT=self.split, HIGH=self.high, **self.options(TRANSITION_REGISTERS),
        )  # fmt: skip
        prepared = _Prepared(moves, rests, self.factor(), self.matrices(self.N, self.N))
        _prepare_kernel[self.grid(1)](
            v, self.mask, *factors, corrected, prepared.readers, squares[1], prepared.states, *self.sizes,
            **self.options(PREPARE_REGISTERS),
        )  # fmt: skip
        return factors, prepared, squares[1]

    def scan(
        self, ends: Tensor, prepared: _Prepared, products: Tensor, outside: Tensor, *, reverse: bool
    ) -> Tensor:
        """What comes out at the other end; ``products`` become the states on the way."""
        total = torch.empty_like(outside)
        tiles = triton.cdiv(self.N, SCAN_TILE)
        _scan_kernel[(self.B * self.H * tiles,)](
            prepared.moves, prepared.rests, ends, products, outside, total, self.H, self.chunks,
            N=self.N, BN=TILE * triton.next_power_of_2(self.tiles), BV=SCAN_TILE, TILES=tiles, REVERSE=reverse,
            SPLIT=self.split, HIGH=self.high, STAGES=SCAN_STAGES,
            num_warps=SCAN_WARPS if self.split and self.tiles == 1 else 4,
        )  # fmt: skip
        return total

    def read(self, v: Tensor, prepared: _Prepared, scores: Tensor) -> Tensor:
        out = self.empty(*v.shape)
        _read_kernel[self.grid(self.tiles)](
            v, self.mask, prepared.readers, scores, prepared.states, out, *self.sizes, **self.fixed
        )
        return out

    def pull(self, prepared: _Prepared, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """d_y as a factor, and d_y^T Q."""
        arrived, products = self.factor(), self.matrices(self.N, self.N)
        _pull_kernel[self.grid(self.tiles)](
            prepared.readers, d_out, self.mask, arrived, products, *self.sizes, **self.fixed
        )
        return arrived, products

    def gradients(
        self, tokens: list[Tensor], factors: _Factors, states: Tensor, d_states: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        """Of r, k, v, log_decay, removal and rate, in their dtypes."""
        d_r, d_k, d_v, *d_gates = (torch.empty_like(x) for x in tokens)
        removed, fed = self.factor(), self.factor()
        parts = self.empty(self.B, self.chunks, self.H, self.tiles, self.N)
        v, log_decay = tokens[2:4]
        _value_gradient_kernel[self.grid(self.tiles)](
            v, self.mask, *factors, states, d_states, arrived, removed, fed, parts, d_v, *self.sizes,
            **self.options(VALUE_REGISTERS),
        )  # fmt: skip
        if FUSED:
            _key_gradient_kernel[self.grid(self.tiles)](
                *tokens[2:], self.mask, *factors[:5], states, d_states, arrived, removed, fed, parts, d_r, d_k,
                *d_gates, *self.sizes, **self.options(None),
            )  # fmt: skip
            return [d_r, d_k, d_v, *d_gates]
        d_found, steps = self.factor(), self.matrices(CHUNK, self.N)
        _reader_gradient_kernel[self.grid(self.tiles)](
            v, log_decay, self.mask, *factors[:4], states, arrived, removed, fed, d_r, d_found, steps,
            *self.sizes, **self.options(READER_REGISTERS),
        )  # fmt: skip
        _writer_gradient_kernel[self.grid(self.tiles)](
            *tokens[2:], self.mask, *factors[:5], d_states, arrived, removed, fed, parts, d_found,
            steps, d_k, *d_gates, *self.sizes, **self.options(WRITER_REGISTERS),
        )  # fmt: skip
        return [d_r, d_k, d_v, *d_gates]


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
            factors, prepared, scores = launch.prepare(r, k, v, log_decay, removal, rate)
            after = launch.scan(factors.ends, prepared, prepared.states, state, reverse=False)
            out = launch.read(v, prepared, scores)
        ctx.save_for_backward(r, k, v, log_decay, removal, rate, mask, *factors, *prepared)
        return out, after

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        *tokens, mask = ctx.saved_tensors[:7]
        factors, prepared = _Factors(*ctx.saved_tensors[7:13]), _Prepared(*ctx.saved_tensors[13:])
        d_out, d_after = d_out.contiguous(), d_after.contiguous()
        with torch.cuda.device_of(d_out):
            launch = _Launcher(tokens[1], mask)
            arrived, d_states = launch.pull(prepared, d_out)
            d_state = launch.scan(factors.ends, prepared, d_states, d_after, reverse=True)
            found = launch.gradients(tokens, factors, prepared.states, d_states, arrived)
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
