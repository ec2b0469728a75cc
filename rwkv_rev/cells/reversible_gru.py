"""Reversible GRU (MacKay, Vicol, Ba and Grosse 2018, "Reversible Recurrent Neural Networks", section 3).

    z1, r1 = sigmoid(x, h2),   g1 = tanh(x, r1 h2),    h1' = z1 h1 + (1 - z1) g1
    z2, r2 = sigmoid(x, h1'),  g2 = tanh(x, r2 h1'),   h2' = z2 h2 + (1 - z2) g2

each gate a linear map of its arguments, ``out = Wo (h1', h2')``. What z forgets is kept, ``log2(1/z)`` bits per number
and token and little more (:mod:`rwkv_rev.reversal.stepped`); with ``forget_limit`` k bits, z is at least 2**-k, as in
the paper: ``z = 2**-k + (1 - 2**-k) sigmoid``.

Tape: per row and chunk ``sum log2(1/z)`` bits, 1.0 to 1.4 times as many in practice, and never more than the state
itself, 8 M bytes (16 M in float64); 4 bytes that say how many, and prints as for any cell. z = 1/2 forgets a bit:
beyond 32 tokens of it a chunk costs what its state does, and short chunks are what saves (the paper's have one token).

The state lies within (-1, 1) if it begins there, and has 29 bits behind the point (59 in float64).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_rev.cells.token_cell import Token, TokenCell, Update
from rwkv_rev.errors import ConfigError


class ReversibleGru(TokenCell):
    """The cell; state [B, 2, M], h1 and h2.

    Args:
        width: D, of input and output.
        size: M, of each half; half of D, rounded up, unless given.
        forget_limit: bits that a number may forget in a token; None for any.
        magnitude: numbers of the state stay below ``2**magnitude``.
        wide: integers of 51 bits, where range and precision matter more than room; None for float64 alone (62 bits).
    """

    halves = ((0,), (1,))

    def __init__(
        self,
        width: int,
        size: int | None = None,
        *,
        forget_limit: float | None = None,
        magnitude: int = 2,
        wide: bool | None = None,
    ) -> None:
        size = -(-width // 2) if size is None else size
        super().__init__(size, magnitude, wide)
        self.least_kept = least_kept(forget_limit)
        self.input = nn.Linear(width, 6 * size)  # z, r, g of the first half, then of the second
        self.gate = nn.ModuleList(nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.candidate = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
        self.output = nn.Linear(2 * size, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = [2 * self.size, self.size] * 2
        return self.input(x).split(sizes, dim=-1)

    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        other = parts[1 - half]
        forget, reset = torch.sigmoid(token[2 * half] + self.gate[half](other)).chunk(2, dim=-1)
        candidate = torch.tanh(token[2 * half + 1] + self.candidate[half](reset * other))
        return limited(forget, self.least_kept), candidate

    def update(self, part: int, gates: tuple[Tensor, Tensor], parts: Sequence[Tensor]) -> Update:
        forget, candidate = gates
        return forget, (1 - forget) * candidate

    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.output(parts.flatten(2))
        return found


def least_kept(forget_limit: float | None) -> float:
    """The least z for a limit in bits: 2**-k, or 0 without one.

    Raises:
        ConfigError: for a limit that is not positive.
    """
    if forget_limit is None:
        return 0.0
    if not forget_limit > 0:
        raise ConfigError(
            f"forget_limit = {forget_limit!r} bits must be more than 0, or None for no limit; a cell that forgets "
            "nothing is CoupledCell"
        )
    return 2.0**-forget_limit


def limited(forget: Tensor, least: float) -> Tensor:
    """z from ``least`` to 1 of a sigmoid."""
    return forget if least == 0 else least + (1 - least) * forget
