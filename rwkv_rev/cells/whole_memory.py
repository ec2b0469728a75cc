"""Cells with a token shift whose memory is kept whole: what a chunk contributes is the memory after it."""

from typing import Any

import torch
from torch import Tensor

from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.shared_chunk import Counted
from rwkv_rev.cells.shifted_cell import ShiftedCell
from rwkv_rev.reversal.whole import Whole, WholeRemnant


class WholeMemoryCell(ShiftedCell):
    """A cell whose remnant is its state itself."""

    def update(
        self, memory: Tensor | None, projection: Any, contribution: Tensor, mask: ChunkMask | None
    ) -> Tensor:
        return contribution

    def exact_memory(self, memory: Tensor) -> Whole:
        return Whole(memory)

    def advance_memory(
        self, memory: Whole, projection: Any, contribution: Tensor, mask: ChunkMask | None, plan: None
    ) -> tuple[Whole, WholeRemnant]:
        return memory.advance(contribution)

    def retreat_memory(
        self, memory: Whole, projection: Any, mask: ChunkMask | None, remnant: WholeRemnant, plan: None
    ) -> Whole:
        return Whole(remnant.before)

    def contribution(self, total: Any, memory: Tensor | None, whole: Counted | None) -> Tensor | None:
        if memory is None:
            return None
        after: Tensor = total.of(memory)
        if whole is None:
            return after
        rows = (whole.count > 0).view(-1, *(1,) * (memory.dim() - 1))
        return torch.where(rows, after, memory)  # a product with the unit matrix would turn -0.0 into 0.0

    def undo(self, memory: Whole, contribution: None, mask: Any, remnant: WholeRemnant, plan: None) -> Whole:
        return Whole(remnant.before)
