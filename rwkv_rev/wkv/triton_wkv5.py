"""RWKV-5 recurrence in Triton: chunked, parallel in time, decay fixed in time per key channel.

    y_t = r_t (S_t + diag(u) k_t^T v_t),      S_{t+1} = diag(w) S_t + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch", section 4.1.) Chunks of 64 tokens are handled by matrix products, in three
launches:

1. each chunk's own update U_j = sum_s (w^{n-1-s} k_s)^T v_s;
2. a scan over chunks from zero, C_{j+1} = w^{n_j} C_j + U_j; the last C is the *contribution*, and the state
   before chunk j is S_j = C_j + w^{64 j} S_0;
3. outputs (w^t r_t) S_j + A v, with A_ts = sum_i r_ti k_si w_i^{t-1-s} for s < t, and r_t diag(u) k_t on the
   diagonal.

The backward pass mirrors them: G_j = sum_t (w^t r_t)^T dy_t, the same scan reversed, then dv by the kernel of 3.
transposed, and dr, dk by one of their own.

A is stable for every decay, however small: the chunk is halved until w^{-block/2} is harmless, as often as the
head's strongest decay needs. Between two halves exponents count from their common border and are all >= 0,
within the smallest block from its middle. Weak decays need one matrix product, w = 1e-9 needs seven. The
gradient of log w weighs each product by the same local exponents, so nothing large cancels in it.

Step 2. without S_0, and its mirror without what is wanted of the contribution, may have been left by
:func:`wkv5_contribution` and :func:`wkv5_pull` (:class:`.Handover`); the decayed matrix is added to what they found,
to the same bits.

The states before every chunk (N / 64 float32 numbers per token and channel) are kept for the backward pass. All
sums are float32. A product of float32 operands is taken in three tf32 parts (relative error about 4e-7); where
the inputs are bfloat16 or float16, in bfloat16 parts, the inputs themselves exact (errors of results and of
gradients before their rounding to the input's dtype 2e-6 to 6e-6). Sums over rows and chunks go through buffers
that are added in a fixed order: results are the same to the bit. One configuration per head size, nothing is
tuned at run time. float64 is refused. Over 400 lines, because both directions share every helper and the scan.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.errors import KernelError
from rwkv_rev.wkv.compaction import kept_with, order_of
from rwkv_rev.wkv.handover import Handover
from rwkv_rev.wkv.triton_blocks import (
    PRECISIONS,
    chunk_tokens,
    dot,
    launch_place,
    load_rows,
    matrix_at,
    store_rows,
)
from rwkv_rev.wkv.triton_decay import take_out

LEVELS = 6
CHUNK = 1 << LEVELS
# Change tiles only with the gpu tests at hand: for VALUE_TILE = 32 or KEY_TILE = 16 the ptxas of CUDA 12.8 (Triton
# 3.6) reads uniform registers before it writes them, and the kernel leaves its shared memory.
OUTER_WARPS = 4
SCAN_BLOCK, SCAN_WARPS, SCAN_STAGES = 256, 2, 6
INJECT_BLOCK, INJECT_WARPS = 1024, 4
VALUE_TILE, VALUE_WARPS = 64, 4
KEY_TILE, KEY_VALUE_TILE, KEY_WARPS = 32, 32, 4
MAX_HEAD_SIZE = 128
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_LOG_DECAY = tl.constexpr(-1e5)  # below it w is zero in float32 anyway, and 0 * inf cannot happen
_MAX_EXPONENT = tl.constexpr(40.0)  # base 2; float32 rounds such an exponent, and so its power, by about 1e-6


@triton.jit
def _log2_decay(log_decay, head, channel, N: tl.constexpr):
    value = tl.load(log_decay + head * N + channel, mask=channel < N, other=0.0)
    return tl.where(value < _MIN_LOG_DECAY, _MIN_LOG_DECAY, value) * _LOG2_E  # tl.maximum passes over NaN


@triton.jit
def _halvings(log2_decay, LEVELS: tl.constexpr):
    """How often the chunk is halved before w^(block / 2) stays in range for the head's strongest decay."""
    strongest = tl.max(-log2_decay, 0)
    count = 0
    for level in tl.static_range(LEVELS):
        count += (strongest * (1 << (LEVELS - 1 - level)) > _MAX_EXPONENT).to(tl.int32)
    return count


