r"""From what each rank's tokens do to a state to what each rank begins with, and what the chunk ends with.

A piece of a chunk maps the state before it to the state after it, ``S -> P S + U``. Pieces compose, and the composition
is associative:

    before_r = piece_{r-1} o ... o piece_0,      total = piece_{W-1} o ... o piece_0

Here every rank gathers all pieces and composes them in the order of the ranks (Sun et al. 2025, "LASP-2: Rethinking
Sequence Parallelism for Linear Attention and Its Hybrid"): W pieces a layer and chunk, however long the chunk.
:func:`exchange` is all that cells know of it, so that a scan from rank to rank (ZeCO: Chou et al. 2025) can take its
place where W is large. Its backward pass is the reverse: each rank sums what all ranks' states want of its piece.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.distributed.context_group import ContextGroup


class StatePiece(Protocol):
    """What some tokens do to a state."""

    def sent(self) -> list[Tensor]:
        """What the other ranks have to be told of it."""
        ...

    def of(self, state: Any) -> Any:
        """The state after the tokens, from the one before them."""
        ...

    def then(self, later: Self) -> Self:
        """This piece, and a later one behind it."""
        ...


def exchange(
    own: StatePiece,
    received: Callable[[int, list[Tensor]], Any],
    group: ContextGroup,
    *,
    reverse: bool = False,
) -> tuple[Any | None, Any]:
    """What the ranks before this one do to the state (None for the first), and what all of them do; differentiable.

    Args:
        own: this rank's piece.
        received: a rank's piece, from what it :meth:`~StatePiece.sent`.
        reverse: from the last rank to the first, as a state's gradient goes.
    """
    sent = [gather(tensor, group) for tensor in own.sent()]
    order = range(group.size)[:: -1 if reverse else 1]
    before = total = None
    for rank in order:
        piece = received(rank, [tensor[rank] for tensor in sent])
        if rank == group.rank:
            before = total
        total = piece if total is None else total.then(piece)
    return before, total


def gather(part: Tensor, group: ContextGroup) -> Tensor:
    """Every rank's ``part`` [W, ...]; its gradient is the sum of what all ranks want of this one's."""
    found: Tensor = _Gather.apply(part, group)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        return group.gather(part)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.group.scatter_sum(gradient), None
