"""RWKV-5 recurrence in Triton: chunked, parallel in time, decay fixed in time per key channel.

    y_t = r_t (S_t + diag(u) k_t^T v_t),      S_{t+1} = diag(w) S_t + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch", section 4.1.) Chunks of 64 tokens are handled by matrix products, in
three launches:

1. each chunk's own update U_j = sum_s (w^{n-1-s} k_s)^T v_s;
2. a scan over chunks from zero, C_{j+1} = w^{n_j} C_j + U_j; the last C is the *contribution*, and the state
   before chunk j is S_j = C_j + w^{64 j} S_0;
3. outputs (w^t r_t) S_j + A v, with A_ts = sum_i r_ti k_si w_i^{t-1-s} for s < t, and r_t diag(u) k_t on the
   diagonal.

The backward pass mirrors them: G_j = sum_t (w^t r_t)^T dy_t, the same scan reversed, then dr, dk, dv.

A is stable for every decay, however small: the chunk is halved until w^{-block/2} is harmless, as often as the
head's strongest decay needs. Between two halves exponents are counted from their common border and are all >= 0,
within the smallest block from its middle. Weak decays need one matrix product, w = 1e-9 needs seven. The
gradient of log w weighs each product by the same local exponents, so nothing large cancels in it.

The states before every chunk (N / 64 float32 numbers per token and channel) are kept for the backward pass. All
sums are float32, each product in three tf32 parts (``PRECISION``); sums over rows and chunks go through buffers
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

from rwkv_rev.wkv.dispatch import KernelError

LEVELS = 6
CHUNK = 1 << LEVELS
PRECISION = "tf32x3"
OUTER_WARPS, OUTPUT_WARPS, GRADIENT_WARPS = 4, 4, 8
SCAN_BLOCK, SCAN_WARPS, SCAN_STAGES = 256, 2, 6
MAX_HEAD_SIZE = 128
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_LOG_DECAY = tl.constexpr(-1e5)  # below it w is zero in float32 anyway, and 0 * inf cannot happen
_MAX_EXPONENT = tl.constexpr(28.0)  # base 2; float32 rounds such an exponent by less than 1e-6


@triton.jit
def _program(H, chunks, TILES: tl.constexpr):
    """The launch's flat index as (head, value tile, chunk, row); heads are neighbours in memory."""
    program = tl.program_id(0)
    head = program % H
    program = program // H
    tile = program % TILES
    program = program // TILES
    return head, tile, program % chunks, program // chunks


@triton.jit
def _tokens(index, counts, row, chunk, T, BT: tl.constexpr, MASKED: tl.constexpr):
    """Where a chunk's tokens are in [B * T], which of them exist, and how many of those are valid."""
    t = chunk * BT + tl.arange(0, BT)
    exists = t < T
    total = T
    position = t
    if MASKED:
        total = tl.load(counts + row)
        position = tl.load(index + row.to(tl.int64) * T + t, mask=exists, other=0)
    count = tl.minimum((chunk + 1) * BT, total) - tl.minimum(chunk * BT, total)
    return row.to(tl.int64) * T + position, exists, count


@triton.jit
def _log2_decay(log_decay, head, channel, N: tl.constexpr):
    value = tl.load(log_decay + head * N + channel, mask=channel < N, other=0.0)
    return tl.maximum(value, _MIN_LOG_DECAY) * _LOG2_E


@triton.jit
def _load(x, token, valid, head, channel, H, N: tl.constexpr):
    """Rows of [B * T, H, N] in float32; rows that are not valid and channels beyond N are zero."""
    at = x + (token[:, None] * H + head) * N + channel[None, :]
    return tl.load(at, mask=valid[:, None] & (channel[None, :] < N), other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, token, exists, head, channel, H, N: tl.constexpr):
    at = x + (token[:, None] * H + head) * N + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=exists[:, None] & (channel[None, :] < N))


@triton.jit
def _matrix(x, slot, i, c, N: tl.constexpr):
    """Pointers into the [N, N] matrix number ``slot`` and the mask of what exists there."""
    at = x + slot * N * N + i[:, None] * N + c[None, :]
    return at, (i[:, None] < N) & (c[None, :] < N)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _halvings(log2_decay, LEVELS: tl.constexpr):
    """How often the chunk is halved before w^(block / 2) stays in range for the head's strongest decay."""
    strongest = tl.max(-log2_decay, 0)
    count = 0
    for level in tl.static_range(LEVELS):
        count += (strongest * (1 << (LEVELS - 1 - level)) > _MAX_EXPONENT).to(tl.int32)
    return count


