"""Rows of a tensor moved to other places and back, each to one place: both ways are a gather.

PyTorch's gradient of a gather adds row by row into zeros, since it cannot know that none is read twice. Here the way
back is known: one launch instead of two, and no atomic operation.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import transforms_of


def moved(x: Tensor, to: Tensor, back: Tensor, empty: Tensor | None, unread: Tensor | None) -> Tensor:
    """Rows ``x[to]``, [m, ...] from [n, ...]; differentiable any number of times.

    Args:
        to: [m] int64, places in x.
        back: [n] int64, where each row of x is among the result.
        empty: [m] bool, rows of the result that are zeros; None where none is.
        unread: [n] bool, rows of x that get no gradient; None where none is. A row that ``to`` names several times gets
            that of the place which ``back`` says: of the others nothing may depend on it.
    """
    if transforms_of([x]) or not (torch.is_grad_enabled() and x.requires_grad):
        return _gathered(x, to, empty)
    found: Tensor = _Moved.apply(x, to, back, empty, unread)
    return found


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, to: Tensor, back: Tensor, empty: Tensor | None, unread: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(to, back, empty, unread)
        return _gathered(x, to, empty)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to, back, empty, unread = ctx.saved_tensors
        return moved(gradient, back, to, unread, empty), None, None, None, None


def _gathered(x: Tensor, places: Tensor, empty: Tensor | None) -> Tensor:
    rows = x.index_select(0, places)
    if empty is None:
        return rows
    empty = empty.view(-1, *(1,) * (x.dim() - 1))
    return rows.masked_fill(empty, 0) if torch.is_grad_enabled() else rows.masked_fill_(empty, 0)
