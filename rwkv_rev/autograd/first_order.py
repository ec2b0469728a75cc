"""Backward passes that are correct for first derivatives only, and say so.

With ``create_graph=True`` autograd goes on to differentiate what a backward pass returns. Gradients that were
finished in the forward pass, or computed by a kernel, would be constants there: their second derivatives would be
lost without a word. PyTorch's ``once_differentiable`` raises only where the incoming gradient has a graph.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rwkv_rev.errors import StrategyError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an autograd function, which refuses to be differentiated again.

    Raises:
        StrategyError: where the graph of the gradient is asked for, or several gradients in one call.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        refuse_transforms(())
        if any(isinstance(given, Tensor) and _is_batched(given) for given in gradients):
            raise StrategyError(
                "several gradients at once (is_grads_batched=True) are not available here: take one after another, "
                "each after a call of the model of its own"
            )
        if torch.is_grad_enabled():
            raise StrategyError(
                "second derivatives (create_graph=True) are not available here: set RWKV_REV_KERNEL=naive and "
                "bptt='full', and compute a loss of your own from model(input_ids).logits, which PyTorch "
                "differentiates twice"
            )
        return backward(ctx, *gradients)

    return once


def refuse_transforms(tensors: Iterable[Tensor]) -> None:
    """Refuse ``torch.func`` (grad, vjp, jvp, vmap, ...) and forward-mode tangents: they have no rules here.

    Raises:
        StrategyError: inside a transform, or for a dual tensor among ``tensors``.
    """
    if torch._C._are_functorch_transforms_active():
        raise StrategyError(
            "torch.func (grad, vjp, jvp, vmap, ...) cannot go through here: call loss.backward() or "
            "torch.autograd.grad, or set RWKV_REV_KERNEL=naive and transform a loss of your own on logits"
        )
    if _is_dual(tensors):
        raise StrategyError(
            "forward-mode differentiation cannot go through here: call loss.backward(), or set "
            "RWKV_REV_KERNEL=naive and compute a loss of your own on logits"
        )


def transforms_of(tensors: Iterable[Tensor]) -> bool:
    """Whether :func:`refuse_transforms` would refuse."""
    return torch._C._are_functorch_transforms_active() or _is_dual(tensors)


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors in one of PyTorch's two kinds of ``vmap``; gradients come in the older."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def _is_dual(tensors: Iterable[Tensor]) -> bool:
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
