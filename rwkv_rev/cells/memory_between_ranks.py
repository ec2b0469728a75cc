"""A memory's gradient between the ranks that share a chunk, where tokens pull at the memory before them by themselves.

A rank's tokens turn the memory S_r before them into P_r S_r + U_r, in the graph that they have without ranks. Values
of S_r, and of the memory after the chunk, come from pieces that were exchanged without a graph. With G_r the gradient
by the memory after the tokens of rank r, and Q_r what their outputs alone want of S_r,

    G_{r-1} = P_r G_r + Q_r        (P a factor per row),

which is a piece again. The Q_r are exchanged from the last rank to the first before any rank computes the gradient by
its tokens, so that there is one such computation, of all that is wanted of them. (Sun et al. 2025, "LASP-2", do so
for a linear attention without decay.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.distributed.context_group import ContextGroup


def handed_in(start: Tensor, value: Tensor, group: ContextGroup) -> Tensor:
    """``value``, the memory before this rank's tokens, made of ``start``, the one before the chunk, by other ranks'.

    By then the first rank knows what all want of ``start``: the gradients of the others are zero.
    """
    found: Tensor = _HandedIn.apply(start, value, group)
    return found


def handed_out(
    read: Tensor,
    after: Tensor,
    left: Tensor,
    after_this: Callable[[Tensor, Tensor], Tensor],
    group: ContextGroup,
) -> tuple[Tensor, Tensor]:
    """What this rank's tokens ``read``, and the memory ``left`` by all ranks.

    Args:
        after: the memory after this rank's tokens, in its graph.
        after_this: the gradient by ``after``, from those by ``read`` and by ``left`` (of all ranks).
    """
    found: tuple[Tensor, Tensor] = _HandedOut.apply(read, after, left, after_this, group)
    return found


class _HandedIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, value: Tensor, group: ContextGroup) -> Tensor:
        ctx.first = group.rank == 0
        return value.view_as(value)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient if ctx.first else torch.zeros_like(gradient), None, None


class _HandedOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        read: Tensor,
        after: Tensor,
        left: Tensor,
        after_this: Callable[[Tensor, Tensor], Tensor],
        group: ContextGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.after_this, ctx.group = after_this, group
        return read.view_as(read), left.view_as(left)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_read: Tensor, d_left: Tensor) -> Any:
        wanted = ctx.group.add(d_left.clone(memory_format=torch.contiguous_format))
        with torch.autocast(d_read.device.type, enabled=False):
            return d_read, ctx.after_this(d_read, wanted), None, None, None
