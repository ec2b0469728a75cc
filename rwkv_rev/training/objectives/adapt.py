"""``adapt``: the context holds several tasks or authors, and the last part of each counts.

    row = s_1 s_2 ... s_k,    w_t = 1 where t is among the last ceil(last * |s_j|) tokens of its segment s_j, else 0

Each segment s_j is a part of at most T / segments tokens of another document, and the state goes on from one to the
next: it has to change quickly from what it was for (EBRT's *neuroplasticity*), for the loss comes only when it could
have. A segment's first token is never predicted. Every part of every document is in one row of an epoch. Parts are
dealt to the rows document by document, so that a row holds two of one document only where that is more than one
``segments``-th of all; within a row they stand in random order, which follows from the seed.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.training.objectives.objective import IGNORED, Objective, Row

LEAST_PART = 16
"""Tokens: in fewer a state has hardly learned what it is to change to."""


@dataclass(frozen=True)
class Adapt(Objective):
    """See the module's docstring."""

    name: ClassVar[str] = "adapt"
    not_with: ClassVar[tuple[tuple[str, str], ...]] = (
        ("pack", "one lets the state go on from document to document, the other begins it anew"),
        ("carry_state", "a row holds parts of several documents, and goes on from none"),
    )
    segments: int = 4
    last: float = 0.5

    def __post_init__(self) -> None:
        self.require("segments", 2, 2**20)
        self.require("last", 0.001, 1)

    def room(self, length: int) -> int:
        if (part := length // self.segments) < LEAST_PART:
            fewer = f"at most {length // LEAST_PART:,} segments, or " if length >= 2 * LEAST_PART else ""
            raise ConfigError(
                f"objective adapt: segments = {self.segments} leaves {part} tokens for each part of a row, fewer than "
                f"{LEAST_PART}: give {fewer}a longer context"
            )
        return part

    def segment(self, row: Row) -> Row:
        """A part of a document as a segment of a row."""
        n = len(row.ids)
        weights, labels = row.weights.copy(), row.labels.copy()
        weights[: n - int(np.ceil(self.last * n))] = 0
        labels[:1] = IGNORED
        return Row(row.ids, labels, weights, row.start)

    def dealt(self, documents: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parts of each row, one row behind the other, and where each row begins among them.

        Args:
            documents: of each part, int64 [n].
            order: [n], a permutation.

        Returns:
            int64 [n], and [rows + 1].

        Raises:
            DataError: for parts of a single document.
        """
        _, found, counts = np.unique(documents, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise DataError(
                "objective adapt needs several documents, between which the state has to change; there is one "
                "(each file, and each record of a .jsonl, is a document)"
            )
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        longest_first = np.lexsort((rank, found, -counts[found]))  # a document's parts stay together
        rows = -(-len(order) // self.segments)
        row_of = np.empty(len(order), np.int64)
        row_of[longest_first] = np.arange(len(order)) % rows
        parts = np.lexsort((rank, row_of))
        return parts, np.concatenate([np.zeros(1, np.int64), np.bincount(row_of, minlength=rows).cumsum()])

    def note(self, length: int) -> str:
        return f"adapt: a row holds {self.segments} parts of up to {self.room(length):,} tokens each"
