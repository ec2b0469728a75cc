"""RWKV-6 recurrence in Triton: chunked, parallel in time, a decay of its own for every token and key channel.

    y_t = r_t (S_t + diag(u) k_t^T v_t),      S_{t+1} = diag(w_t) S_t + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch", section 4.2.) As :mod:`rwkv_rev.wkv.triton_wkv5`, with sums of log w_t where that
has powers of one w. Chunks of 64 tokens, three launches, the sequential one elementwise:

1. each chunk's own update U_j = sum_s (e^{suffix_s} k_s)^T v_s and its decay e^{total};
2. a scan over chunks from zero, C_{j+1} = e^{total_j} C_j + U_j; the last C is the *contribution*, and with a decayed
   S_0 added it is the state before each chunk;
3. outputs (e^{prefix_t} r_t) S_j + A v, with A_ts = sum_i r_ti k_si e^{sum of log w between s and t} for s < t.

Backwards: G_j = sum_t (e^{prefix_t} r_t)^T dy_t, the same scan reversed, then dv by the kernel of 3. transposed, and
dr, dk, d log w by one of their own.

A is stable for every decay, however small: the chunk is halved until no channel decays by more than 2^-40 over half a
block, which launch 1 measures for each chunk of each head. Between neighbouring blocks exponents count from their
common border and are all <= 0; within the smallest block they count from its middle. So the last bits of an output may
depend on how strong decays are later in the same chunk.

Prefixes, suffixes and sums from borders are products with matrices of 0 and 1, the logarithms in three bfloat16 parts,
which hold all their bits: no large sums are subtracted from each other. The gradient of log w takes the same matrices
transposed.

Precision, determinism, masks and what is kept for the backward pass as in triton_wkv5; the logarithm of the whole
factor is summed in float64. Over 400 lines, because both directions share every helper and the scan.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.errors import KernelError
from rwkv_rev.wkv.compaction import kept_with, order_of
from rwkv_rev.wkv.limits import LARGEST_TRITON_HEAD
from rwkv_rev.wkv.triton_blocks import (
    PRECISIONS,
    chunk_tokens,
    dot,
    launch_place,
    load_rows,
    matrix_at,
    store_rows,
    upper_part,
)

LEVELS = 6
CHUNK = 1 << LEVELS
# smaller heads are padded: narrower tiles are what the ptxas of CUDA 12.8 (Triton 3.6) makes wrong code of
SMALLEST_BLOCK = 64
SCAN_BLOCK, SCAN_WARPS, SCAN_STAGES = 256, 2, 6
VALUE_TILE, VALUE_KEY_TILE, VALUE_WARPS = 64, 64, 4
# more warps than 64 rows have sixteens repeat each other's work
KEY_TILE, KEY_VALUE_TILE, KEY_WARPS = 32, 32, 4
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_LOG_DECAY = tl.constexpr(-1e4)  # stands for all below it, as in chunked_wkv6
# base 2; float32 rounds an exponent of 40, and so its power, by about 1e-6. Less what rounding may add
_MAX_EXPONENT = tl.constexpr(40.0 * (1 - 2**-8))


@triton.jit
def _load_log_decay(log_decay, token, valid, head, channel, H, N: tl.constexpr):
    """log w, [BT, channels]; zero, which decays nothing, where there is no valid token or no channel."""
    value = load_rows(log_decay, token, valid, head, channel, H, N).to(tl.float32)
    return tl.where(value < _MIN_LOG_DECAY, _MIN_LOG_DECAY, value)  # tl.maximum passes over NaN


@cache
def _choices(device: torch.device) -> Tensor:
    """The rows that :func:`_sums` may add, [2 (LEVELS + 1) + 1, BT, BT], for tokens t (rows) and q (columns).

    Number ``bits``: q between t and the border of two blocks of 2^bits, that is, in the block of t, and before t if the
    border is before the block (which has an odd number), else after t. In the one block of 2^LEVELS: after t. Then all
    of these transposed. In the last, the first rows choose blocks of 2 tokens, the next ones blocks of 4, and so on.
    """
    token = torch.arange(CHUNK, device="cpu")
    t, q = token[:, None], token[None, :]
    chosen = []
    for bits in range(LEVELS + 1):
        late = (t >> bits) % 2 == 1
        chosen.append((t >> bits == q >> bits) & torch.where(late, q < t, q > t))
    chosen += [x.T for x in chosen]
    blocks = [token[: CHUNK >> bits, None] == q >> bits for bits in range(1, LEVELS + 1)]
    chosen.append(torch.cat([*blocks, torch.zeros(1, CHUNK, dtype=torch.bool, device="cpu")]))
    return torch.stack(chosen).to(device, torch.bfloat16)


@triton.jit
def _pairs(bits, last, TRANSPOSED: tl.constexpr, LEVELS: tl.constexpr):
    """[t, s] (transposed: [s, t]), s before t: of two neighbouring blocks of 2^bits, at last also of the same."""
    token = tl.arange(0, 1 << LEVELS)
    first = (token >> (bits + 1)) << (bits + 1)
    end = tl.where(last, token, (token >> bits) << bits)
    if TRANSPOSED:
        return (token[:, None] >= first[None, :]) & (token[:, None] < end[None, :])
    return (token[None, :] >= first[:, None]) & (token[None, :] < end[:, None])


@triton.jit
def _choice(choices, number, LEVELS: tl.constexpr):
    t = tl.arange(0, 1 << LEVELS)
    return tl.load(choices + (number << (2 * LEVELS)) + (t[:, None] << LEVELS) + t[None, :])


@triton.jit
def _before(choices, LEVELS: tl.constexpr):
    """For each token those before it."""
    return _choice(choices, 2 * LEVELS + 1, LEVELS)


@triton.jit
def _after(choices, LEVELS: tl.constexpr):
    """For each token those after it."""
    return _choice(choices, LEVELS, LEVELS)


@triton.jit
def _sums(chosen, x, PRECISION: tl.constexpr):
    """Sums of the chosen rows of x (float32), which three bfloat16 parts hold to the last bit."""
    if PRECISION == "ieee":
        return tl.dot(chosen.to(tl.float32), x, input_precision=PRECISION)
    high = upper_part(x)
    rest = x - high
    middle = upper_part(rest)
    total = tl.dot(chosen, (rest - middle).to(tl.bfloat16))
    total = tl.dot(chosen, middle.to(tl.bfloat16), total)
    return tl.dot(chosen, high.to(tl.bfloat16), total)


@triton.jit
def _factors(choices, log2_decay, bits, last, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Factors of r and of k for pairs across the border of two blocks of 2^bits; at last also within each.

    Away from its own side of the border a token's exponent is positive, and needed only at last.
    """
    own = _sums(_choice(choices, bits, LEVELS), log2_decay, PRECISION)
    other = tl.where(last, -own - log2_decay, 0.0)
    late = ((tl.arange(0, 1 << LEVELS) >> bits) & 1)[:, None] == 1
    return tl.exp2(tl.where(late, own, other)), tl.exp2(tl.where(late, other, own))


