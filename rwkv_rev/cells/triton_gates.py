"""The elementwise ends of both cells on a CUDA device: one Triton launch each way, arithmetic in float32.

The formulas of :mod:`rwkv_rev.cells.gates`, rounded once at the end. Sums over tokens are made block by block and
then over the blocks, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order

TOKENS = 16
STEPS = 4
"""Blocks of tokens per program of the norm's backward pass; each program leaves one partial sum."""
BLOCK = 1024


@triton.jit
def _normalized(y, at, here, weight, bias, channel, inside, eps, N: tl.constexpr):
    """(n, rstd, n * weight + bias) of [BT, BN] values, a head per row."""
    value = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    centred = tl.where(here, value - (tl.sum(value, 1) / N)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + eps)
    n = centred * rstd[:, None]
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    return n, rstd, w, n * w + b


@triton.jit
def _norm_kernel(
    y, weight, bias, gate, out, tokens, H, eps,
    N: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i = tl.arange(0, BN)
    here = (token < tokens)[:, None] & (i < N)[None, :]
    at = (token * H + head)[:, None] * N + i[None, :]
    _, _, _, value = _normalized(y, at, here, weight, bias, head * N + i, i < N, eps, N)
    if GATED:
        g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
        value *= g * tl.sigmoid(g)
    tl.store(out + at, value, mask=here)


@triton.jit
def _norm_backward_kernel(
    y, weight, bias, gate, d_out, d_y, d_gate, d_weight, d_bias, tokens, H, eps,
    N: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    i = tl.arange(0, BN)
    total_weight = tl.zeros((BT, BN), tl.float32)
    total_bias = tl.zeros((BT, BN), tl.float32)
    for step in range(STEPS):
        token = (tl.program_id(0).to(tl.int64) * STEPS + step) * BT + tl.arange(0, BT)
        here = (token < tokens)[:, None] & (i < N)[None, :]
        at = (token * H + head)[:, None] * N + i[None, :]
        n, rstd, w, value = _normalized(y, at, here, weight, bias, head * N + i, i < N, eps, N)
        d = tl.load(d_out + at, mask=here, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
            s = tl.sigmoid(g)
            tl.store(d_gate + at, d * value * s * (1.0 + g * (1.0 - s)), mask=here)
            d *= g * s
        total_weight += d * n
        total_bias += d
        d *= w
        along = (tl.sum(d * n, 1) / N)[:, None]
        tl.store(d_y + at, rstd[:, None] * (d - (tl.sum(d, 1) / N)[:, None] - n * along), mask=here)
    partial = (tl.program_id(0).to(tl.int64) * H + head) * N + i
    tl.store(d_weight + partial, tl.sum(total_weight, 0), mask=i < N)
    tl.store(d_bias + partial, tl.sum(total_bias, 0), mask=i < N)


@triton.jit
def _rectified(value):
    return tl.where(value < 0.0, 0.0, value)  # tl.maximum passes over NaN


@triton.jit
def _squared_relu_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = _rectified(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32))
    tl.store(out + at, value * value, mask=at < size)


@triton.jit
def _squared_relu_backward_kernel(x, d_out, d_x, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = _rectified(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32))
    d = tl.load(d_out + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(d_x + at, 2.0 * value * d, mask=at < size)


@triton.jit
def _sigmoid_product_kernel(gate, x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sigmoid(tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32))
    tl.store(out + at, s * tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), mask=at < size)


@triton.jit
def _sigmoid_product_backward_kernel(gate, x, d_out, d_gate, d_x, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sigmoid(tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32))
    d = tl.load(d_out + at, mask=at < size, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(d_x + at, d * s, mask=at < size)
    tl.store(d_gate + at, d * value * s * (1.0 - s), mask=at < size)


class _GatedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        batch, length, heads, size = y.shape
        tokens = batch * length
        out = torch.empty(batch, length, heads * size, dtype=dtype, device=y.device)
        with torch.cuda.device_of(y):
            _norm_kernel[(triton.cdiv(tokens, TOKENS), heads)](
                y, weight, bias, gate, out, tokens, heads, eps,
                N=size, BN=triton.next_power_of_2(size), BT=TOKENS, GATED=gate is not None, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(y, weight, bias, gate)
        ctx.eps = eps
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, gate = ctx.saved_tensors
        batch, length, heads, size = y.shape
        tokens = batch * length
        blocks = triton.cdiv(tokens, TOKENS * STEPS)
        d_y = torch.empty_like(y)
        d_gate = None if gate is None else torch.empty_like(gate)
        partial = torch.empty(2, blocks, heads * size, dtype=torch.float32, device=y.device)
        with torch.cuda.device_of(y):
            _norm_backward_kernel[(blocks, heads)](
                y, weight, bias, gate, d_out.contiguous(), d_y, d_gate, partial[0], partial[1],
                tokens, heads, ctx.eps, N=size, BN=triton.next_power_of_2(size), BT=TOKENS, STEPS=STEPS,
                GATED=gate is not None, num_warps=4,
            )  # fmt: skip
        d_weight, d_bias = partial.sum(1).unbind(0)
        return d_y, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, d_gate, None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _squared_relu_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _squared_relu_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, d_out.contiguous(), d_x, x.numel(), BLOCK=BLOCK
            )
        return d_x


class _SigmoidProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        with torch.cuda.device_of(x):
            _sigmoid_product_kernel[(triton.cdiv(x.numel(), BLOCK),)](gate, x, out, x.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(gate, x)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        d_gate, d_x = torch.empty_like(gate), torch.empty_like(x)
        with torch.cuda.device_of(x):
            _sigmoid_product_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                gate, x, d_out.contiguous(), d_gate, d_x, x.numel(), BLOCK=BLOCK
            )
        return d_gate, d_x


def gated_group_norm(
    y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As :func:`rwkv_rev.cells.gates.gated_group_norm`, for y in float32 or less."""
    gate = None if gate is None else gate.contiguous()
    return _GatedGroupNorm.apply(y.contiguous(), weight.contiguous(), bias.contiguous(), eps, gate, dtype)


def squared_relu(x: Tensor) -> Tensor:
    """As :func:`rwkv_rev.cells.gates.squared_relu`."""
    return _SquaredRelu.apply(x.contiguous())


def sigmoid_product(gate: Tensor, x: Tensor) -> Tensor:
    """As :func:`rwkv_rev.cells.gates.sigmoid_product`."""
    return _SigmoidProduct.apply(gate.contiguous(), x.contiguous())
