"""A decayed state and what a chunk adds to it, on a CUDA device: one Triton launch each way instead of eleven.

    S' = diag(w)^n S + U,      d log w = n w^n sum_v S dS'

with n valid tokens in the row and the decay on the key index (Peng et al. 2024, "Eagle and Finch", section 4.1). One
program for each row and head; float32.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order

_MIN_LOG_DECAY = tl.constexpr(-1e5)  # below it w is zero in float32 anyway, and 0 * inf cannot happen


@triton.jit
def _count(counts, row, T, MASKED: tl.constexpr):
    count = T
    if MASKED:
        count = tl.load(counts + row)
    return count.to(tl.float32)


@triton.jit
def _tile(N: tl.constexpr, BN: tl.constexpr):
    """Where a head's elements are, which of them exist, and their keys."""
    i = tl.arange(0, BN)
    return i[:, None] * N + i[None, :], (i[:, None] < N) & (i[None, :] < N), i


@triton.jit
def _power(log_decay, head, i, count, N: tl.constexpr):
    """w^n, [BN]."""
    value = tl.load(log_decay + head * N + i, mask=i < N, other=0.0)
    return tl.exp(tl.where(value < _MIN_LOG_DECAY, _MIN_LOG_DECAY, value) * count)


@triton.jit(do_not_specialize=["T", "H"])
def _forward_kernel(
    state, contribution, log_decay, counts, out, T, H, N: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr
):
    program = tl.program_id(0)
    place, inside, i = _tile(N, BN)
    at = program.to(tl.int64) * N * N + place
    power = _power(log_decay, program % H, i, _count(counts, program // H, T, MASKED), N)
    before = tl.load(state + at, mask=inside, other=0.0)
    added = tl.load(contribution + at, mask=inside, other=0.0)
    tl.store(out + at, power[:, None] * before + added, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "stride"])
def _backward_kernel(
    state, gradient, log_decay, counts, d_state, d_log_decay, T, H, stride,
    N: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TAKE_OUT: tl.constexpr,
):  # fmt: skip
    """With ``TAKE_OUT`` the gradient by log w is subtracted from what is there, and none by the state is made."""
    program = tl.program_id(0)
    row, head = program // H, program % H
    place, inside, i = _tile(N, BN)
    at = program.to(tl.int64) * N * N + place
    count = _count(counts, row, T, MASKED)
    power = _power(log_decay, head, i, count, N)
    arriving = tl.load(gradient + at, mask=inside, other=0.0)
    product = tl.load(state + at, mask=inside, other=0.0) * arriving
    found = power * count * tl.sum(product, 1)
    partial = d_log_decay + row.to(tl.int64) * stride + head * N + i
    if TAKE_OUT:
        tl.store(partial, tl.load(partial, mask=i < N, other=0.0) - found, mask=i < N)
    else:
        tl.store(partial, found, mask=i < N)
        tl.store(d_state + at, power[:, None] * arriving, mask=inside)


class _Decayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        contribution: Tensor,
        log_decay: Tensor,
        tokens: int,
        counts: Tensor | None,
    ) -> Tensor:
        batch, heads, size, _ = state.shape
        out = torch.empty_like(state)
        with torch.cuda.device_of(state):
            _forward_kernel[(batch * heads,)](
                state, contribution, log_decay, counts, out, tokens, heads,
                N=size, BN=triton.next_power_of_2(size), MASKED=counts is not None, num_warps=_warps(size),
            )  # fmt: skip
        ctx.save_for_backward(state, log_decay, counts)
        ctx.tokens = tokens
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        state, log_decay, counts = ctx.saved_tensors
        batch, heads, size, _ = state.shape
        gradient = gradient.contiguous()
        d_state = torch.empty_like(state)
        d_log_decay = torch.empty(batch, heads, size, dtype=torch.float32, device=state.device)
        _launch_backward(state, gradient, log_decay, counts, d_state, d_log_decay, ctx.tokens, take_out=False)
        return d_state, gradient, d_log_decay[0] if batch == 1 else d_log_decay.sum(0), None, None


def _launch_backward(
    state: Tensor,
    gradient: Tensor,
    log_decay: Tensor,
    counts: Tensor | None,
    d_state: Tensor,
    d_log_decay: Tensor,
    tokens: int,
    *,
    take_out: bool,
) -> None:
    batch, heads, size, _ = state.shape
    with torch.cuda.device_of(state):
        _backward_kernel[(batch * heads,)](
            state, gradient, log_decay, counts, d_state, d_log_decay, tokens, heads, d_log_decay.stride(0),
            N=size, BN=triton.next_power_of_2(size), MASKED=counts is not None, TAKE_OUT=take_out,
            num_warps=_warps(size),
        )  # fmt: skip


def decayed(
    state: Tensor, contribution: Tensor, log_decay: Tensor, tokens: int, counts: Tensor | None
) -> Tensor:
    """As :func:`rwkv_rev.wkv.decayed`, in float32."""
    state, contribution, log_decay = (x.float().contiguous() for x in (state, contribution, log_decay))
    return _Decayed.apply(state, contribution, log_decay, tokens, counts)


def take_out(
    state: Tensor,
    gradient: Tensor,
    log_decay: Tensor,
    counts: Tensor | None,
    tokens: int,
    d_log_decay: Tensor,
) -> None:
    """Subtract from d_log_decay [B, ..., H, N] what :func:`decayed` would add for the gradient by its result.

    It is subtracted from index 0 of what lies between.
    """
    _launch_backward(state, gradient, log_decay, counts, state, d_log_decay, tokens, take_out=True)


def _warps(size: int) -> int:
    return 4 if size <= 64 else 8
