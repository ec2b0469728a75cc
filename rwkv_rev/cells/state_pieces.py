"""What a rank's tokens do to a memory, ``S -> P S + U``, in the three forms that RWKV's recurrences have.

    RWKV-5, 6   P a factor per row of the matrix, kept as its logarithm
    RWKV-4      the same of a numerator and a denominator that are scaled by exp(-m)
    RWKV-7      P a matrix per head, multiplied in float64: a 64th of what the tokens themselves take

A piece in which a document begins forgets what was before: P = 0 there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order


@dataclass(frozen=True)
class DecayedPiece:
    """``exp(log_factor)[..., None] * S + update``: [1 or B, H, N] and [B, H, N, N], key index first.

    ``of_data``: the factor is not the same for all tokens, so that other ranks must be told it.
    """

    log_factor: Tensor
    update: Tensor
    of_data: bool = False

    def sent(self) -> list[Tensor]:
        return [self.update, self.log_factor] if self.of_data else [self.update]

    def of(self, memory: Tensor) -> Tensor:
        return torch.exp(self.log_factor).to(self.update.dtype)[..., None] * memory + self.update

    def then(self, later: "DecayedPiece") -> "DecayedPiece":
        return replace(self, log_factor=self.log_factor + later.log_factor, update=later.of(self.update))

    def beginning(self, rows: Tensor, end: Tensor) -> "DecayedPiece":
        """The same but in ``rows`` [B] bool, whose last document leaves ``end`` [B, H, N, N]."""
        forgotten = torch.where(rows[:, None, None], -torch.inf, self.log_factor)
        return replace(
            self, log_factor=forgotten, update=torch.where(rows[:, None, None, None], end, self.update)
        )


@dataclass(frozen=True)
class ScaledPiece:
    """RWKV-4's, on memories [B, 3, D] = (a, b, m): ``log_factor`` [1 or B, D], and the memory after it from nothing.

    m is a gauge: no gradient goes to or from it.
    """

    log_factor: Tensor
    update: Tensor

    def sent(self) -> list[Tensor]:
        return [self.update]

    def of(self, memory: Tensor) -> Tensor:
        a, b, exponent = memory.unbind(1)
        c, d, further = self.update.unbind(1)
        shifted, further = exponent.detach() + self.log_factor, further.detach()
        top = torch.maximum(shifted.detach(), further)
        old, new = torch.exp(shifted - top), torch.exp(further - top)
        return torch.stack([old * a + new * c, old * b + new * d, top], dim=1)

    def then(self, later: "ScaledPiece") -> "ScaledPiece":
        return ScaledPiece(self.log_factor + later.log_factor, later.of(self.update))

    def beginning(self, rows: Tensor, end: Tensor) -> "ScaledPiece":
        """The same but in ``rows`` [B] bool, whose last document leaves ``end`` [B, 3, D]."""
        forgotten = torch.where(rows[:, None], -torch.inf, self.log_factor)
        return ScaledPiece(forgotten, torch.where(rows[:, None, None], end, self.update))


@dataclass(frozen=True)
class MatrixPiece:
    """``transition @ S + update``, [B, H, N, N] each."""

    transition: Tensor
    update: Tensor

    def sent(self) -> list[Tensor]:
        return [self.transition, self.update]

    def of(self, memory: Tensor) -> Tensor:
        return (self.transition.double() @ memory.double()).to(self.update.dtype) + self.update

    def then(self, later: "MatrixPiece") -> "MatrixPiece":
        both = (later.transition.double() @ self.transition.double()).to(self.transition.dtype)
        return MatrixPiece(both, later.of(self.update))

    def beginning(self, rows: Tensor, end: Tensor) -> "MatrixPiece":
        """The same but in ``rows`` [B] bool, whose last document leaves ``end`` [B, H, N, N]."""
        rows = rows[:, None, None, None]
        return MatrixPiece(torch.where(rows, 0.0, self.transition), torch.where(rows, end, self.update))


def recomputed(function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
    """``function(*given)``, of which on a GPU ``given`` alone is kept, which others keep anyway; differentiable.

    A piece costs as much to compute as what the tokens read, and would keep as much for its gradient.
    """
    if not (torch.is_grad_enabled() and given[0].is_cuda):
        return function(*given)
    found: tuple[Tensor, ...] = _Recomputed.apply(function, *given)
    return found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*given)
        return function(*given)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), torch.autocast(given[0].device.type, enabled=False):
            found = ctx.function(*given)
            return None, *torch.autograd.grad(found, given, gradients)
