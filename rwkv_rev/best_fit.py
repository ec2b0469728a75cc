"""Which pieces go into one row, or part of a row: best fit, the longest piece first.

Each piece goes into the fullest row that has room for it, or into a new one. For n pieces that takes O(n log T) steps:
of pieces of one length, as many as fit go into a row at once. It never needs more than 11/9 of the fewest rows, and one
(Johnson 1974, "Fast algorithms for bin packing").
"""

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, room: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of each row, one row behind the other, and where each row begins among them.

    Args:
        lengths: of the pieces, int64 [n], each from 1 to ``room``.
        room: T, of a row.
        order: [n], a permutation: of pieces of one length, which goes first.

    Returns:
        int64 [n], and [rows + 1].
    """
    sorted_ = order[np.argsort(-lengths[order], kind="stable")]
    row_of = np.empty(len(lengths), np.int64)
    left: dict[int, list[int]] = {}  # rows by the room that they have
    sizes: list[int] = []  # rooms that there are, in order
    rows = at = 0
    of_length, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(of_length[::-1].tolist(), counts[::-1].tolist(), strict=True):
        stop = at + count
        while at < stop:
            place = bisect_left(sizes, length)
            if place < len(sizes):
                size = sizes[place]
                row = left[size].pop()
                if not left[size]:
                    del left[size], sizes[place]
            else:
                row, size, rows = rows, room, rows + 1
            taken = min(size // length, stop - at)
            row_of[sorted_[at : at + taken]] = row
            at += taken
            if (rest := size - taken * length) > 0:
                if rest not in left:
                    left[rest] = []
                    insort(sizes, rest)
                left[rest].append(row)
    in_rows = np.argsort(row_of[sorted_], kind="stable")
    starts = np.concatenate([np.zeros(1, np.int64), np.bincount(row_of, minlength=rows).cumsum()])
    return sorted_[in_rows], starts
