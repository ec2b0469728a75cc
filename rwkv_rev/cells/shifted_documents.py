"""Documents in one row through a cell with a token shift: only its memory needs a row for each of them.

The token shift is an index, so that the heavy parts, the projection and the output, are computed of all tokens as they
stand.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_rev.cells.borders import BorderedChunk
from rwkv_rev.cells.contract import Stream, beside, joined, residual
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recomputation import not_kept
from rwkv_rev.reversal.fingerprint import checksum

if TYPE_CHECKING:
    from rwkv_rev.cells.shifted_cell import ShiftedCell, ShiftedState


def documents(
    cell: "ShiftedCell", values: "ShiftedState", stream: Stream, chunk: BorderedChunk
) -> tuple[Stream, Tensor, Tensor | None, Callable[[], Tensor]]:
    """Output, shift, memory after the chunk; what computes checksums of shift and memories after each document."""
    x, mixes = residual(stream), cell.mixes()
    mixed, shift, again = chunk.mixes(x, values.shift, chunk.starts.shift, mixes)
    with not_kept(mixed, again):
        projection = cell.project(*mixed, *beside(stream))
    if values.memory is None:
        chunk.keep([], [x])
        read, _ = cell.compute(projection, None, chunk.mask)
        out = cell.output_of(projection, read)
        return joined(out, cell.handed_up(projection)), shift, None, lambda: checksum(shift)[None]
    read, ends = memories(cell, projection, values.memory, chunk)
    chunk.keep([ends], [x])
    memory = ends.index_select(0, chunk.last)
    stream = joined(cell.output_of(projection, read), cell.handed_up(projection))
    return stream, shift, memory, lambda: torch.stack([checksum(shift), checksum(ends)])


def memories(
    cell: "ShiftedCell", projection: Any, memory: Tensor, chunk: BorderedChunk
) -> tuple[Tensor, Tensor]:
    """What is read [B, C, ...], and the memory after each document [P, ...]; rows go on from ``memory`` [B, ...]."""
    fields: tuple[Any, ...] = (projection,) if isinstance(projection, Tensor) else projection
    of_tokens = [isinstance(part, Tensor) and part.dim() > 2 for part in fields]  # not [H, N], of all of them

    def step(
        parts: list[Tensor], state: list[Tensor], mask: ChunkMask | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        given = iter(parts)
        own = [next(given) if each else part for part, each in zip(fields, of_tokens, strict=True)]
        piece = own[0] if isinstance(projection, Tensor) else getattr(type(projection), "_make", tuple)(own)
        read, contribution = cell.compute(piece, state[0], mask)
        return [read], [cell.update(state[0], piece, contribution, mask)]

    parts = [part for part, each in zip(fields, of_tokens, strict=True) if each]
    (read,), (ends,) = chunk.run(step, parts, [memory], [chunk.starts.memory])
    return read, ends
