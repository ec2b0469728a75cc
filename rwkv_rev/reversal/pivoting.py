"""A square matrix as two triangles of ones and a diagonal, with complete pivoting: ``P[rows][:, columns] = L d R``.

    L = I + strictly lower,    R = I + strictly upper,    all entries of both at most 1 in magnitude

Gaussian elimination that takes the largest of all that is left for its next pivot (Wilkinson 1961). Partial pivoting
(LAPACK's) bounds L alone: where P is nearly singular, as the transition of many tokens is, R grows to hundreds, and
what is rounded between the factors grows with it. A singular matrix is nothing special: its last d are zero.

Cost: N steps, each a few operations on all matrices at once, 2/3 N^3 products and N^3 comparisons for each.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Of M matrices.

    Attributes:
        rows, columns: [M, N] int64, which row and column of P stands at each place.
        lower: [M, N, N], strictly lower. diagonal: [M, N]. upper: [M, N, N], strictly upper.
    """

    rows: Tensor
    columns: Tensor
    lower: Tensor
    diagonal: Tensor
    upper: Tensor


def factor(matrices: Tensor) -> Factors:
    """The factors of ``matrices`` [M, N, N], float64; those of one with inf or NaN are not finite."""
    count, size, _ = matrices.shape
    rest = matrices.clone()
    each = torch.arange(count, device=rest.device)
    magnitude = torch.empty_like(rest)
    # by step, and by the row or column that it had before
    lower, upper = torch.empty_like(rest), torch.empty_like(rest)
    places = torch.empty(size, count, dtype=torch.int64, device=rest.device)
    diagonal = rest.new_empty(size, count)
    for step in range(size):
        torch.abs(rest, out=magnitude)
        place = places[step] = magnitude.flatten(1).argmax(1)
        row_number, column_number = place // size, place % size
        row, column = rest[each, row_number], rest[each, :, column_number]
        pivot = diagonal[step] = row.gather(1, column_number[:, None])[:, 0]
        divisor = torch.where(pivot == 0, 1.0, pivot)[:, None]
        upper[:, step] = row / divisor
        lower[:, step] = column / divisor
        rest.baddbmm_(column[:, :, None], upper[:, step : step + 1], alpha=-1)
        # what has been taken is exactly zero from now on
        rest[each, row_number] = 0
        rest[each, :, column_number] = 0
    diagonal, places = diagonal.T.contiguous(), places.T
    spare = diagonal == 0  # the last steps, which found nothing left
    rows, columns = (_distinct(found, spare) for found in (places // size, places % size))
    return Factors(
        rows,
        columns,
        lower.gather(2, rows[:, None, :].expand_as(lower)).mT.tril(-1),
        diagonal,
        upper.gather(2, columns[:, None, :].expand_as(upper)).triu(1),
    )


def _distinct(places: Tensor, spare: Tensor) -> Tensor:
    """``places`` [M, N] where they are not ``spare``, which get those that are left, in order."""
    # a spare step may name a place that another one has
    used = torch.zeros_like(places).scatter_add_(1, places, (~spare).to(places.dtype))
    left = used.argsort(dim=1, stable=True)
    number = torch.arange(places.shape[1], device=places.device) - (~spare).sum(1, keepdim=True)
    return torch.where(spare, left.gather(1, number.clamp(min=0)), places)
