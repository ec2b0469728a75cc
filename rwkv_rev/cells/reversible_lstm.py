"""Reversible LSTM (MacKay, Vicol, Ba and Grosse 2018, "Reversible Recurrent Neural Networks", section 3).

    z1, i1, o1, p1 = sigmoid(x, h2),  g1 = tanh(x, h2),    c1' = z1 c1 + i1 g1,   h1' = p1 h1 + o1 tanh(c1')

and the same for the second half with h1' in the place of h2; each gate a linear map of its arguments, ``out = Wo (h1',
h2')``. An ordinary LSTM writes h over; here p keeps some of it, or nothing of the step before could be known. What z
and p forget is kept as in :mod:`rwkv_rev.cells.reversible_gru`, with the same limit.

Tape: per row and chunk ``sum log2(1/z) + log2(1/p)`` bits, 1.0 to 1.4 times as many in practice, and never more than
the state itself, 16 M bytes (32 M in float64); 4 bytes that say how many, and prints as for any cell.

Limits: c and h are sums without a bound: with z and p near 1 they grow as long as the context does, and in training on
25,000 tokens of text they did. Numbers below 256 fit (23 bits behind the point, as in the paper; 53 in float64); one
beyond is named (:class:`~rwkv_rev.reversal.stepped.GridOverflowError`). ``magnitude=16, wide=True`` holds 65,536 on a
grid of 2**-34.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_rev.cells.reversible_gru import least_kept, limited
from rwkv_rev.cells.token_cell import Token, TokenCell, Update

CELL, HIDDEN = 0, 1


class ReversibleLstm(TokenCell):
    """The cell; state [B, 4, M]: c1, h1, c2 and h2.

    Args:
        width: D, of input and output.
        size: M, of each part; half of D, rounded up, unless given.
        forget_limit: bits that a number may forget in a token; None for any.
        magnitude: numbers of the state stay below ``2**magnitude``.
        wide: integers of 51 bits, where range and precision matter more than room; None for float64 alone (62 bits).
    """

    halves = ((0, 1), (2, 3))

    def __init__(
        self,
        width: int,
        size: int | None = None,
        *,
        forget_limit: float | None = None,
        magnitude: int = 8,
        wide: bool | None = None,
    ) -> None:
        size = -(-width // 2) if size is None else size
        super().__init__(size, magnitude, wide)
        self.least_kept = least_kept(forget_limit)
        self.input = nn.Linear(width, 10 * size)  # z, p, i, o, g of the first half, then of the second
        self.recurrent = nn.ModuleList(nn.Linear(size, 5 * size, bias=False) for _ in range(2))
        self.output = nn.Linear(2 * size, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.input(x).chunk(2, dim=-1)

    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
        """z with what is added to c, and p with o."""
        whole = token[half] + self.recurrent[half](parts[2 * (1 - half) + HIDDEN])
        forget, keep, write, show = torch.sigmoid(whole[..., : 4 * self.size]).chunk(4, dim=-1)
        candidate = torch.tanh(whole[..., 4 * self.size :])
        least = self.least_kept
        return (limited(forget, least), write * candidate), (limited(keep, least), show)

    def update(self, part: int, gates: tuple[tuple[Tensor, Tensor], ...], parts: Sequence[Tensor]) -> Update:
        if part % 2 == CELL:
            return gates[CELL]
        keep, show = gates[HIDDEN]
        return keep, show * torch.tanh(parts[part - 1])

    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.output(parts[:, :, 1::2].flatten(2))
        return found
