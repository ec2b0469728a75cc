"""The final state of every document in a batch, taken where its last token is computed.

Documents are numbered by rows, and in each in order; a row's tokens before its first border are one, too, and a row in
which no token counts has none. Kept are the ends alone: of a chunk with borders those of pieces whose document ends
there (:mod:`rwkv_rev.cells.borders`), of any other chunk the state after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentEnds:
    """Which documents end where, and what has been found of them.

    Attributes:
        numbers: [B, T] int64 on the host, of the document whose last token it is; -1 elsewhere.
        found: of each chunk, by the least number in it: numbers int64 [n] and states of so many rows; shared with all
            parts.
    """

    numbers: Tensor
    found: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, at: Tensor, valid: Tensor | None) -> "DocumentEnds":
        """From borders and valid tokens, [B, T] bool on the host."""
        numbers = np.full(at.shape, -1, np.int64)
        count = 0
        for row, begins in enumerate(at.numpy()):
            tokens = np.arange(len(begins)) if valid is None else valid[row].numpy().nonzero()[0]
            if len(tokens):
                firsts = begins[tokens].nonzero()[0]
                lasts = [*tokens[firsts[firsts > 0] - 1], tokens[-1]]
                numbers[row, lasts] = np.arange(count, count + len(lasts))
                count += len(lasts)
        return cls(torch.from_numpy(numbers))

    def part(self, start: int, stop: int) -> "DocumentEnds":
        """Of the tokens ``start`` to ``stop``."""
        return replace(self, numbers=self.numbers[:, start:stop])

    def taken(self, places: Tensor) -> "DocumentEnds":
        """Of the tokens at ``places``, int64 [n]."""
        return replace(self, numbers=self.numbers.index_select(1, places))

    def take(self, kind: Any, mask: Any, layers: Sequence[Sequence[Tensor]]) -> None:
        """Those that end in a chunk.

        Args:
            kind: of the model's state.
            mask: of the chunk; a :class:`~rwkv_rev.cells.borders.BorderedChunk` has kept what ends in it.
            layers: the tensors [B, ...] of each layer's state after the chunk.
        """
        kept: dict[tuple[int, ...], list[Tensor]] = {}
        if hasattr(mask, "kept"):
            kept.update(mask.kept)
            mask.kept.clear()  # or graphs would stay in memory with it
        rows, places = (self.numbers >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return
        if kept:
            by_layer = [
                [tensor for path in sorted(kept) if path[0] == layer for tensor in kept[path]]
                for layer in range(len(layers))
            ]
        else:
            by_layer = [
                [tensor.index_select(0, rows.to(tensor.device)) for tensor in layer] for layer in layers
            ]
        numbers = self.numbers[rows, places]
        self.found[int(numbers.min())] = numbers, kind.like(by_layer)

    def states(self) -> Any:
        """The state of every document, [documents, ...], in order; None where there is no document."""
        if not self.found:
            return None
        numbers = torch.cat([numbers for numbers, _ in self.found.values()])
        states = [state for _, state in self.found.values()]
        tensors = zip(*(state.tensors() for state in states), strict=True)
        joined = type(states[0])(*(torch.cat(parts, dim=1) for parts in tensors))
        return joined.rows(numbers.argsort())