@triton.jit
def _halvings(choices, log2_decay, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """How often the chunk is halved before no channel decays by more than 2^-40 over half a block."""
    left = (1 << LEVELS) - 1 - tl.arange(0, 1 << LEVELS)
    bits = tl.zeros_like(left)  # of the block that a row of the last choice stands for
    for exponent in tl.static_range(1, LEVELS + 1):
        bits += (left < (1 << exponent)).to(tl.int32)
    chosen = _choice(choices, 2 * LEVELS + 2, LEVELS)
    if PRECISION == "ieee":
        sums = tl.dot(chosen.to(tl.float32), -log2_decay, input_precision=PRECISION)
    else:  # upper parts miss at most 2^-9 of it
        sums = tl.dot(chosen, upper_part(-log2_decay).to(tl.bfloat16))
    found = tl.where(
        tl.max(sums, 1) > _MAX_EXPONENT, bits, LEVELS
    )  # blocks of 2^bits are too long to be a half
    alone = tl.where(tl.max(-log2_decay, 1) > _MAX_EXPONENT, 0, LEVELS)
    return LEVELS - tl.minimum(tl.min(found, 0), tl.min(alone, 0))


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _outer_kernel(
    keys, values, log_decay, choices, index, counts, products, decays, log_factors, halvings, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """products[b, j, h] = sum_s (e^suffix keys_s)^T values_s, and what else each chunk's decays say.

    If reversed, with prefixes instead of suffixes, and the products alone.
    """
    BT: tl.constexpr = 1 << LEVELS
    head, tile, chunk, row = launch_place(H, chunks, TILES, not REVERSE)
    token, _exists, count = chunk_tokens(index, counts, row, chunk, T, BT, MASKED)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    valid = tl.arange(0, BT) < count
    slot = (row.to(tl.int64) * chunks + chunk) * H + head
    natural = _load_log_decay(log_decay, token, valid, head, i, H, N)
    log2_decay = natural * _LOG2_E
    key = load_rows(keys, token, valid, head, i, H, N).to(tl.float32)
    if REVERSE:
        key *= tl.exp2(_sums(_before(choices, LEVELS), log2_decay, PRECISION))
    else:
        key *= tl.exp2(_sums(_after(choices, LEVELS), log2_decay, PRECISION))
    value = load_rows(values, token, valid, head, c, H, N)
    at, inside = matrix_at(products, slot, i, c, N)
    product = dot(tl.trans(key), value, tl.zeros([BN, BV], tl.float32), PRECISION)
    tl.store(at, product, mask=inside)
    if not REVERSE:
        once = (i < N) & (tile == 0)
        tl.store(decays + slot * N + i, tl.exp2(tl.sum(log2_decay, 0)), mask=once)
        tl.store(log_factors + slot * N + i, tl.sum(natural.to(tl.float64), 0), mask=once)
        tl.store(halvings + slot, _halvings(choices, log2_decay, LEVELS, PRECISION), mask=tile == 0)


@triton.jit(do_not_specialize=["H", "chunks"])
def _scan_kernel(
    products, outside, decays, states, total_out, H, chunks, BLOCKS,
    N: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """total_out = the decayed sum of products; states[j] = the sum so far where chunk j begins (ends, if
    reversed), plus the decayed ``outside`` matrix, which is not part of the total. Elementwise."""
    program = tl.program_id(0)
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slot = program // BLOCKS
    head = slot % H
    row = (slot // H).to(tl.int64)
    inside = element < N * N
    at = slot.to(tl.int64) * N * N + element
    injected = tl.load(outside + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSE else step
        here = (row * chunks + chunk) * H + head
        product = tl.load(products + here * N * N + element, mask=inside, other=0.0)
        decay = tl.load(decays + here * N + element // N, mask=inside, other=0.0)
        tl.store(states + here * N * N + element, total + injected, mask=inside)
        total = tl.fma(decay, total, product)
        injected *= decay
    tl.store(total_out + at, total, mask=inside)


@triton.jit
def _add_scores(
    scores, receptance, key, log2_decay, halvings, choices,
    TRANSPOSED: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """scores plus what these key channels add to A without its diagonal, [t, s], or to its transpose."""
    nothing = tl.zeros([1 << LEVELS, 1 << LEVELS], tl.float32)
    for step in range(0, tl.minimum(halvings + 1, LEVELS)):
        bits = LEVELS - 1 - step
        last = step == halvings
        r_factor, k_factor = _factors(choices, log2_decay, bits, last, LEVELS, PRECISION)
        pairs = _pairs(bits, last, TRANSPOSED, LEVELS)
        if TRANSPOSED:
            product = dot(key * k_factor, tl.trans(receptance * r_factor), nothing, PRECISION)
        else:
            product = dot(receptance * r_factor, tl.trans(key * k_factor), nothing, PRECISION)
        scores += tl.where(pairs, product, 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _value_kernel(
    r, k, values, log_decay, bonus, states, halvings, choices, index, counts, out, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, KEY_TILES: tl.constexpr, BV: tl.constexpr,
    TILES: tl.constexpr, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = (e^prefix r) S + A v; transposed, d_v = (e^suffix k) dS + A^T d_y. Both are sums over keys, in tiles."""
    BT: tl.constexpr = 1 << LEVELS
    head, tile, chunk, row = launch_place(H, chunks, TILES, not TRANSPOSED)
    token, exists, count = chunk_tokens(index, counts, row, chunk, T, BT, MASKED)
    c = tile * BV + tl.arange(0, BV)
    valid = tl.arange(0, BT) < count
    slot = (row.to(tl.int64) * chunks + chunk) * H + head
    halved = tl.load(halvings + slot)
    scores = tl.zeros([BT, BT], tl.float32)
    result = tl.zeros([BT, BV], tl.float32)
    diagonal = tl.zeros([BT], tl.float32)
    for key_tile in range(KEY_TILES):
        i = key_tile * BK + tl.arange(0, BK)
        log2_decay = _load_log_decay(log_decay, token, valid, head, i, H, N) * _LOG2_E
        u = tl.load(bonus + head * N + i, mask=i < N, other=0.0)
        receptance = load_rows(r, token, valid, head, i, H, N).to(tl.float32)
        key = load_rows(k, token, valid, head, i, H, N).to(tl.float32)
        diagonal += tl.sum(receptance * key * u[None, :], 1)
        scores = _add_scores(
            scores, receptance, key, log2_decay, halved, choices, TRANSPOSED, LEVELS, PRECISION
        )
        if TRANSPOSED:
            reader = key * tl.exp2(_sums(_after(choices, LEVELS), log2_decay, PRECISION))
        else:
            reader = receptance * tl.exp2(_sums(_before(choices, LEVELS), log2_decay, PRECISION))
        at, inside = matrix_at(states, slot, i, c, N)
        result = dot(reader, tl.load(at, mask=inside, other=0.0), result, PRECISION)
    value = load_rows(values, token, valid, head, c, H, N)
    result += diagonal[:, None] * value.to(tl.float32)
    store_rows(out, dot(scores, value, result, PRECISION), token, exists, head, c, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _key_gradient_kernel(
    r, k, v, log_decay, bonus, states, d_states, d_out, halvings, everywhere, choices, index, counts,
    d_r, d_k, d_log_decay, d_bonus, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, KEY_TILES: tl.constexpr,
    BV: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of key channels, given the states before the chunk and the gradients after it.

    ``everywhere`` [B, H, N] is added to the gradient of every log w of the row.
    """
    BT: tl.constexpr = 1 << LEVELS
    head, key_tile, chunk, row = launch_place(H, chunks, KEY_TILES, True)
    token, exists, count = chunk_tokens(index, counts, row, chunk, T, BT, MASKED)
    i = key_tile * BK + tl.arange(0, BK)
    valid = tl.arange(0, BT) < count
    slot = (row.to(tl.int64) * chunks + chunk) * H + head

    d_scores = tl.zeros([BT, BT], tl.float32)
    d_receptance = tl.zeros([BT, BK], tl.float32)
    d_key = tl.zeros([BT, BK], tl.float32)
    d_diagonal = tl.zeros([BT], tl.float32)
    carried = tl.zeros([BK], tl.float32)
    for tile in range(TILES):
        c = tile * BV + tl.arange(0, BV)
        value = load_rows(v, token, valid, head, c, H, N)
        d_y = load_rows(d_out, token, valid, head, c, H, N)
        at, inside = matrix_at(states, slot, i, c, N)
        state = tl.load(at, mask=inside, other=0.0)
        at, inside = matrix_at(d_states, slot, i, c, N)
        d_state = tl.load(at, mask=inside, other=0.0)
        carried += tl.sum(state * d_state, 1)
        d_diagonal += tl.sum(d_y * value.to(tl.float32), 1)
        d_scores = dot(d_y, tl.trans(value), d_scores, PRECISION)
        d_receptance = dot(d_y, tl.trans(state), d_receptance, PRECISION)
        d_key = dot(value, tl.trans(d_state), d_key, PRECISION)

    log2_decay = _load_log_decay(log_decay, token, valid, head, i, H, N) * _LOG2_E
    receptance = load_rows(r, token, valid, head, i, H, N).to(tl.float32)
    key = load_rows(k, token, valid, head, i, H, N).to(tl.float32)
    before = _before(choices, LEVELS)
    after = _after(choices, LEVELS)
    d_receptance *= tl.exp2(_sums(before, log2_decay, PRECISION))
    d_key *= tl.exp2(_sums(after, log2_decay, PRECISION))
    everything = tl.load(everywhere + (row * H + head) * N + i, mask=i < N, other=0.0)
    everything += carried * tl.exp2(tl.sum(log2_decay, 0))
    nothing = tl.zeros([BT, BK], tl.float32)
    d_decay = dot(after, receptance * d_receptance, nothing + everything[None, :], PRECISION)
    d_decay = dot(before, key * d_key, d_decay, PRECISION)

    halved = tl.load(halvings + slot)
    for step in range(0, tl.minimum(halved + 1, LEVELS)):
        bits = LEVELS - 1 - step
        last = step == halved
        r_factor, k_factor = _factors(choices, log2_decay, bits, last, LEVELS, PRECISION)
        d_pairs = tl.where(_pairs(bits, last, False, LEVELS), d_scores, 0.0)
        r_change = dot(d_pairs, key * k_factor, nothing, PRECISION) * r_factor
        k_change = dot(tl.trans(d_pairs), receptance * r_factor, nothing, PRECISION) * k_factor
        d_receptance += r_change
        d_key += k_change
        r_change *= receptance
        k_change *= key
        late = ((tl.arange(0, BT) >> bits) & 1)[:, None] == 1
        weighted = tl.where(late, r_change - k_change, k_change - r_change)
        d_decay = dot(_choice(choices, LEVELS + 1 + bits, LEVELS), weighted, d_decay, PRECISION)
        d_decay -= tl.where(late, k_change, r_change)

    given = load_rows(log_decay, token, valid, head, i, H, N).to(tl.float32)
    d_decay = tl.where(valid[:, None] & ~(given < _MIN_LOG_DECAY), d_decay, 0.0)
    store_rows(d_log_decay, d_decay, token, exists, head, i, H, N)
    u = tl.load(bonus + head * N + i, mask=i < N, other=0.0)
    store_rows(d_r, d_receptance + d_diagonal[:, None] * u[None, :] * key, token, exists, head, i, H, N)
    store_rows(d_k, d_key + d_diagonal[:, None] * u[None, :] * receptance, token, exists, head, i, H, N)
    tl.store(d_bonus + slot * N + i, tl.sum(d_diagonal[:, None] * receptance * key, 0), mask=i < N)


@triton.jit
def _factor_gradient_kernel(
    state, d_contribution, log_factor, d_log_factor, everywhere, N: tl.constexpr, BN: tl.constexpr
):
    """What the gradient of every log w of a row has of the factor's. States hold the decayed S_0, which the
    contribution does not: the gradient through that path is taken out again."""
    slot = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    at, inside = matrix_at(state, slot, i, i, N)
    product = tl.load(at, mask=inside, other=0.0)
    at, inside = matrix_at(d_contribution, slot, i, i, N)
    product *= tl.load(at, mask=inside, other=0.0)
    place = slot * N + i
    factor = tl.exp(tl.load(log_factor + place, mask=i < N, other=0.0))
    found = tl.load(d_log_factor + place, mask=i < N, other=0.0) - factor * tl.sum(product, 1)
    tl.store(everywhere + place, found.to(tl.float32), mask=i < N)


class _Launcher:
    """Shapes, block sizes and launches shared by the two directions. One configuration per head size."""

    def __init__(self, like: Tensor, log_decay: Tensor, mask: Tensor | None) -> None:
        self.B, self.T, self.H, self.N = like.shape
        self.chunks = triton.cdiv(self.T, CHUNK)
        self.log_decay = log_decay
        self.like = like
        self.block = max(SMALLEST_BLOCK, triton.next_power_of_2(self.N))
        self.sizes = (self.T, self.H, self.chunks)
        self.choices = _choices(like.device)
        self.index = self.counts = None
        if mask is not None:
            self.index, self.counts = kept_with(mask, order_of)
        self.fixed = {
            "N": self.N, "LEVELS": LEVELS, "MASKED": mask is not None,
            "PRECISION": PRECISIONS[like.dtype], "num_stages": 1,
        }  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def tiles(self, size: int) -> tuple[int, int]:
        """(Width, number) of the tiles a head is cut into."""
        size = min(size, self.block)
        return size, triton.cdiv(self.N, size)

    def outer(self, keys: Tensor, values: Tensor, *found: Tensor | None, reverse: bool) -> Tensor:
        """Products [B, chunks, H, N, N]; forwards also fills ``found``: decays, log factors, halvings."""
        products = self.empty(self.B, self.chunks, self.H, self.N, self.N)
        width, tiles = self.tiles(VALUE_TILE)
        _outer_kernel[(self.B * self.chunks * self.H * tiles,)](
            keys, values, self.log_decay, self.choices, self.index, self.counts, products, *found, *self.sizes,
            BN=self.block, BV=width, TILES=tiles, REVERSE=reverse, num_warps=4 if self.block <= 64 else 8, **self.fixed,
        )  # fmt: skip
        return products

    def scan(
        self, products: Tensor, outside: Tensor, decays: Tensor, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """(states [B, chunks, H, N, N], in the memory of ``products``; total [B, H, N, N])."""
        total = self.empty(self.B, self.H, self.N, self.N)
        block = min(SCAN_BLOCK, triton.next_power_of_2(self.N * self.N))
        blocks = triton.cdiv(self.N * self.N, block)
        _scan_kernel[(self.B * self.H * blocks,)](
            products, outside, decays, products, total, self.H, self.chunks, blocks,
            N=self.N, BLOCK=block, REVERSE=reverse, STAGES=SCAN_STAGES, num_warps=SCAN_WARPS,
        )  # fmt: skip
        return products, total

    def written(self, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        """States before each chunk, decays and halvings of the chunks, contribution and log factor of all."""
        decays = self.empty(self.B, self.chunks, self.H, self.N)
        log_factors = torch.empty_like(decays, dtype=torch.float64)
        halvings = self.empty(self.B, self.chunks, self.H, dtype=torch.int32)
        products = self.outer(k, v, decays, log_factors, halvings, reverse=False)
        states, contribution = self.scan(products, state, decays, reverse=False)
        return states, decays, halvings, contribution, log_factors.sum(1)

    def values(self, *inputs: Tensor, out: Tensor, transposed: bool) -> Tensor:
        """``inputs``: r, k, values, bonus, states, halvings."""
        r, k, values, *others = inputs
        key_width, key_tiles = self.tiles(VALUE_KEY_TILE)
        width, tiles = self.tiles(VALUE_TILE)
        _value_kernel[(self.B * self.chunks * self.H * tiles,)](
            r, k, values, self.log_decay, *others, self.choices, self.index, self.counts, out, *self.sizes,
            BK=key_width, KEY_TILES=key_tiles, BV=width, TILES=tiles, TRANSPOSED=transposed,
            num_warps=VALUE_WARPS, **self.fixed,
        )  # fmt: skip
        return out

    def factor_gradient(self, *inputs: Tensor) -> Tensor:
        """``inputs``: state, d_contribution, log_factor, d_log_factor. [B, H, N], one launch instead of six."""
        everywhere = self.empty(self.B, self.H, self.N)
        _factor_gradient_kernel[(self.B * self.H,)](
            *inputs,
            everywhere,
            N=self.N,
            BN=triton.next_power_of_2(self.N),
            num_warps=4 if self.block <= 64 else 8,
        )
        return everywhere

    def key_gradients(self, r: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """(d_r, d_k, d_log_decay, d_bonus), the last of every chunk alone: [B, chunks, H, N]."""
        d_r, d_k, d_log_decay = torch.empty_like(r), torch.empty_like(k), torch.empty_like(self.log_decay)
        d_bonus = self.empty(self.B, self.chunks, self.H, self.N)
        key_width, key_tiles = self.tiles(KEY_TILE)
        width, tiles = self.tiles(KEY_VALUE_TILE)
        _key_gradient_kernel[(self.B * self.chunks * self.H * key_tiles,)](
            r, k, v, self.log_decay, *others, self.choices, self.index, self.counts, d_r, d_k, d_log_decay, d_bonus,
            *self.sizes, BK=key_width, KEY_TILES=key_tiles, BV=width, TILES=tiles, num_warps=KEY_WARPS, **self.fixed,
        )  # fmt: skip
        return d_r, d_k, d_log_decay, d_bonus


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor,
        state: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            states, decays, halvings, contribution, log_factor = launch.written(k, v, state)
            out = launch.values(
                r, k, v, bonus, states, halvings, out=launch.empty(*k.shape), transposed=False
            )
        ctx.save_for_backward(r, k, v, log_decay, bonus, state, states, decays, halvings, log_factor, mask)
        return out, contribution, log_factor

    @staticmethod
    @first_order
    def backward(
        ctx: Any, d_out: Tensor, d_contribution: Tensor, d_log_factor: Tensor
    ) -> tuple[Tensor | None, ...]:
        r, k, v, log_decay, bonus, state, states, decays, halvings, log_factor, mask = ctx.saved_tensors
        d_out, d_contribution = d_out.contiguous(), d_contribution.contiguous()
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            products = launch.outer(r, d_out, None, None, None, reverse=True)
            d_states, d_state = launch.scan(products, d_contribution, decays, reverse=True)
            d_v = launch.values(
                r, k, d_out, bonus, d_states, halvings, out=torch.empty_like(v), transposed=True
            )
            everywhere = launch.factor_gradient(state, d_contribution, log_factor, d_log_factor.contiguous())
            d_r, d_k, d_log_decay, d_bonus = launch.key_gradients(
                r, k, v, bonus, states, d_states, d_out, halvings, everywhere
            )
            d_bonus = d_bonus.sum((0, 1))
        return d_r, d_k, d_v, d_log_decay, d_bonus, d_state, None


def _prepare(log_decay: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors, the decay in at most float32; raises KernelError for what the kernels cannot do."""
    size = tokens[0].shape[-1]
    if size > LARGEST_TRITON_HEAD:
        raise KernelError(
            f'the triton kernel takes head sizes up to {LARGEST_TRITON_HEAD}, not {size}; use kernel="chunked"'
        )
    for x in tokens:
        if x.dtype not in PRECISIONS:
            raise KernelError(
                f'the triton kernel takes bfloat16, float16 and float32, not {x.dtype}; use kernel="chunked"'
            )
    # kernels of float16 are what the ptxas of CUDA 12.8 makes wrong code of: heads of 32 left their shared memory
    kept = (torch.float32, torch.bfloat16)
    return tuple((x if x.dtype in kept else x.float()).contiguous() for x in (log_decay, *tokens))


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, T, H, N] and contribution [B, H, N, N] (key index first), float32; log factor [B, H, N], float64.

    Arguments as in :func:`rwkv_rev.wkv.wkv6`; ``r, k, v`` in bfloat16, float16 or float32, N at most 128.
    """
    decay, r, k, v = _prepare(log_decay, r, k, v)
    return _WKV6.apply(r, k, v, decay, bonus.float().contiguous(), state.float().contiguous(), mask)


def wkv6_contribution(
    k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The second and third result of :func:`wkv6` alone, the same to the bit."""
    batch, _, heads, size = k.shape
    nothing = k.new_zeros(batch, heads, size, size, dtype=torch.float32)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, log_decay)):
        bonus = nothing.new_zeros(heads, size)
        return wkv6(torch.zeros_like(k), k, v, log_decay, bonus, nothing, mask)[1:]
    decay, k, v = _prepare(log_decay, k, v)
    with torch.cuda.device_of(k):
        *_, contribution, log_factor = _Launcher(k, decay, mask).written(k, v, nothing)
    return contribution, log_factor
