"""The elementwise ends of the cells: gated GroupNorm, squared ReLU, sigmoid gate.

Each is a PyTorch formula; on a CUDA device :mod:`rwkv_rev.cells.triton_gates` computes it in one launch
(``RWKV_REV_KERNEL=chunked`` keeps to PyTorch).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_rev.wkv.dispatch import choose_kernel


def gated_group_norm(
    y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``GroupNorm(y) * silu(gate)`` with a group per head (Eagle and Finch paper, eq. 9), [B, C, D] in ``dtype``.

    Args:
        y: [B, C, H, N] float32 or wider, as the norm is computed.
        weight, bias: [D].
        gate: [B, C, D], or None for none.
    """
    if choose_kernel(None, y) == "triton":
        from rwkv_rev.cells import triton_gates

        return triton_gates.gated_group_norm(y, weight, bias, eps, gate, dtype)
    batch, length, heads, size = y.shape
    flat = y.reshape(batch * length, heads * size)
    normalized = F.group_norm(flat, heads, weight.to(y.dtype), bias.to(y.dtype), eps)
    normalized = normalized.view(batch, length, -1).to(dtype)
    return normalized if gate is None else normalized * F.silu(gate)


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2``, elementwise."""
    if choose_kernel(None, x) == "triton":
        from rwkv_rev.cells import triton_gates

        return triton_gates.squared_relu(x)
    return torch.relu(x).square()


def sigmoid_product(gate: Tensor, x: Tensor) -> Tensor:
    """``sigmoid(gate) * x`` in the dtype of ``gate``, elementwise."""
    if choose_kernel(None, gate) == "triton":
        from rwkv_rev.cells import triton_gates

        return triton_gates.sigmoid_product(gate, x)
    return torch.sigmoid(gate) * x.to(gate.dtype)
