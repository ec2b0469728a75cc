"""Coupled additive cell: two halves of a state that add to each other, and forget nothing.

    s1' = s1 + L1(s2, x),   s2' = s2 + L2(s1', x),   out = G(s', x)

The recurrence is an additive coupling (Dinh et al. 2014, "NICE", section 3.2), one token at a time. Gates L1, L2 and
the reader G are anybody's modules. States are integers on a fixed grid: ``s2 = s2' - L2(s1', x)``, then ``s1 = s1' -
L1(s2, x)``, undo a token to the bit.

Tape: nothing of the state. A chunk puts there its prints and a fingerprint, 24 bytes a layer (32 as they are laid out),
whatever its length, the width, or the rows.

Limits: what is never forgotten adds up. Numbers below 4096 fit, 38 bits behind the point (49 in float64); one beyond
is named (:class:`~rwkv_rev.reversal.stepped.GridOverflowError`). MacKay et al. 2018, section 4, say what a cell that
cannot forget cannot learn. Gates must not draw random numbers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rwkv_rev.cells.token_cell import Token, TokenCell, Update
from rwkv_rev.errors import ConfigError


class TanhGate(nn.Module):
    """``scale * tanh(W s + U x + b)``: at most ``scale`` for a token. What it reads of x, :meth:`share` gives for all
    tokens of a chunk at once.

    Args:
        size: M, of the half that it reads and of the one that it adds to.
        width: D, of the input.
    """

    def __init__(self, size: int, width: int, scale: float = 0.125) -> None:
        super().__init__()
        self.of_state = nn.Linear(size, size, bias=False)
        self.of_input = nn.Linear(width, size)
        self.scale = scale

    def share(self, x: Tensor) -> Tensor:
        """``U x + b``, [..., M]."""
        found: Tensor = self.of_input(x)
        return found

    def forward(self, state: Tensor, share: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.of_state(state) + share)


class LinearReader(nn.Module):
    """``V tanh(s1, s2)``: bounded, however far the state has gone.

    Args:
        size: M, of each half.
        width: D, of the output.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.of_state = nn.Linear(2 * size, width, bias=False)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return self.of_state(torch.tanh(state))


class CoupledCell(TokenCell):
    """The cell; state [B, 2, M].

    Args:
        width: D, of input and output.
        size: M, of each half; half of D unless given.
        first, second: L1 and L2, modules of (the other half [B, M], x [B, D]) that give [B, M]. One with a method
            ``share`` is called with a token of ``share(x)``, x [B, C, D], in place of x: work for all tokens at once.
        reader: G, a module of (both halves [B, C, 2 M], x [B, C, D]) that gives [B, C, D].
        magnitude: numbers of the state stay below ``2**magnitude``.
    """

    halves = ((0,), (1,))

    def __init__(
        self,
        width: int,
        size: int | None = None,
        *,
        first: nn.Module | None = None,
        second: nn.Module | None = None,
        reader: nn.Module | None = None,
        magnitude: int = 12,
    ) -> None:
        size = math.ceil(width / 2) if size is None else size
        super().__init__(size, magnitude, wide=True)  # nothing of it is kept
        self.first = first or TanhGate(size, width)
        self.second = second or TanhGate(size, width)
        self.reader = reader or LinearReader(size, width)

    def log_decay(self) -> Tensor:
        """log w of the memory [2 M]: 0, nothing is forgotten."""
        return torch.zeros(2 * self.size, device=next(self.parameters()).device)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (getattr(gate, "share", _all)(x) for gate in (self.first, self.second))
        return first, second

    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> Tensor:
        gate: Callable[..., Tensor] = self.second if half else self.first
        return gate(parts[1 - half], token[half])

    def update(self, part: int, gates: Tensor, parts: Sequence[Tensor]) -> Update:
        return None, gates

    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.reader(parts.flatten(2), x)
        if found.shape != x.shape:
            raise ConfigError(
                f"the reader of layer {self.layer} ({type(self.reader).__name__}) gives {list(found.shape)}, not "
                f"{list(x.shape)}"
            )
        return found


def _all(x: Tensor) -> Tensor:
    return x
