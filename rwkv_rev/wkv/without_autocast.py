"""A computation that autocast leaves alone, forwards and backwards.

Leaving autocast around the forward pass is not enough where PyTorch differentiates: products of the backward pass are
new ones, which the autocast region that the backward pass runs in (the two sweeps run in the user's) would round to 16
bits. So the graph is made and differentiated inside of one node. Costs no memory but the outputs' handles.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.first_order import first_order


def without_autocast(function: Callable[..., Any], kind: str, *arguments: Tensor | None) -> Any:
    """``function(*arguments)``, a tensor or a tuple of tensors, without autocast on devices of this kind."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in arguments):
        with torch.autocast(kind, enabled=False):
            return function(*arguments)
    return _Apart.apply(function, kind, *arguments)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], kind: str, *arguments: Tensor | None) -> Any:
        leaves = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(arguments, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            found = function(*leaves)
        outs = (found,) if isinstance(found, Tensor) else tuple(found)
        ctx.inside, ctx.kind = (leaves, outs), kind
        results = tuple(out.detach() for out in outs)
        return results[0] if isinstance(found, Tensor) else results

    @staticmethod
    @first_order
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        leaves, outs = ctx.inside
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        pairs = [(out, to) for out, to in zip(outs, arriving, strict=True) if out.requires_grad]
        with torch.autocast(ctx.kind, enabled=False):
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [to for _, to in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        following = iter(found)
        return (
            None,
            None,
            *(next(following) if leaf is not None and leaf.requires_grad else None for leaf in leaves),
        )
