"""RWKV-4 recurrence in Triton: segments of tokens in parallel, one thread per channel inside a segment.

    y_t = (A_t + e^{u+k_t} v_t) / (B_t + e^{u+k_t}),    A_{t+1} = w A_t + e^{k_t} v_t,    B_{t+1} = w B_t + e^{k_t}

(Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", eq. 14 to 18.) A and B are carried as
(a, b, m) with A = a e^m, B = b e^m and m the running maximum of the exponents, so nothing overflows. Three
launches: each segment alone from the empty state; a scan over segments, which gives the state before each; the
outputs.

Backward, with g_t = dy_t / (B_t + e^{u+k_t}), the gradients of A_t and B_t and their derivatives by log w run
from the end to the start:

    GA_t = g_t + w GA_{t+1},          PA_t = w (PA_{t+1} + GA_{t+1}),
    GB_t = -g_t y_t + w GB_{t+1},     PB_t = w (PB_{t+1} + GB_{t+1}),
    dk_t = e^{u+k_t} g_t (v_t - y_t) + e^{k_t} (v_t GA_{t+1} + GB_{t+1}),
    dv_t = e^{u+k_t} g_t + e^{k_t} GA_{t+1},
    du = sum_t e^{u+k_t} g_t (v_t - y_t),
    dlog w = sum_t e^{k_t} (v_t PA_{t+1} + PB_{t+1}) + A_0 PA_0 + B_0 PB_0,

again scaled by a running exponent, again three launches. The forward pass keeps y and the log of its
denominator, so nothing of it is computed again.

Memory traffic, in arrays of k's size: 6 forward, 10 backward. Sums over tokens go to one partial sum per segment,
added in a fixed order: results are the same to the bit. float64 is refused.
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

SEGMENT = 128
BLOCK = 256
WARPS = 2
STAGES = 4
_EMPTY = tl.constexpr(-1e38)  # exponent of the empty state
_MIN_LOG_DECAY = tl.constexpr(-1e5)  # below it w is zero in float32 anyway, and 0 * inf cannot happen


@triton.jit
def _program(D, segments, BLOCK: tl.constexpr):
    """The launch's flat index as (channels, which exist, segment, row); channels vary fastest."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    program = program // blocks
    return channel, channel < D, program % segments, (program // segments).to(tl.int64)


@triton.jit
def _log_decay(log_decay, channel, exists):
    value = tl.load(log_decay + channel, mask=exists, other=0.0)
    return tl.where(value < _MIN_LOG_DECAY, _MIN_LOG_DECAY, value)  # tl.maximum passes over NaN


@triton.jit
def _valid(mask, position, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(mask + position) != 0
    else:
        return True


@triton.jit
def _merge(decayed, other):
    """The larger of two exponents, and what each side is then multiplied with."""
    largest = tl.maximum(decayed, other)
    return largest, tl.exp(decayed - largest), tl.exp(other - largest)


@triton.jit
def _step(m, age, decay, other, valid):
    """One token of a running maximum m + age * decay: the new m and age, and the factors of old and new values.

    Adding the decay to m at every token would round m at every token, always the same way.
    """
    decayed = m + (age + 1.0) * decay
    _, old, new = _merge(decayed, other)
    replaced = valid & (other > decayed)
    m = tl.where(replaced, other, m)
    age = tl.where(replaced, 0.0, tl.where(valid, age + 1.0, age))
    return m, age, tl.where(valid, old, 1.0), tl.where(valid, new, 0.0)


@triton.jit(do_not_specialize=["T", "segments"])
def _segment_kernel(
    k, v, log_decay, mask, local, T, D, segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """local [B, segments, 3, D]: (a, b, m) of each segment alone."""
    channel, exists, segment, row = _program(D, segments, BLOCK)
    decay = _log_decay(log_decay, channel, exists)
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    m = tl.full([BLOCK], _EMPTY, tl.float32)
    age = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, T), num_stages=STAGES):
        at = (row * T + t) * D + channel
        key = tl.load(k + at, mask=exists, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=exists, other=0.0).to(tl.float32)
        valid = _valid(mask, row * T + t, MASKED)
        m, age, old, new = _step(m, age, decay, key, valid)
        a = old * a + new * tl.where(valid, value, 0.0)
        b = old * b + new
    slot = local + (row * segments + segment) * 3 * D + channel
    tl.store(slot, a, mask=exists)
    tl.store(slot + D, b, mask=exists)
    tl.store(slot + 2 * D, m + age * decay, mask=exists)


@triton.jit(do_not_specialize=["T", "segments"])
def _scan_kernel(
    local, log_decay, counts, state, states, final, T, D, segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """states [B, segments, 3, D]: (a, b, m) before each segment; final [B, 3, D]."""
    channel, exists, _, row = _program(D, 1, BLOCK)
    decay = _log_decay(log_decay, channel, exists)
    at = row * 3 * D + channel
    a = tl.load(state + at, mask=exists, other=0.0)
    b = tl.load(state + at + D, mask=exists, other=0.0)
    m = tl.load(state + at + 2 * D, mask=exists, other=0.0)
    for segment in tl.range(0, segments, num_stages=STAGES):
        slot = (row * segments + segment) * 3 * D + channel
        local_a = tl.load(local + slot, mask=exists, other=0.0)
        local_b = tl.load(local + slot + D, mask=exists, other=0.0)
        local_m = tl.load(local + slot + 2 * D, mask=exists, other=0.0)
        steps = tl.minimum(SEGMENT, T - segment * SEGMENT)
        if MASKED:
            steps = tl.load(counts + row * segments + segment)
        tl.store(states + slot, a, mask=exists)
        tl.store(states + slot + D, b, mask=exists)
        tl.store(states + slot + 2 * D, m, mask=exists)
        m, old, new = _merge(m + steps.to(tl.float32) * decay, local_m)
        a = old * a + new * local_a
        b = old * b + new * local_b
    tl.store(final + at, a, mask=exists)
    tl.store(final + at + D, b, mask=exists)
    tl.store(final + at + 2 * D, m, mask=exists)


@triton.jit(do_not_specialize=["T", "segments"])
def _output_kernel(
    k, v, log_decay, bonus, mask, states, out, log_denominator, T, D, segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    channel, exists, segment, row = _program(D, segments, BLOCK)
    decay = _log_decay(log_decay, channel, exists)
    u = tl.load(bonus + channel, mask=exists, other=0.0)
    before = states + (row * segments + segment) * 3 * D + channel
    a = tl.load(before, mask=exists, other=0.0)
    b = tl.load(before + D, mask=exists, other=0.0)
    m = tl.load(before + 2 * D, mask=exists, other=0.0)
    age = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, T), num_stages=STAGES):
        at = (row * T + t) * D + channel
        key = tl.load(k + at, mask=exists, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=exists, other=0.0).to(tl.float32)
        valid = _valid(mask, row * T + t, MASKED)
        value = tl.where(valid, value, 0.0)
        exponent, old, new = _merge(m + age * decay, u + key)
        denominator = old * b + new
        y = (old * a + new * value) / denominator
        tl.store(out + at, tl.where(valid, y, 0.0), mask=exists)
        if SAVE:
            tl.store(log_denominator + at, exponent + tl.log(denominator), mask=exists)
        m, age, old, new = _step(m, age, decay, key, valid)
        a = old * a + new * value
        b = old * b + new


@triton.jit(do_not_specialize=["T", "segments"])
def _segment_gradient_kernel(
    log_decay, mask, y, log_denominator, d_out, local, T, D, segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """local [B, segments, 5, D]: (GA, GB, PA, PB, their exponent) at each segment's start, it alone."""
    channel, exists, segment, row = _program(D, segments, BLOCK)
    decay = _log_decay(log_decay, channel, exists)
    ga = tl.zeros([BLOCK], tl.float32)
    gb = tl.zeros([BLOCK], tl.float32)
    pa = tl.zeros([BLOCK], tl.float32)
    pb = tl.zeros([BLOCK], tl.float32)
    m = tl.full([BLOCK], _EMPTY, tl.float32)
    age = tl.zeros([BLOCK], tl.float32)
    start = segment * SEGMENT
    steps = tl.minimum(SEGMENT, T - start)
    for step in tl.range(0, steps, num_stages=STAGES):
        t = start + steps - 1 - step
        at = (row * T + t) * D + channel
        out = tl.load(y + at, mask=exists, other=0.0)
        log_q = tl.load(log_denominator + at, mask=exists, other=0.0)
        d_y = tl.load(d_out + at, mask=exists, other=0.0)
        valid = _valid(mask, row * T + t, MASKED)
        d_y = tl.where(valid, d_y, 0.0)
        m, age, old, new = _step(m, age, decay, -log_q, valid)
        pa = old * (pa + tl.where(valid, ga, 0.0))
        pb = old * (pb + tl.where(valid, gb, 0.0))
        ga = old * ga + new * d_y
        gb = old * gb - new * d_y * out
    slot = local + (row * segments + segment) * 5 * D + channel
    tl.store(slot, ga, mask=exists)
    tl.store(slot + D, gb, mask=exists)
    tl.store(slot + 2 * D, pa, mask=exists)
    tl.store(slot + 3 * D, pb, mask=exists)
    tl.store(slot + 4 * D, m + age * decay, mask=exists)


@triton.jit(do_not_specialize=["T", "segments"])
def _scan_gradient_kernel(
    local, log_decay, counts, state, final, d_final, after, d_state, d_log_decay, T, D, segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """after [B, segments, 5, D]: the same five at each segment's end, from all that follows."""
    channel, exists, _, row = _program(D, 1, BLOCK)
    decay = _log_decay(log_decay, channel, exists)
    at = row * 3 * D + channel
    ga = tl.load(d_final + at, mask=exists, other=0.0)
    gb = tl.load(d_final + at + D, mask=exists, other=0.0)
    pa = tl.zeros([BLOCK], tl.float32)
    pb = tl.zeros([BLOCK], tl.float32)
    m = -tl.load(final + at + 2 * D, mask=exists, other=0.0)
    for step in tl.range(0, segments, num_stages=STAGES):
        segment = segments - 1 - step
        slot = (row * segments + segment) * 5 * D + channel
        local_ga = tl.load(local + slot, mask=exists, other=0.0)
        local_gb = tl.load(local + slot + D, mask=exists, other=0.0)
        local_pa = tl.load(local + slot + 2 * D, mask=exists, other=0.0)
        local_pb = tl.load(local + slot + 3 * D, mask=exists, other=0.0)
        local_m = tl.load(local + slot + 4 * D, mask=exists, other=0.0)
        steps = tl.minimum(SEGMENT, T - segment * SEGMENT)
        if MASKED:
            steps = tl.load(counts + row * segments + segment)
        tl.store(after + slot, ga, mask=exists)
        tl.store(after + slot + D, gb, mask=exists)
        tl.store(after + slot + 2 * D, pa, mask=exists)
        tl.store(after + slot + 3 * D, pb, mask=exists)
        tl.store(after + slot + 4 * D, m, mask=exists)
        steps = steps.to(tl.float32)
        m, old, new = _merge(m + steps * decay, local_m)
        pa = old * (pa + steps * ga) + new * local_pa
        pb = old * (pb + steps * gb) + new * local_pb
        ga = old * ga + new * local_ga
        gb = old * gb + new * local_gb
    a = tl.load(state + at, mask=exists, other=0.0)
    b = tl.load(state + at + D, mask=exists, other=0.0)
    scale = tl.exp(m + tl.load(state + at + 2 * D, mask=exists, other=0.0))
    tl.store(d_state + at, scale * ga, mask=exists)
    tl.store(d_state + at + D, scale * gb, mask=exists)
    tl.store(d_state + at + 2 * D, tl.zeros([BLOCK], tl.float32), mask=exists)
    tl.store(d_log_decay + row * D + channel, scale * (a * pa + b * pb), mask=exists)


@triton.jit(do_not_specialize=["T", "segments"])
def _gradient_kernel(
    k, v, log_decay, bonus, mask, y, log_denominator, d_out, after,
    d_k, d_v, d_log_decay, d_bonus, T, D, segments,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    channel, exists, segment, row = _program(D, segments, BLOCK)
    decay = _log_decay(log_decay, channel, exists)
    u = tl.load(bonus + channel, mask=exists, other=0.0)
    following = after + (row * segments + segment) * 5 * D + channel
    ga = tl.load(following, mask=exists, other=0.0)
    gb = tl.load(following + D, mask=exists, other=0.0)
    pa = tl.load(following + 2 * D, mask=exists, other=0.0)
    pb = tl.load(following + 3 * D, mask=exists, other=0.0)
    m = tl.load(following + 4 * D, mask=exists, other=0.0)
    age = tl.zeros([BLOCK], tl.float32)
    d_u = tl.zeros([BLOCK], tl.float32)
    d_w = tl.zeros([BLOCK], tl.float32)
    start = segment * SEGMENT
    steps = tl.minimum(SEGMENT, T - start)
    for step in tl.range(0, steps, num_stages=STAGES):
        t = start + steps - 1 - step
        at = (row * T + t) * D + channel
        key = tl.load(k + at, mask=exists, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=exists, other=0.0).to(tl.float32)
        out = tl.load(y + at, mask=exists, other=0.0)
        log_q = tl.load(log_denominator + at, mask=exists, other=0.0)
        d_y = tl.load(d_out + at, mask=exists, other=0.0)
        valid = _valid(mask, row * T + t, MASKED)
        value = tl.where(valid, value, 0.0)
        d_y = tl.where(valid, d_y, 0.0)
        later = tl.where(valid, tl.exp(key + m + age * decay), 0.0)
        direct = tl.where(valid, tl.exp(u + key - log_q), 0.0) * d_y
        shared = direct * (value - out)
        tl.store(d_k + at, (shared + later * (value * ga + gb)).to(d_k.dtype.element_ty), mask=exists)
        tl.store(d_v + at, (direct + later * ga).to(d_v.dtype.element_ty), mask=exists)
        d_u += shared
        d_w += later * (value * pa + pb)
        m, age, old, new = _step(m, age, decay, -log_q, valid)
        pa = old * (pa + tl.where(valid, ga, 0.0))
        pb = old * (pb + tl.where(valid, gb, 0.0))
        ga = old * ga + new * d_y
        gb = old * gb - new * d_y * out
    partial = (row * segments + segment) * D + channel
    tl.store(d_bonus + partial, d_u, mask=exists)
    tl.store(d_log_decay + partial, d_w, mask=exists)


class _Launcher:
    """Shapes and launches shared by the two directions."""

    def __init__(self, like: Tensor, mask: Tensor | None) -> None:
        self.B, self.T, self.D = like.shape
        self.like = like
        self.segments = triton.cdiv(self.T, SEGMENT)
        self.mask = self.counts = None
        if mask is not None:
            self.mask = mask.contiguous().view(torch.uint8)
            padded = torch.nn.functional.pad(self.mask, (0, self.segments * SEGMENT - self.T))
            self.counts = padded.view(self.B, self.segments, SEGMENT).sum(-1, dtype=torch.int32)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def run(self, kernel: Any, *tensors: Tensor | None, **options: Any) -> None:
        """One program per segment and block of channels; the scans have one for all segments of a row."""
        alone = kernel in (_scan_kernel, _scan_gradient_kernel)
        block, warps, stages = (64, 2, 8) if alone else (BLOCK, WARPS, STAGES)
        grid = (triton.cdiv(self.D, block) * self.B * (1 if alone else self.segments),)
        kernel[grid](
            *tensors, self.T, self.D, self.segments, **options,
            SEGMENT=SEGMENT, BLOCK=block, MASKED=self.mask is not None, STAGES=stages, num_warps=warps,
        )  # fmt: skip


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor,
        state: Tensor,
        mask: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(k):
            launch = _Launcher(k, mask)
            local = launch.empty(launch.B, launch.segments, 3, launch.D)
            out, final = launch.empty(*k.shape), torch.empty_like(state)
            log_denominator = launch.empty(*k.shape) if save else None
            launch.run(_segment_kernel, k, v, log_decay, launch.mask, local)
            launch.run(_scan_kernel, local, log_decay, launch.counts, state, local, final)
            launch.run(
                _output_kernel, k, v, log_decay, bonus, launch.mask, local, out, log_denominator, SAVE=save
            )
        ctx.save_for_backward(k, v, log_decay, bonus, state, mask, out, final, log_denominator)
        return out, final

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, bonus, state, mask, out, final, log_denominator = ctx.saved_tensors
        d_out, d_final = d_out.contiguous(), d_final.contiguous()
        with torch.cuda.device_of(k):
            launch = _Launcher(k, mask)
            local = launch.empty(launch.B, launch.segments, 5, launch.D)
            d_k, d_v, d_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(state)
            d_bonus = launch.empty(launch.B, launch.segments, launch.D)
            d_log_decay = launch.empty(launch.B, launch.segments, launch.D)
            through_state = launch.empty(launch.B, launch.D)
            launch.run(_segment_gradient_kernel, log_decay, launch.mask, out, log_denominator, d_out, local)
            launch.run(
                _scan_gradient_kernel, local, log_decay, launch.counts, state, final, d_final, local, d_state,
                through_state,
            )  # fmt: skip
            launch.run(
                _gradient_kernel, k, v, log_decay, bonus, launch.mask, out, log_denominator, d_out, local,
                d_k, d_v, d_log_decay, d_bonus,
            )  # fmt: skip
            d_log_decay = d_log_decay.sum((0, 1)) + through_state.sum(0)
            d_bonus = d_bonus.sum((0, 1))
        return d_k, d_v, d_log_decay, d_bonus, d_state, None, None


def wkv4(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, D] and the state [B, 3, D] after the tokens, both float32.

    Arguments as in :func:`rwkv_rev.wkv.wkv4`; ``k, v`` in bfloat16, float16 or float32.
    """
    for x in (k, v):
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise KernelError(
                f'the triton kernel takes bfloat16, float16 and float32, not {x.dtype}; use kernel="chunked"'
            )
    inputs = (k, v, log_decay.float(), bonus.float(), state.float())
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _WKV4.apply(*(x.contiguous() for x in inputs), mask, save)
