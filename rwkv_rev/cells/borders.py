"""Documents packed into one row: a *border* stands where one begins, and the state starts anew there.

A chunk with borders is cut into *pieces*, each of one document. A piece is a row of its own to the cell: the first one
of a row goes on from the row's state, all others begin with the start of every document. Rows of many lengths would be
mostly padding, so the pieces are run in *spans* of time, sorted by length: in each span all pieces that reach into it,
from the states that the span before left. Where the spans are cut is chosen by what padding and calls cost
(:func:`ends_of_spans`). Kernels see ordinary rows, at most with a mask at their ends.

    pieces of 5, 3 and 1 tokens      a b c d e       spans: (3 rows, 1 token), (2 rows, 2 tokens), (1 row, 2 tokens)
                                     f g h
                                     i

A border is a factor of zero: what the state forgets there is all of it. Its gradient goes to the start, as a sum over
the documents. A masked token belongs to the document before it, and reads what it would in a chunk without borders: the
same wherever chunks begin. Cost: that of the tokens, masked ones too, some padding, and a state for each piece while
its chunk is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from rwkv_rev.cells.device_copy import on_device
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.moved_rows import moved
from rwkv_rev.cells.token_shift import mix
from rwkv_rev.document_ends import DocumentEnds
from rwkv_rev.wkv.dispatch import is_fused

if TYPE_CHECKING:
    from rwkv_rev.cells.shared_chunk import SharedChunk

Step = Callable[[list[Tensor], list[Tensor], ChunkMask | None], tuple[list[Tensor], list[Tensor]]]
"""From tensors [S, l, ...] of a stream, [S, ...] of a state, and a mask, to those of the output and the state after."""


class Piece(NamedTuple):
    """Tokens of one document in one row of a chunk; ``places`` are theirs in the flattened [B C], masked ones too."""

    row: int
    places: np.ndarray
    goes_on: bool  # from the row's state


class Span(NamedTuple):
    """Tokens of the S longest pieces from one time to another.

    Attributes:
        rows: S.
        length: l.
        mask: None where no piece ends inside, and no token is masked.
    """

    rows: int
    length: int
    mask: ChunkMask | None


@dataclass(frozen=True)
class Borders:
    """Where documents begin in a batch, on the host, where chunks are laid out.

    Attributes:
        at: [B, T] bool, true at a document's first token, which is a valid one.
        valid: [B, T] bool; None where every token counts.
        starts: what every document begins with: the values, without a batch, of each cell of each layer. They may
            require gradients.
        width: D, of the model.
        ends: where documents end; None where nobody asks for their final states.
    """

    at: Tensor
    valid: Tensor | None
    starts: Any
    width: int = 256
    ends: DocumentEnds | None = None

    def part(self, start: int, stop: int) -> "Borders":
        """Of the tokens ``start`` to ``stop``."""
        valid = None if self.valid is None else self.valid[:, start:stop]
        ends = None if self.ends is None else self.ends.part(start, stop)
        return replace(self, at=self.at[:, start:stop], valid=valid, ends=ends)

    def taken(self, places: Tensor) -> "Borders":
        """Of the tokens at ``places``, int64 [n]."""
        valid = None if self.valid is None else self.valid.index_select(1, places)
        ends = None if self.ends is None else self.ends.taken(places)
        return replace(self, at=self.at.index_select(1, places), valid=valid, ends=ends)

    @torch.compiler.disable
    def chunk(self, device: torch.device) -> "BorderedChunk | ChunkMask | None":
        """What cells are handed of all of it as one chunk: a mask, where it has no border."""
        valid = None if self.valid is None or bool(self.valid.all()) else self.valid
        if bool(self.at.any()):
            call = call_cost(device, self.width)
            numbers = None if self.ends is None else self.ends.numbers
            return BorderedChunk.of(self.at, valid, self.starts, device, call, numbers)
        return None if valid is None else ChunkMask.of(valid.to(device))


@dataclass(frozen=True)
class BorderedChunk:
    """A chunk with borders, in the place of a mask.

    Attributes:
        mask: of the chunk as it stands.
        spans: see the module's docstring.
        rows: [n] int64, the batch rows whose first piece goes on from their state, in order.
        order: [P] int64, for every piece its place among those states, followed by a start for each other piece.
        tokens: [M] int64, of all spans' rows the places in the flattened [B C]; where a piece has ended, its first.
        places: [B C] int64, of each token among the M.
        padding: [M] bool, where pieces have ended; None where none has inside of a span.
        last: [B] int64, the last piece of each row.
        before: [B C] int64, the valid token before each: in the tokens behind the B rows' states and the start.
        ends: [B] int64, the last valid token of each row in the same; the row's state for a row without any.
        begins: [B, C] uint8, 1 where a document begins.
        starts: of the model, a layer, or a cell (:meth:`of_part`).
        ended: [E] int64, the pieces whose documents end, and their last valid tokens in the flattened [B C], by the
            documents' numbers; None where nobody asks for their states.
        kept: these states, of each cell by its layer and its place there.
        path: of the cell.
    """

    mask: ChunkMask | None
    spans: Sequence[Span]
    rows: Tensor
    order: Tensor
    tokens: Tensor
    places: Tensor
    padding: Tensor | None
    last: Tensor
    before: Tensor
    ends: Tensor
    begins: Tensor
    starts: Any
    ended: tuple[Tensor, Tensor] | None = None
    kept: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    path: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        at: Tensor,
        valid: Tensor | None,
        starts: Any,
        device: torch.device,
        call: int,
        numbers: Tensor | None = None,
    ) -> "BorderedChunk":
        """From borders and valid tokens [B, C] on the host; ``call`` as in :func:`ends_of_spans`.

        ``numbers``: of :class:`rwkv_rev.document_ends.DocumentEnds`.
        """
        batch, length = at.shape
        counts = np.ones(at.shape, bool) if valid is None else valid.numpy()
        pieces = _pieces(at.numpy())
        pieces.sort(key=lambda piece: -len(piece.places))
        lengths = np.array([len(piece.places) for piece in pieces])
        places = np.empty(at.numel(), np.int64)
        tokens, inside, counted, made = [], [], [], 0
        for start, stop in pairwise([0, *ends_of_spans(lengths, call)]):
            rows = int((lengths > start).sum())
            index = np.zeros((rows, stop - start), np.int64)
            for row, piece in enumerate(pieces[:rows]):
                part = piece.places[start:stop]
                index[row] = part[0]
                index[row, : len(part)] = part
                first = made + row * (stop - start)
                places[part] = np.arange(first, first + len(part))
            made += index.size
            tokens.append(index.reshape(-1))
            inside.append(np.arange(start, stop) < lengths[:rows, None])
            counted.append(inside[-1] & counts.reshape(-1)[index])
        padding = ~np.concatenate([flags.reshape(-1) for flags in inside])
        going_on = [number for number, piece in enumerate(pieces) if piece.goes_on]
        order = np.full(len(pieces), -1, np.int64)
        order[going_on] = np.arange(len(going_on))
        order[order < 0] = np.arange(len(going_on), len(pieces))
        last = np.zeros(batch, np.int64)
        for number, piece in enumerate(pieces):
            if piece.places[-1] == (piece.row + 1) * length - 1:
                last[piece.row] = number
        rows_of = np.arange(batch)[:, None]
        latest = np.maximum.accumulate(np.where(counts, np.arange(length), -1), axis=1)
        latest = np.where(latest < 0, -1, latest + rows_of * length)  # in the flattened [B C]
        # in the tokens behind the states and the start; a border stands on a valid token, so that none looks beyond it
        reached = np.where(latest < 0, rows_of, latest + batch + 1)
        before = np.where(at.numpy(), batch, np.concatenate([rows_of, reached[:, :-1]], axis=1)).reshape(-1)
        ended = []
        if numbers is not None:
            lasts = latest.reshape(-1)[[piece.places[-1] for piece in pieces]]
            of_pieces = np.where(lasts < 0, -1, numbers.flatten().numpy()[lasts])
            chosen = np.argsort(of_pieces, kind="stable")[(of_pieces < 0).sum() :]
            ended = [chosen, lasts[chosen]]
        rows_going_on = np.array([pieces[number].row for number in going_on], np.int64)
        indices = [rows_going_on, order, np.concatenate(tokens), places, last, before, reached[:, -1]]
        flags = [at.numpy(), padding, *counted, *([] if valid is None else [counts])]
        found = on_device([*indices, *ended], device)
        begins, *known = on_device([each.astype(np.uint8) for each in flags], device)
        padded, *masks = (each.view(torch.bool) for each in known)
        spans = []
        for there, mask in zip(counted, masks, strict=False):
            everywhere = bool(there.any(axis=1).all())
            of_span = None if there.all() else ChunkMask.of(mask, everywhere=everywhere)
            spans.append(Span(there.shape[0], there.shape[1], of_span))
        return cls(
            mask=None if valid is None else ChunkMask.of(masks[-1]),
            spans=spans,
            rows=found[0],
            order=found[1],
            tokens=found[2],
            places=found[3],
            padding=padded if padding.any() else None,
            last=found[4],
            before=found[5],
            ends=found[6],
            begins=begins,
            starts=starts,
            ended=None if numbers is None else (found[7], found[8]),
        )

    def of_part(self, index: int) -> "BorderedChunk":
        """For one of the layers, or of a layer's cells."""
        return replace(self, starts=self.starts[index], path=(*self.path, index))

    def keep(self, ends: Sequence[Tensor], tokens: Sequence[Tensor] = ()) -> None:
        """Of the final states of a cell's documents what is asked for.

        Args:
            ends: the parts of the state after each piece, [P, ...].
            tokens: parts before them that are a vector of the last token, [B, C, ...].
        """
        if self.ended is not None:
            pieces, lasts = self.ended
            self.kept[self.path] = [
                *(part.flatten(0, 1).index_select(0, lasts) for part in tokens),
                *(part.index_select(0, pieces) for part in ends),
            ]

    def run(
        self, step: Step, stream: list[Tensor], state: list[Tensor], starts: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The output [B, C, ...], and the state after each piece [P, ...]; of the row's end is :attr:`last`.

        Args:
            step: one cell's chunk.
            stream: [B, C, ...].
            state: [B, ...], before the chunk.
            starts: what documents begin with, without a batch.
        """
        states = [self._begun(part, start) for part, start in zip(state, starts, strict=True)]
        sizes = [span.rows * span.length for span in self.spans]
        flat = [moved(x.flatten(0, 1), self.tokens, self.places, None, None).split(sizes) for x in stream]
        outputs: list[list[Tensor]] = []
        ended: list[list[Tensor]] = []
        for number, span in enumerate(self.spans):
            if span.rows < len(self.order):
                ended.append([part[span.rows :] for part in states])
            given = [parts[number].unflatten(0, (span.rows, -1)) for parts in flat]
            out, states = step(given, [part[: span.rows] for part in states], span.mask)
            outputs.append([part.flatten(0, 1) for part in out])
        ended.append(states)
        batch = stream[0].shape[:2]
        return (
            [self._together(parts).unflatten(0, batch) for parts in zip(*outputs, strict=True)],
            [_joined(parts[::-1]) for parts in zip(*ended, strict=True)],
        )

    def mixes(
        self, x: Tensor, shift: Tensor, start: Tensor, mus: list[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, Callable[[], Sequence[Tensor]]]:
        """Mixes of tokens x [B, C, D] with the ones before them, the last of each row [B, D], and the former again.

        ``shift`` and ``start`` as of :meth:`shifted`. On a CUDA device in one launch, if no token is masked.
        """
        if self.mask is None and not start.requires_grad and is_fused(x):
            from rwkv_rev.cells import triton_token_shift

            begun = (self.begins, start)

            def again() -> Sequence[Tensor]:
                return triton_token_shift.token_mixes(x, shift, mus, begun)

            return *triton_token_shift.mixes_and_last(x, shift, mus, begun), again
        before, last = self.shifted(x, shift, start)
        return [mix(x, before, mu) for mu in mus], last, lambda: [mix(x, before, mu) for mu in mus]

    def shifted(self, x: Tensor, shift: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens x [B, C, D] the ones before them [B, C, D], and the last of each row [B, D].

        ``shift`` [B, D] stands before the rows, ``start`` [D] before each document.
        """
        tokens = torch.cat([shift.to(x.dtype), start.to(x.dtype)[None], x.flatten(0, 1)])
        return tokens.index_select(0, self.before).view_as(x), tokens.index_select(0, self.ends)

    def _begun(self, state: Tensor, start: Tensor) -> Tensor:
        """What each piece begins with, [P, ...]."""
        if not len(self.rows):
            return start.to(state.dtype).expand(len(self.order), *start.shape)
        rows = state.index_select(0, self.rows)
        # not by an index: the gradient of a start is a sum, in one order
        starts = start.to(state.dtype).expand(len(self.order) - len(rows), *start.shape)
        return torch.cat([rows, starts]).index_select(0, self.order)

    def _together(self, outputs: Sequence[Tensor]) -> Tensor:
        """[B C, ...] from the outputs of all spans."""
        return moved(_joined(outputs), self.places, self.tokens, None, self.padding)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def part_of(borders: Borders | None, start: int, stop: int) -> Borders | None:
    """Borders of the tokens ``start`` to ``stop``."""
    return None if borders is None else borders.part(start, stop)


def mask_of(
    valid: Tensor | None, borders: Borders | None, device: torch.device, count: int
) -> "BorderedChunk | ChunkMask | None":
    """What cells are handed of the first ``count`` of some tokens, of which these are valid and have these borders."""
    if borders is not None:
        return borders.part(0, count).chunk(device)
    return None if valid is None else ChunkMask.of(valid[:, :count])


Mask = Union[ChunkMask, BorderedChunk, "SharedChunk", None]
"""Which tokens of a chunk count, where documents begin, and who has them; None where all do, none does, and we have."""


def of_part(mask: Mask, index: int) -> Mask:
    """What a layer, or a layer's cell, is handed of a mask."""
    return mask if mask is None or isinstance(mask, ChunkMask) else mask.of_part(index)


def call_cost(device: torch.device, width: int) -> int:
    """Tokens of a row that cost as much as a further call of a cell of this width D.

    Launches take as long at any width, on a GPU as long as many tokens.
    """
    return max(1, 2**23 // width if device.type == "cuda" else 2**20 // width**2)


def _pieces(at: np.ndarray) -> list[Piece]:
    """The pieces of a chunk [B, C] by rows."""
    pieces = []
    for row, begins in enumerate(at):
        first = begins.nonzero()[0].tolist()
        goes_on = not begins[0]
        for start, stop in pairwise([*([0] if goes_on else []), *first, len(begins)]):
            places = row * len(begins) + np.arange(start, stop)
            pieces.append(Piece(row, places, goes_on and start == 0))
    return pieces


def ends_of_spans(lengths: np.ndarray, call: int) -> list[int]:
    """Where to cut the time of pieces so long: the least padding, if a call costs as much as so many tokens."""
    ends = sorted({0, *lengths.tolist()})
    reaching = [int((lengths > end).sum()) for end in ends]
    costs, before = [0], [0]
    for stop in range(1, len(ends)):
        tried = [costs[start] + reaching[start] * (ends[stop] - ends[start]) + call for start in range(stop)]
        before.append(min(range(stop), key=tried.__getitem__))
        costs.append(tried[before[-1]])
    found = []
    stop = len(ends) - 1
    while stop > 0:
        found.append(ends[stop])
        stop = before[stop]
    return found[::-1]
