"""The elementwise ends of the cells: gated GroupNorm, squared ReLU, sigmoid gate.

Each is a PyTorch formula; on a CUDA device :mod:`rwkv_rev.cells.triton_gates` computes it in one launch
(``RWKV_REV_KERNEL=chunked`` keeps to PyTorch). Without gradients the formulas work in memory of their own: on a CPU
new memory costs more than the arithmetic.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from rwkv_rev.wkv.dispatch import is_fused

_LINEAR, _GROUP_NORM, _CALL = nn.Linear.forward, nn.GroupNorm.forward, nn.Module.__call__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def norm_and_gate(
    norm: nn.Module, y: Tensor, gate: Tensor | None, dtype: torch.dtype, *, own: bool = False
) -> Tensor:
    """``norm(y) * silu(gate)``, [B, C, D] in ``dtype``; arguments as those of :func:`gated_group_norm`.

    A plain GroupNorm with a group per head is computed by its formula. What other tools have put in its place, or
    hooked to it, is called as a module, with y [B C, D] in the precision of its weights.
    """
    if _is_plain_group_norm(norm, y.shape[2]):
        return gated_group_norm(y, norm.weight, norm.bias, norm.eps, gate, dtype, own=own)
    weight = next(norm.parameters(), y)
    rows = y.flatten(0, 1).flatten(1).to(weight.dtype)
    normalized = norm(rows).view(*y.shape[:2], -1).to(dtype)
    return normalized if gate is None else normalized * F.silu(gate)


def _is_plain_group_norm(norm: nn.Module, heads: int) -> TypeGuard[nn.GroupNorm]:
    """Whether calling the module would do just what its formula does."""
    kind, own = type(norm), vars(norm)
    return (
        isinstance(norm, nn.GroupNorm)
        and kind.forward is _GROUP_NORM
        and kind.__call__ is _CALL
        and norm.num_groups == heads
        and norm.weight is not None
        and norm.bias is not None
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not any(own[name] for name in _HOOKS)
        and not any(vars(module_globals)[f"_global{name}"] for name in _HOOKS)
    )


def gated_group_norm(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gate: Tensor | None,
    dtype: torch.dtype,
    *,
    own: bool = False,
) -> Tensor:
    """``GroupNorm(y) * silu(gate)`` with a group per head (Eagle and Finch paper, eq. 9), [B, C, D] in ``dtype``.

    Args:
        y: [B, C, H, N] float32 or wider, as the norm is computed.
        weight, bias: [D].
        gate: [B, C, D], or None for none.
        own: whether the memory of ``gate`` may be taken where there are no gradients.
    """
    if is_fused(y):
        from rwkv_rev.cells import triton_gates

        return triton_gates.gated_group_norm(y, weight, bias, eps, gate, dtype)
    normalized = F.layer_norm(y, y.shape[-1:], eps=eps).flatten(2)
    weight, bias = weight.to(y.dtype), bias.to(y.dtype)
    if torch.is_grad_enabled():
        normalized = (normalized * weight + bias).to(dtype)
        return normalized if gate is None else normalized * F.silu(gate)
    normalized = normalized.mul_(weight).add_(bias).to(dtype)
    return normalized if gate is None else F.silu(gate, inplace=own).mul_(normalized)


def squared_relu(x: Tensor, *, own: bool = False) -> Tensor:
    """``max(x, 0)^2``, elementwise; in the memory of x where that is one's ``own`` and there are no gradients."""
    if is_fused(x):
        from rwkv_rev.cells import triton_gates

        return triton_gates.squared_relu(x)
    if torch.is_grad_enabled():
        return torch.relu(x).square()
    return (torch.relu_(x) if own else torch.relu(x)).square_()


def returns_new_memory(module: nn.Module) -> bool:
    """Whether nobody but the caller can have what the module returns: a linear layer to which nothing is hooked.

    What one method of a cell hands to another may be others' as well: :mod:`rwkv_rev.cells.as_written`.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module_globals._global_forward_hooks,
        module_globals._global_forward_pre_hooks,
    )
    own = vars(module)
    plain = type(module) is nn.Linear and nn.Linear.forward is _LINEAR and nn.Linear.__call__ is _CALL
    return plain and not any(hooks) and "forward" not in own and "_call_impl" not in own


def sigmoid_product(gate: Tensor, x: Tensor, *, own: bool = False) -> Tensor:
    """``sigmoid(gate) * x`` in the dtype of ``gate``, elementwise; ``own`` as in :func:`squared_relu`, of the gate."""
    if is_fused(gate):
        from rwkv_rev.cells import triton_gates

        return triton_gates.sigmoid_product(gate, x)
    if torch.is_grad_enabled():
        return torch.sigmoid(gate) * x.to(gate.dtype)
    return (torch.sigmoid_(gate) if own else torch.sigmoid(gate)).mul_(x.to(gate.dtype))