@triton.jit
def _level(step, halvings, LEVELS: tl.constexpr):
    """One level of the halved chunk: exponents of r and of k, and the pairs (t, s) it covers."""
    t = tl.arange(0, 1 << LEVELS)
    bits = LEVELS - tl.minimum(step + 1, halvings)
    within = t & ((1 << bits) - 1)
    shift = tl.where(step == halvings, (1 << bits) >> 1, 0)
    r_exponent = (within - shift).to(tl.float32)
    k_exponent = ((1 << bits) - 1 - within - shift).to(tl.float32)
    block = (t >> bits)[:, None]
    other = (t >> bits)[None, :]
    neighbours = (block == other + 1) & (block % 2 == 1) & (step < halvings)
    same = (block == other) & (t[:, None] > t[None, :]) & (step == halvings)
    return r_exponent, k_exponent, neighbours | same


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _outer_kernel(
    keys, values, log_decay, index, counts, products, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    FROM_START: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """products[b, j, h] = sum_s (w^e keys_s)^T values_s, e counted to the chunk's end or from its start."""
    BT: tl.constexpr = 1 << LEVELS
    head, tile, chunk, row = _program(H, chunks, TILES)
    token, _exists, count = _tokens(index, counts, row, chunk, T, BT, MASKED)
    t = tl.arange(0, BT)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    valid = t < count
    log2_decay = _log2_decay(log_decay, head, i, N)
    exponent = t if FROM_START else tl.maximum(count - 1 - t, 0)
    key = _load(keys, token, valid, head, i, H, N) * tl.exp2(
        exponent.to(tl.float32)[:, None] * log2_decay[None, :]
    )
    value = _load(values, token, valid, head, c, H, N)
    at, inside = _matrix(products, (row.to(tl.int64) * chunks + chunk) * H + head, i, c, N)
    tl.store(at, _dot(tl.trans(key), value, PRECISION), mask=inside)


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
    log2_decay = tl.maximum(log2_decay, _MIN_LOG_DECAY) * _LOG2_E
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
        tl.store(states + here, total + tl.exp2(log2_decay * distance.to(tl.float32)) * injected, mask=inside)
        total = tl.fma(tl.exp2(log2_decay * (end - start).to(tl.float32)), total, product)
    tl.store(total_out + at, total, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _output_kernel(
    r, k, v, log_decay, bonus, states, index, counts, out, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = 1 << LEVELS
    head, tile, chunk, row = _program(H, chunks, TILES)
    token, exists, count = _tokens(index, counts, row, chunk, T, BT, MASKED)
    t = tl.arange(0, BT)
    i = tl.arange(0, BN)
    c = tile * BV + tl.arange(0, BV)
    valid = t < count
    log2_decay = _log2_decay(log_decay, head, i, N)
    u = tl.load(bonus + head * N + i, mask=i < N, other=0.0)
    receptance = _load(r, token, valid, head, i, H, N)
    key = _load(k, token, valid, head, i, H, N)
    value = _load(v, token, valid, head, c, H, N)
    at, inside = _matrix(states, (row.to(tl.int64) * chunks + chunk) * H + head, i, c, N)
    state = tl.load(at, mask=inside, other=0.0)

    y = _dot(receptance * tl.exp2(t.to(tl.float32)[:, None] * log2_decay[None, :]), state, PRECISION)
    y += tl.sum(receptance * key * u[None, :], 1)[:, None] * value
    halvings = _halvings(log2_decay, LEVELS)
    scores = tl.zeros([BT, BT], tl.float32)
    for step in range(0, halvings + 1):
        r_exponent, k_exponent, pairs = _level(step, halvings, LEVELS)
        left = receptance * tl.exp2(r_exponent[:, None] * log2_decay[None, :])
        right = key * tl.exp2(k_exponent[:, None] * log2_decay[None, :])
        scores += tl.where(pairs, _dot(left, tl.trans(right), PRECISION), 0.0)
    y += _dot(scores, value, PRECISION)
    _store(out, y, token, exists, head, c, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _gradient_kernel(
    r, k, v, log_decay, bonus, states, d_states, d_out, index, counts,
    d_r, d_k, d_v, d_log_decay, d_bonus, T, H, chunks,
    N: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything of one chunk, given the state before it and the gradient of the state after it."""
    BT: tl.constexpr = 1 << LEVELS
    head, _, chunk, row = _program(H, chunks, 1)
    token, exists, count = _tokens(index, counts, row, chunk, T, BT, MASKED)
    t = tl.arange(0, BT)
    i = tl.arange(0, BN)
    valid = t < count
    log2_decay = _log2_decay(log_decay, head, i, N)
    receptance = _load(r, token, valid, head, i, H, N)
    key = _load(k, token, valid, head, i, H, N)
    slot = (row.to(tl.int64) * chunks + chunk) * H + head
    to_end = tl.maximum(count - 1 - t, 0).to(tl.float32)
    from_start = t.to(tl.float32)
    halvings = _halvings(log2_decay, LEVELS)

    # d_scores, and the gradients through the states, summed over tiles of the value dimension
    d_scores = tl.zeros([BT, BT], tl.float32)
    d_receptance = tl.zeros([BT, BN], tl.float32)
    d_key = tl.zeros([BT, BN], tl.float32)
    d_diagonal = tl.zeros([BT], tl.float32)
    carried = tl.zeros([BN], tl.float32)
    for tile in tl.static_range(TILES):
        c = tile * BV + tl.arange(0, BV)
        value = _load(v, token, valid, head, c, H, N)
        d_y = _load(d_out, token, valid, head, c, H, N)
        at, inside = _matrix(states, slot, i, c, N)
        state = tl.load(at, mask=inside, other=0.0)
        at, inside = _matrix(d_states, slot, i, c, N)
        d_state = tl.load(at, mask=inside, other=0.0)
        d_diagonal += tl.sum(d_y * value, 1)
        carried += tl.sum(state * d_state, 1)
        d_scores += _dot(d_y, tl.trans(value), PRECISION)
        d_receptance += _dot(d_y, tl.trans(state), PRECISION)
        d_key += _dot(value, tl.trans(d_state), PRECISION)
    d_receptance *= tl.exp2(from_start[:, None] * log2_decay[None, :])
    d_key *= tl.exp2(to_end[:, None] * log2_decay[None, :])
    weighted = from_start[:, None] * (receptance * d_receptance) + to_end[:, None] * (key * d_key)
    whole = count.to(tl.float32)
    carried *= whole * tl.exp2(log2_decay * whole)

    scores = tl.zeros([BT, BT], tl.float32)
    for step in range(0, halvings + 1):
        r_exponent, k_exponent, pairs = _level(step, halvings, LEVELS)
        r_factor = tl.exp2(r_exponent[:, None] * log2_decay[None, :])
        k_factor = tl.exp2(k_exponent[:, None] * log2_decay[None, :])
        left = receptance * r_factor
        right = key * k_factor
        scores += tl.where(pairs, _dot(left, tl.trans(right), PRECISION), 0.0)
        d_pairs = tl.where(pairs, d_scores, 0.0)
        d_left = _dot(d_pairs, right, PRECISION) * r_factor
        d_right = _dot(tl.trans(d_pairs), left, PRECISION) * k_factor
        d_receptance += d_left
        d_key += d_right
        weighted += r_exponent[:, None] * (receptance * d_left) + k_exponent[:, None] * (key * d_right)

    u = tl.load(bonus + head * N + i, mask=i < N, other=0.0)
    product = d_diagonal[:, None] * receptance * key
    partial = slot * N + i
    tl.store(d_bonus + partial, tl.sum(product, 0), mask=i < N)
    tl.store(d_log_decay + partial, tl.sum(weighted, 0) + carried, mask=i < N)
    _store(d_r, d_receptance + d_diagonal[:, None] * u[None, :] * key, token, exists, head, i, H, N)
    _store(d_k, d_key + d_diagonal[:, None] * u[None, :] * receptance, token, exists, head, i, H, N)

    diagonal = tl.sum(receptance * key * u[None, :], 1)
    decayed = key * tl.exp2(to_end[:, None] * log2_decay[None, :])
    for tile in tl.static_range(TILES):
        c = tile * BV + tl.arange(0, BV)
        d_y = _load(d_out, token, valid, head, c, H, N)
        at, inside = _matrix(d_states, slot, i, c, N)
        d_state = tl.load(at, mask=inside, other=0.0)
        d_value = _dot(tl.trans(scores), d_y, PRECISION) + _dot(decayed, d_state, PRECISION)
        _store(d_v, d_value + diagonal[:, None] * d_y, token, exists, head, c, H, N)


class _Launcher:
    """Shapes, block sizes and launches shared by the two directions. One configuration per head size."""

    def __init__(self, like: Tensor, log_decay: Tensor, mask: Tensor | None) -> None:
        self.B, self.T, self.H, self.N = like.shape
        self.chunks = triton.cdiv(self.T, CHUNK)
        self.log_decay = log_decay
        self.like = like
        block = max(16, triton.next_power_of_2(self.N))
        tile = min(block, 64)
        self.tiles = triton.cdiv(self.N, tile)
        self.blocks = {"N": self.N, "LEVELS": LEVELS, "BN": block, "BV": tile, "TILES": self.tiles}
        self.options = {"MASKED": mask is not None, "PRECISION": PRECISION}
        self.index = self.counts = None
        if mask is not None:
            # a permutation of each row's tokens, the valid ones first and in order
            self.index = torch.argsort(~mask, dim=1, stable=True).to(torch.int32)
            self.counts = mask.sum(1, dtype=torch.int32)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def outer(self, keys: Tensor, values: Tensor, *, from_start: bool) -> Tensor:
        products = self.empty(self.B, self.chunks, self.H, self.N, self.N)
        _outer_kernel[(self.B * self.chunks * self.H * self.tiles,)](
            keys, values, self.log_decay, self.index, self.counts, products, self.T, self.H, self.chunks,
            **self.blocks, **self.options, FROM_START=from_start, num_warps=OUTER_WARPS, num_stages=1,
        )  # fmt: skip
        return products

    def scan(self, products: Tensor, outside: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """(states [B, chunks, H, N, N], in the memory of ``products``; total [B, H, N, N])."""
        total = self.empty(self.B, self.H, self.N, self.N)
        block = min(SCAN_BLOCK, triton.next_power_of_2(self.N * self.N))
        blocks = triton.cdiv(self.N * self.N, block)
        _scan_kernel[(self.B * self.H * blocks,)](
            products, outside, self.log_decay, self.counts, products, total,
            self.T, self.H, self.chunks, blocks, N=self.N, LEVELS=LEVELS, BLOCK=block,
            REVERSE=reverse, MASKED=self.counts is not None, STAGES=SCAN_STAGES, num_warps=SCAN_WARPS,
        )  # fmt: skip
        return products, total


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
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            states, contribution = launch.scan(launch.outer(k, v, from_start=False), state, reverse=False)
            out = launch.empty(*k.shape)
            _output_kernel[(launch.B * launch.chunks * launch.H * launch.tiles,)](
                r, k, v, log_decay, bonus, states, launch.index, launch.counts, out,
                launch.T, launch.H, launch.chunks,
                **launch.blocks, **launch.options, num_warps=OUTPUT_WARPS, num_stages=1,
            )  # fmt: skip
        ctx.save_for_backward(r, k, v, log_decay, bonus, state, states, mask)
        return out, contribution

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_contribution: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, log_decay, bonus, state, states, mask = ctx.saved_tensors
        d_out, d_contribution = d_out.contiguous(), d_contribution.contiguous()
        with torch.cuda.device_of(k):
            launch = _Launcher(k, log_decay, mask)
            d_states, d_state = launch.scan(
                launch.outer(r, d_out, from_start=True), d_contribution, reverse=True
            )
            d_r, d_k, d_v = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v)
            d_log_decay = launch.empty(launch.B, launch.chunks, launch.H, launch.N)
            d_bonus = torch.empty_like(d_log_decay)
            _gradient_kernel[(launch.B * launch.chunks * launch.H,)](
                r, k, v, log_decay, bonus, states, d_states, d_out, launch.index, launch.counts,
                d_r, d_k, d_v, d_log_decay, d_bonus, launch.T, launch.H, launch.chunks,
                **launch.blocks, **launch.options, num_warps=GRADIENT_WARPS, num_stages=1,
            )  # fmt: skip
            # S_j holds w^{64 j} S_0, which the contribution does not: take that path out again
            count = launch.T if mask is None else mask.sum(1)[:, None, None]
            through_state = (
                torch.exp(count * log_decay) * count * (state * d_contribution).sum(-1)
            )  # [B, H, N]
            d_log_decay = d_log_decay.sum((0, 1)) - through_state.sum(0)
            d_bonus = d_bonus.sum((0, 1))
        return d_r, d_k, d_v, d_log_decay, d_bonus, d_state, None


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
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, N] and contribution [B, H, N, N] (key index first), both float32.

    Arguments as in :func:`rwkv_rev.wkv.wkv5`; ``r, k, v`` in bfloat16, float16 or float32, N at most 128.
    """
    decay, r, k, v = _prepare(log_decay, r, k, v)
    return _WKV5.apply(r, k, v, decay, bonus.float().contiguous(), state.float().contiguous(), mask)


def wkv5_contribution(k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None) -> Tensor:
    """The second result of :func:`wkv5` alone, the same to the bit."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, log_decay)):
        nothing = k.new_zeros(k.shape[0], *log_decay.shape, k.shape[-1], dtype=torch.float32)
        return wkv5(torch.zeros_like(k), k, v, log_decay, torch.zeros_like(log_decay), nothing, mask)[1]
    decay, k, v = _prepare(log_decay, k, v)
    with torch.cuda.device_of(k):
        launch = _Launcher(k, decay, mask)
        outside = launch.empty(launch.B, launch.H, launch.N, launch.N).zero_()
        return launch.scan(launch.outer(k, v, from_start=False), outside, reverse=False)[1]