@triton.jit
def _level(step, halvings, TRANSPOSED: tl.constexpr, LEVELS: tl.constexpr):
    """One level of the halved chunk: exponents of r and of k, and the pairs (t, s) it covers."""
    t = tl.arange(0, 1 << LEVELS)
    between = (step < halvings).to(tl.int32)
    bits = LEVELS - tl.minimum(step + 1, halvings)
    within = t & ((1 << bits) - 1)
    shift = ((1 << bits) >> 1) * (1 - between)
    r_exponent = (within - shift).to(tl.float32)
    k_exponent = ((1 << bits) - 1 - within - shift).to(tl.float32)
    later, earlier = t[:, None], t[None, :]
    if TRANSPOSED:
        later, earlier = earlier, later
    # neighbouring blocks, the later one odd, or the same block
    pairs = (((later ^ earlier) >> bits) == between) & (later > earlier)
    return r_exponent, k_exponent, pairs


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _outer_kernel(
    keys, values, log_decay, index, counts, products, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    FROM_START: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """products[b, j, h] = sum_s (w^e keys_s)^T values_s, e counted to the chunk's end or from its start."""
    BT: tl.constexpr = 1 << LEVELS
    head, tile, chunk, row = launch_place(H, chunks, TILES)
    token, _exists, count = chunk_tokens(index, counts, row, chunk, T, BT, MASKED)
    t = tl.arange(0, BT)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    valid = t < count
    log2_decay = _log2_decay(log_decay, head, i, N)
    exponent = t if FROM_START else tl.maximum(count - 1 - t, 0)
    key = load_rows(keys, token, valid, head, i, H, N).to(tl.float32)
    key *= tl.exp2(exponent.to(tl.float32)[:, None] * log2_decay[None, :])
    value = load_rows(values, token, valid, head, c, H, N)
    at, inside = matrix_at(products, (row.to(tl.int64) * chunks + chunk) * H + head, i, c, N)
    product = dot(tl.trans(key), value, tl.zeros([BN, BV], tl.float32), PRECISION)
    tl.store(at, product, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _scan_kernel(
    products, outside, log_decay, counts, states, total_out, T, H, chunks, BLOCKS,
    N: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """total_out = the decayed sum of products; states[j] = the sum so far where chunk j begins (ends, if
    reversed), plus the decayed ``outside`` matrix, which is not part of the total. Elementwise."""
    BT: tl.constexpr = 1 << LEVELS
    program = tl.program_id(0)
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slot = program // BLOCKS
    head = slot % H
    row = (slot // H).to(tl.int64)
    inside = element < N * N
    log2_decay = tl.load(log_decay + head * N + element // N, mask=inside, other=0.0)
    log2_decay = tl.where(log2_decay < _MIN_LOG_DECAY, _MIN_LOG_DECAY, log2_decay) * _LOG2_E
    count = T
    if MASKED:
        count = tl.load(counts + row)
    at = slot.to(tl.int64) * N * N + element
    injected = tl.load(outside + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSE else step
        start = tl.minimum(chunk * BT, count)
        end = tl.minimum((chunk + 1) * BT, count)
        distance = count - end if REVERSE else start
        here = ((row * chunks + chunk) * H + head) * N * N + element
        product = tl.load(products + here, mask=inside, other=0.0)
        before = tl.fma(tl.exp2(log2_decay * distance.to(tl.float32)), injected, total)
        tl.store(states + here, before, mask=inside)
        total = tl.fma(tl.exp2(log2_decay * (end - start).to(tl.float32)), total, product)
    tl.store(total_out + at, total, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _inject_kernel(
    states, outside, log_decay, counts, T, H, chunks, BLOCKS,
    N: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """To states[j] that were scanned with nothing outside: the same, to the bit, as a scan with ``outside``."""
    BT: tl.constexpr = 1 << LEVELS
    program = tl.program_id(0)
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slot = program // BLOCKS  # row, chunk, head
    head = slot % H
    chunk = (slot // H) % chunks
    row = (slot // H // chunks).to(tl.int64)
    inside = element < N * N
    log2_decay = tl.load(log_decay + head * N + element // N, mask=inside, other=0.0)
    log2_decay = tl.where(log2_decay < _MIN_LOG_DECAY, _MIN_LOG_DECAY, log2_decay) * _LOG2_E
    count = T
    if MASKED:
        count = tl.load(counts + row)
    distance = tl.minimum(chunk * BT, count)
    if REVERSE:
        distance = count - tl.minimum((chunk + 1) * BT, count)
    injected = tl.load(outside + (row * H + head) * N * N + element, mask=inside, other=0.0)
    at = states + slot.to(tl.int64) * N * N + element
    found = tl.load(at, mask=inside, other=0.0)
    found = tl.fma(tl.exp2(log2_decay * distance.to(tl.float32)), injected, found)
    tl.store(at, found, mask=inside)


@triton.jit
def _scores(
    receptance, key, log2_decay, TRANSPOSED: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr
):
    """A without its diagonal, [t, s], or its transpose."""
    halvings = _halvings(log2_decay, LEVELS)
    nothing = tl.zeros([1 << LEVELS, 1 << LEVELS], tl.float32)
    scores = nothing
    for step in range(0, halvings + 1):
        r_exponent, k_exponent, pairs = _level(step, halvings, TRANSPOSED, LEVELS)
        left = receptance * tl.exp2(r_exponent[:, None] * log2_decay[None, :])
        right = key * tl.exp2(k_exponent[:, None] * log2_decay[None, :])
        if TRANSPOSED:
            scores += tl.where(pairs, dot(right, tl.trans(left), nothing, PRECISION), 0.0)
        else:
            scores += tl.where(pairs, dot(left, tl.trans(right), nothing, PRECISION), 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _value_kernel(
    r, k, values, log_decay, bonus, states, index, counts, out, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = (w^t r) S + A v; transposed, d_v = (w^{n-1-s} k) dS + A^T d_y."""
    BT: tl.constexpr = 1 << LEVELS
    head, tile, chunk, row = launch_place(H, chunks, TILES)
    token, exists, count = chunk_tokens(index, counts, row, chunk, T, BT, MASKED)
    t = tl.arange(0, BT)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    valid = t < count
    log2_decay = _log2_decay(log_decay, head, i, N)
    u = tl.load(bonus + head * N + i, mask=i < N, other=0.0)
    receptance = load_rows(r, token, valid, head, i, H, N).to(tl.float32)
    key = load_rows(k, token, valid, head, i, H, N).to(tl.float32)
    diagonal = tl.sum(receptance * key * u[None, :], 1)
    scores = _scores(receptance, key, log2_decay, TRANSPOSED, LEVELS, PRECISION)
    value = load_rows(values, token, valid, head, c, H, N)
    result = dot(scores, value, diagonal[:, None] * value.to(tl.float32), PRECISION)
    if TRANSPOSED:
        exponent = tl.maximum(count - 1 - t, 0)
        reader = key
    else:
        exponent = t
        reader = receptance
    at, inside = matrix_at(states, (row.to(tl.int64) * chunks + chunk) * H + head, i, c, N)
    state = tl.load(at, mask=inside, other=0.0)
    reader *= tl.exp2(exponent.to(tl.float32)[:, None] * log2_decay[None, :])
    result = dot(reader, state, result, PRECISION)
    store_rows(out, result, token, exists, head, c, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _key_gradient_kernel(
    r, k, v, log_decay, bonus, states, d_states, d_out, index, counts,
    d_r, d_k, d_log_decay, d_bonus, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, KEY_TILES: tl.constexpr, BN: tl.constexpr,
    BV: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of key channels, given the states before the chunk and the gradients after it."""
    BT: tl.constexpr = 1 << LEVELS
    head, key_tile, chunk, row = launch_place(H, chunks, KEY_TILES)
    token, exists, count = chunk_tokens(index, counts, row, chunk, T, BT, MASKED)
    t = tl.arange(0, BT)
    i = key_tile * BK + tl.arange(0, BK)
    valid = t < count
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

    log2_decay = _log2_decay(log_decay, head, i, N)
    every = tl.arange(0, BN)
    halvings = _halvings(_log2_decay(log_decay, head, every, N), LEVELS)
    to_end = tl.maximum(count - 1 - t, 0).to(tl.float32)
    from_start = t.to(tl.float32)
    whole = count.to(tl.float32)
    receptance = load_rows(r, token, valid, head, i, H, N).to(tl.float32)
    key = load_rows(k, token, valid, head, i, H, N).to(tl.float32)
    d_receptance *= tl.exp2(from_start[:, None] * log2_decay[None, :])
    d_key *= tl.exp2(to_end[:, None] * log2_decay[None, :])
    d_decay = carried * whole * tl.exp2(log2_decay * whole)
    d_decay += tl.sum(from_start[:, None] * (receptance * d_receptance) + to_end[:, None] * (key * d_key), 0)

    nothing = tl.zeros([BT, BK], tl.float32)
    for step in range(0, halvings + 1):
        r_exponent, k_exponent, pairs = _level(step, halvings, False, LEVELS)
        d_pairs = tl.where(pairs, d_scores, 0.0)
        r_factor = tl.exp2(r_exponent[:, None] * log2_decay[None, :])
        k_factor = tl.exp2(k_exponent[:, None] * log2_decay[None, :])
        change = dot(d_pairs, key * k_factor, nothing, PRECISION) * r_factor
        d_receptance += change
        weighted = r_exponent[:, None] * (receptance * change)
        change = dot(tl.trans(d_pairs), receptance * r_factor, nothing, PRECISION) * k_factor
        d_key += change
        d_decay += tl.sum(weighted + k_exponent[:, None] * (key * change), 0)

    u = tl.load(bonus + head * N + i, mask=i < N, other=0.0)
    store_rows(d_r, d_receptance + d_diagonal[:, None] * u[None, :] * key, token, exists, head, i, H, N)
    store_rows(d_k, d_key + d_diagonal[:, None] * u[None, :] * receptance, token, exists, head, i, H, N)
    partial = slot * N + i
    tl.store(d_bonus + partial, tl.sum(d_diagonal[:, None] * receptance * key, 0), mask=i < N)
    tl.store(d_log_decay + partial, d_decay, mask=i < N)


class _Launcher:
    """Shapes, block sizes and launches shared by the two directions. One configuration per head size."""

    def __init__(self, like: Tensor, log_decay: Tensor, mask: Tensor | None) -> None:
        self.B, self.T, self.H, self.N = like.shape
        self.chunks = triton.cdiv(self.T, CHUNK)
        self.log_decay = log_decay
        self.like = like
        self.block = max(16, triton.next_power_of_2(self.N))
        self.sizes = (self.T, self.H, self.chunks)
        self.index = self.counts = None
        if mask is not None:
            self.index, self.counts = kept_with(mask, order_of)
        self.fixed = {
            "N": self.N, "LEVELS": LEVELS, "BN": self.block, "MASKED": mask is not None,
            "PRECISION": PRECISIONS[like.dtype], "num_stages": 1,
        }  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def tiles(self, size: int) -> tuple[int, int]:
        """(Width, number) of the tiles a head is cut into."""
        size = min(size, self.block)
        return size, triton.cdiv(self.N, size)

    def outer(self, keys: Tensor, values: Tensor, *, from_start: bool) -> Tensor:
        products = self.empty(self.B, self.chunks, self.H, self.N, self.N)
        width, tiles = self.tiles(VALUE_TILE)
        _outer_kernel[(self.B * self.chunks * self.H * tiles,)](
            keys, values, self.log_decay, self.index, self.counts, products, *self.sizes,
            BV=width, TILES=tiles, FROM_START=from_start, num_warps=OUTER_WARPS, **self.fixed,
        )  # fmt: skip
        return products

    def scan(self, products: Tensor, outside: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """(states [B, chunks, H, N, N], in the memory of ``products``; total [B, H, N, N])."""
        total = self.empty(self.B, self.H, self.N, self.N)
        block = min(SCAN_BLOCK, triton.next_power_of_2(self.N * self.N))
        blocks = triton.cdiv(self.N * self.N, block)
        _scan_kernel[(self.B * self.H * blocks,)](
            products, outside, self.log_decay, self.counts, products, total, *self.sizes, blocks,
            N=self.N, LEVELS=LEVELS, BLOCK=block, REVERSE=reverse, MASKED=self.counts is not None,
            STAGES=SCAN_STAGES, num_warps=SCAN_WARPS,
        )  # fmt: skip
        return products, total

    def inject(self, states: Tensor, outside: Tensor, *, reverse: bool) -> Tensor:
        """States of :meth:`scan` with ``outside``, in the place of those with nothing."""
        block = min(INJECT_BLOCK, triton.next_power_of_2(self.N * self.N))
        blocks = triton.cdiv(self.N * self.N, block)
        _inject_kernel[(self.B * self.chunks * self.H * blocks,)](
            states, outside, self.log_decay, self.counts, *self.sizes, blocks,
            N=self.N, LEVELS=LEVELS, BLOCK=block, REVERSE=reverse, MASKED=self.counts is not None,
            num_warps=INJECT_WARPS,
        )  # fmt: skip
        return states

    def values(
        self,
        r: Tensor,
        k: Tensor,
        values: Tensor,
        bonus: Tensor,
        states: Tensor,
        out: Tensor,
        *,
        transposed: bool,
    ) -> Tensor:
        width, tiles = self.tiles(VALUE_TILE)
        _value_kernel[(self.B * self.chunks * self.H * tiles,)](
            r, k, values, self.log_decay, bonus, states, self.index, self.counts, out, *self.sizes,
            BV=width, TILES=tiles, TRANSPOSED=transposed, num_warps=VALUE_WARPS, **self.fixed,
        )  # fmt: skip
        return out

    def key_gradients(self, r: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d_r, d_k, d_log_decay, d_bonus), the last two of every chunk alone: [B, chunks, H, N]."""
        d_r, d_k = torch.empty_like(r), torch.empty_like(k)
        d_log_decay = self.empty(self.B, self.chunks, self.H, self.N)
        d_bonus = torch.empty_like(d_log_decay)
        key_width, key_tiles = self.tiles(KEY_TILE)
        width, tiles = self.tiles(KEY_VALUE_TILE)
        _key_gradient_kernel[(self.B * self.chunks * self.H * key_tiles,)](
            r, k, *others, self.index, self.counts, d_r, d_k, d_log_decay, d_bonus, *self.sizes,
            BK=key_width, KEY_TILES=key_tiles, BV=width, TILES=tiles, num_warps=KEY_WARPS, **self.fixed,
        )  # fmt: skip
        return d_r, d_k, d_log_decay, d_bonus


class _WKV5(torch.autograd.Function):
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
        handover: Handover | None,
    ) -> tuple[Tensor, Tensor]:
        written = None if handover is None else handover.take()
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            if written is None:
                states, contribution = launch.scan(launch.outer(k, v, from_start=False), state, reverse=False)
            else:
                states, contribution = launch.inject(written[0], state, reverse=False), written[1]
            out = launch.values(r, k, v, bonus, states, launch.empty(*k.shape), transposed=False)
        ctx.save_for_backward(r, k, v, log_decay, bonus, state, states, mask)
        ctx.handover = handover
        return out, contribution

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor, d_contribution: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, log_decay, bonus, state, states, mask = ctx.saved_tensors
        pulled = None if ctx.handover is None else ctx.handover.take_pulled(d_out)
        d_out, d_contribution = d_out.contiguous(), d_contribution.contiguous()
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            if pulled is None:
                products = launch.outer(r, d_out, from_start=True)
                d_states, d_state = launch.scan(products, d_contribution, reverse=True)
            else:
                d_states, d_state = launch.inject(pulled[0], d_contribution, reverse=True), pulled[1]
            d_v = launch.values(r, k, d_out, bonus, d_states, torch.empty_like(v), transposed=True)
            d_r, d_k, d_log_decay, d_bonus = launch.key_gradients(
                r, k, v, log_decay, bonus, states, d_states, d_out
            )
            # S_j holds w^{64 j} S_0, which the contribution does not: take that path out again
            take_out(state, d_contribution, log_decay, launch.counts, launch.T, d_log_decay)
            d_log_decay = d_log_decay.sum((0, 1))
            d_bonus = d_bonus.sum((0, 1))
        return d_r, d_k, d_v, d_log_decay, d_bonus, d_state, None, None


class _Contribution(torch.autograd.Function):
    """The second result of :class:`_WKV5`, of which the keys and values alone are kept."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(k, v, log_decay, mask)
        with torch.cuda.device_of(k):
            return _states(_Launcher(k, log_decay, mask), k, v)[1]

    @staticmethod
    @first_order
    def backward(ctx: Any, d_contribution: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, mask = ctx.saved_tensors
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            states, _ = _states(launch, k, v)
            nothing = launch.empty(*states.shape).zero_()
            d_states, _ = launch.scan(nothing, d_contribution.contiguous(), reverse=True)
            # nothing was read
            r, d_out = torch.zeros_like(k), launch.empty(*k.shape).zero_()
            bonus = torch.zeros_like(log_decay)
            d_v = launch.values(r, k, d_out, bonus, d_states, torch.empty_like(v), transposed=True)
            _, d_k, d_log_decay, _ = launch.key_gradients(r, k, v, log_decay, bonus, states, d_states, d_out)
        return d_k, d_v, d_log_decay.sum((0, 1)), None


def _states(launch: _Launcher, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """States before every chunk [B, chunks, H, N, N] of a row that begins with nothing, and the one after the last."""
    outside = launch.empty(launch.B, launch.H, launch.N, launch.N).zero_()
    return launch.scan(launch.outer(k, v, from_start=False), outside, reverse=False)


def _prepare(log_decay: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    """A float32 decay and contiguous tensors; raises KernelError for what the kernels cannot do."""
    size = tokens[0].shape[-1]
    if size > MAX_HEAD_SIZE:
        raise KernelError(
            f'the triton kernel takes head sizes up to {MAX_HEAD_SIZE}, not {size}; use kernel="chunked"'
        )
    for x in tokens:
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise KernelError(
                f'the triton kernel takes bfloat16, float16 and float32, not {x.dtype}; use kernel="chunked"'
            )
    return log_decay.float().contiguous(), *(x.contiguous() for x in tokens)


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    handover: Handover | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, N] and contribution [B, H, N, N] (key index first), both float32.

    Arguments as in :func:`rwkv_rev.wkv.wkv5`; ``r, k, v`` in bfloat16, float16 or float32, N at most 128.
    """
    decay, r, k, v = _prepare(log_decay, r, k, v)
    return _WKV5.apply(r, k, v, decay, bonus.float().contiguous(), state.float().contiguous(), mask, handover)


def wkv5_contribution(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mask: Tensor | None = None,
    handover: Handover | None = None,
) -> Tensor:
    """The second result of :func:`wkv5` alone, the same to the bit."""
    decay, k, v = _prepare(log_decay, k, v)
    if handover is not None and not torch.is_grad_enabled():
        with torch.cuda.device_of(k):
            written = _states(_Launcher(k, decay, mask), k, v)
        handover.keep(written)
        return written[1]
    found: Tensor = _Contribution.apply(k, v, decay, mask)
    return found


def wkv5_pull(
    r: Tensor,
    d_out: Tensor,
    log_decay: Tensor,
    mask: Tensor | None = None,
    handover: Handover | None = None,
) -> Tensor:
    """The gradient by the state before the chunk, from that by the outputs alone: the backward pass's own launches."""
    given = d_out
    decay, r, d_out = _prepare(log_decay, r, d_out)
    with torch.cuda.device_of(r):
        launch = _Launcher(r, decay, mask)
        nothing = launch.empty(launch.B, launch.H, launch.N, launch.N).zero_()
        pulled = launch.scan(launch.outer(r, d_out, from_start=True), nothing, reverse=True)
    if handover is not None:
        handover.keep_pulled(given, pulled)
    return pulled[1]
