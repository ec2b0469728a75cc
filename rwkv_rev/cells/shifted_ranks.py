"""A chunk that is split over ranks, through a cell with a token shift.

Each rank projects its own tokens; the first is mixed with the last token of the rank before. What its tokens do to the
memory, whatever that is, is a piece (:mod:`rwkv_rev.cells.state_pieces`); the pieces are exchanged
(:mod:`rwkv_rev.distributed.state_exchange`), and each rank's tokens read the memory that the ranks before it leave. All
ranks advance the same exact memory by the composition of all pieces, to the same bits.

Where what tokens read pulls at the memory before them by itself (:meth:`.ShiftedCell.pull`), pieces are exchanged
without a graph, and in the gradient what they pull is (:mod:`rwkv_rev.cells.memory_between_ranks`).

Where a piece costs more than what the tokens read (a matrix, for RWKV-7) and the ranks are few, the memory goes from
rank to rank instead (:attr:`.ReversibleCell.relayed_ranks`): each waits for the recurrence, and for nothing else, of
the one before; in a kernel that can (:meth:`.ShiftedCell.relayed`), for its scan over states alone.

The token shift is kept as it is, not mixed with the chunk's first token, which other ranks do not know.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.cells.borders import BorderedChunk
from rwkv_rev.cells.contract import (
    Advanced,
    Again,
    Forwards,
    OnceMore,
    Replay,
    Stream,
    beside,
    detached,
    joined,
    leaves,
    residual,
)
from rwkv_rev.cells.memory_between_ranks import handed_in, handed_out
from rwkv_rev.cells.recomputation import not_kept
from rwkv_rev.cells.shared_chunk import SharedChunk, tied
from rwkv_rev.cells.shifted_documents import memories
from rwkv_rev.cells.shifted_state import ExactShiftedState, ShiftedRemnant, ShiftedState
from rwkv_rev.cells.token_shift import Border, last_token, mix, token_mixes
from rwkv_rev.distributed.state_exchange import exchange, gather
from rwkv_rev.reversal.additive import NoRemnant
from rwkv_rev.reversal.fingerprint import checksum

if TYPE_CHECKING:
    from rwkv_rev.cells.shifted_cell import ShiftedCell


class Shares(NamedTuple):
    """What a rank has computed of its piece before it knows the memory.

    Attributes:
        projection: of its tokens.
        shift: [B, D], the chunk's last token.
        before: what the ranks before this one do to the memory; None for the first, and without a memory.
        total: what all of them do; None without a memory, and where that goes from rank to rank.
        own: what this rank's tokens do, where :meth:`.ShiftedCell.pull` is asked for the gradient; else None.
    """

    projection: Any
    shift: Tensor
    before: Any
    total: Any
    own: Any = None


def over_ranks(
    cell: "ShiftedCell", stream: Stream, asked: Any, chunk: SharedChunk
) -> tuple[Stream | None, Any]:
    """:meth:`.ReversibleCell.forward` of this rank's piece of a chunk."""
    if isinstance(asked, Forwards):
        cell.check_plan(asked.plan)
        with torch.no_grad():
            advanced = _advance(cell, stream, asked, chunk)
        return advanced.out, advanced
    if isinstance(asked, Again):
        cell.check_plan(asked.plan)
        replay = _replay(cell, stream, asked, chunk)
        return replay.out, replay
    values = asked.values if isinstance(asked, OnceMore) else asked
    shares = _shares(cell, stream, values.shift, chunk, None, remembers=values.memory is not None)
    out, memory = _read(cell, shares, values.memory, chunk, None)
    return out, values._replace(shift=shares.shift.clone(), memory=memory)


def _advance(cell: "ShiftedCell", stream: Stream, asked: Forwards, chunk: SharedChunk) -> Advanced:
    state, plan = kept_shift(asked.state, residual(stream)), asked.plan
    assert state.carried is not None
    values, memory = cell.values(state), state.memory
    shares = _shares(cell, stream, values.shift, chunk, plan, remembers=memory is not None)
    out = left = None
    if asked.output or memory is not None:
        out, left = _read(cell, shares, values.memory, chunk, plan)
    remnant: Any = None
    if memory is not None and chunk.resets is None:
        found = _contribution(cell, shares, values.memory, left, chunk)
        memory, remnant = cell.advance_memory(memory, None, found, chunk.whole, plan.memory)
    elif left is not None:
        memory = cell.exact_memory(left)
    forgotten = ShiftedRemnant(state.carried, remnant) if chunk.resets is None else NoRemnant()
    return Advanced(ExactShiftedState(shares.shift, memory), out, forgotten, _print(shares, left))


def _replay(cell: "ShiftedCell", stream: Stream, asked: Again, chunk: SharedChunk) -> Replay:
    plan, after, x = asked.plan, asked.after, residual(stream)
    remembers = asked.state.memory is not None
    if asked.remnant is None:
        before = kept_shift(asked.state, x)
    else:
        before = kept_shift(ExactShiftedState(asked.remnant.carried, None), x)
    shift = leaves(ShiftedState(before.shift)).shift
    shares = _shares(cell, stream, shift, chunk, plan, remembers=remembers)
    if asked.remnant is not None and remembers:
        with torch.no_grad():
            whole = chunk.whole
            found = None if shares.total is None else cell.contribution(shares.total, None, whole)
            memory = cell.undo(asked.state.memory, found, whole, asked.remnant.memory, plan.memory)
        before = replace(before, memory=memory)
    start = ShiftedState(shift, leaves(cell.values(before)).memory)
    out, left = _read(cell, shares, start.memory, chunk, plan)
    end = ShiftedState(shares.shift.clone(), left)
    handed_on = None
    if after is not None:
        with torch.no_grad():
            kept = None
            if chunk.resets is not None:
                kept = cell.exact(detached(end)).memory
            elif remembers and not (asked.remnant is not None and cell.inverts_memory):
                found = _contribution(cell, shares, start.memory, left, chunk)
                kept, _ = cell.advance_memory(before.memory, None, found, chunk.whole, plan.memory)
            handed_on = cell.is_left(ExactShiftedState(shares.shift.detach(), kept), after)
    return Replay(before, out, start, end, _print(shares, left), handed_on)


def kept_shift(state: ExactShiftedState, x: Tensor) -> ExactShiftedState:
    """The state with a carried y that is its token shift, in the dtype of x; one that has a y keeps it."""
    if state.carried is not None:
        return state
    border = Border(torch.zeros_like(x[:, 0]), torch.zeros(x.shape[2], dtype=torch.float64, device=x.device))
    y = border.carry(state.shift)
    return ExactShiftedState(y, state.memory, y, border)


def _shares(
    cell: "ShiftedCell", stream: Stream, shift: Tensor, chunk: SharedChunk, plan: Any, *, remembers: bool
) -> Shares:
    x, mixes, own = residual(stream), cell.mixes(), chunk.own
    shift = shift.to(x.dtype)
    last = last_token(x, torch.zeros_like(shift), chunk.mask)
    here, after = chunk.shifts(gather(last, chunk.group), shift)

    def mixed() -> Any:
        if isinstance(own, BorderedChunk):
            shifted, _ = own.shifted(x, here, own.starts.shift)
            return [mix(x, shifted, mu) for mu in mixes]
        return token_mixes(x, here, own, mixes)

    made = mixed()
    with not_kept(made, mixed):
        projection = cell.project(*made, *beside(stream))
    if not remembers or _relays(cell, chunk):
        return Shares(projection, after, None, None)
    if cell.pulls and chunk.resets is None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            piece = cell.piece(projection, chunk, plan)
            return Shares(projection, after, *_exchanged(cell, projection, piece, chunk), piece)
    with torch.autocast(x.device.type, enabled=False):
        piece = cell.piece(projection, chunk, plan)
        if isinstance(own, BorderedChunk):
            assert chunk.resets is not None
            _, ends = memories(cell, projection, cell.nothing(projection), own)
            piece = piece.beginning(chunk.resets[chunk.group.rank], ends.index_select(0, own.last))
        elif chunk.resets is not None:
            piece = replace(piece, update=tied(piece.update, chunk.starts.memory))
        return Shares(projection, after, *_exchanged(cell, projection, piece, chunk))


def _exchanged(
    cell: "ShiftedCell", projection: Any, piece: Any, chunk: SharedChunk, *, reverse: bool = False
) -> tuple[Any, Any]:
    def received(rank: int, sent: list[Tensor]) -> Any:
        return cell.received(rank, sent, projection, chunk)

    return exchange(piece, received, chunk.group, reverse=reverse)


def _read(
    cell: "ShiftedCell", shares: Shares, memory: Tensor | None, chunk: SharedChunk, plan: Any
) -> tuple[Stream, Tensor | None]:
    """What this rank's tokens give, from the memory before the chunk, and the memory after it."""
    projection, of_tokens = shares.projection, None if plan is None else plan.memory
    left = None
    if memory is None:
        read, _ = cell.compute(projection, None, chunk.mask, of_tokens)
    elif shares.total is None:
        read, left = _relayed(cell, projection, memory, chunk, of_tokens)
    elif shares.own is not None:
        read, left = _between(cell, shares, memory, chunk, of_tokens)
    else:
        with torch.autocast(memory.device.type, enabled=False):
            left = shares.total.of(memory)
            if shares.before is not None:
                memory = shares.before.of(memory)
            elif chunk.resets is not None:
                memory = tied(memory, left)
        read, _ = _read_here(cell, projection, memory, chunk, of_tokens)
    return joined(cell.output_of(projection, read), cell.handed_up(projection)), left


def _read_here(
    cell: "ShiftedCell", projection: Any, memory: Tensor, chunk: SharedChunk, plan: Any
) -> tuple[Tensor, Any]:
    """What this rank's tokens read, from the memory before them, and its contribution; after documents, the memory."""
    if isinstance(chunk.own, BorderedChunk):
        read, ends = memories(cell, projection, memory, chunk.own)
        return read, ends.index_select(0, chunk.own.last)
    return cell.compute(projection, memory, chunk.mask, plan)


def _between(
    cell: "ShiftedCell", shares: Shares, memory: Tensor, chunk: SharedChunk, plan: Any
) -> tuple[Tensor, Tensor]:
    """What this rank's tokens read, and the memory after the chunk, from pieces without a graph."""
    projection, own = shares.projection, shares.own
    with torch.no_grad(), torch.autocast(memory.device.type, enabled=False):
        left = shares.total.of(memory)
        value = memory if shares.before is None else shares.before.of(memory)
    if not torch.is_grad_enabled():
        return cell.compute(projection, value, chunk.mask, plan)[0], left
    before = handed_in(memory, value, chunk.group)
    read, contribution = cell.compute(projection, before, chunk.mask, plan)
    after = cell.update(before, projection, contribution, chunk.mask)

    def after_this(d_read: Tensor, wanted: Tensor) -> Tensor:
        piece = replace(own, update=cell.pull(projection, d_read, chunk.mask))
        later, _ = _exchanged(cell, projection, piece, chunk, reverse=True)
        return wanted if later is None else later.of(wanted)

    return handed_out(read, after, left, after_this, chunk.group)


def _relays(cell: "ShiftedCell", chunk: SharedChunk) -> bool:
    return chunk.group.size <= cell.relayed_ranks


def _relayed(
    cell: "ShiftedCell", projection: Any, memory: Tensor, chunk: SharedChunk, plan: Any
) -> tuple[Tensor, Tensor]:
    """What this rank's tokens read, and the memory after the chunk, which goes from rank to rank.

    Every rank takes part in all of it, in the gradients, too: what it hands on in the turn of another is nothing.
    """
    if chunk.counts is None and chunk.resets is None:
        inside = cell.relayed(projection, memory, chunk.group)
        if inside is not None:
            return inside
    read, nothing = None, tied(torch.zeros_like(memory), memory)
    for each in (part for part in projection if isinstance(part, Tensor) and part.dim() > 2):
        nothing = tied(nothing, each[:, :1].flatten(1).sum(1).view(-1, *(1,) * (memory.dim() - 1)))
    if chunk.starts is not None:
        nothing = tied(nothing, chunk.starts.memory)
    for rank in range(chunk.group.size):
        handed_on = tied(nothing, memory)
        if rank == chunk.group.rank:
            read, left = _read_here(cell, projection, tied(memory, nothing), chunk, plan)
            # of a piece that ends in padding behind a border nothing else might depend on what came before it
            handed_on = tied(tied(left, nothing), memory)
        memory = gather(handed_on, chunk.group)[rank]
    assert read is not None
    return read, memory


def _contribution(
    cell: "ShiftedCell", shares: Shares, before: Tensor | None, after: Tensor | None, chunk: SharedChunk
) -> Any:
    """What the exact memory is advanced by; where it goes from rank to rank, the memory after the chunk."""
    if shares.total is None:
        return None if after is None else after.detach()
    return cell.contribution(shares.total, before, chunk.whole)


def _print(shares: Shares, left: Tensor | None) -> Tensor:
    """Checksums, int64, of the shift after the chunk and of what the chunk does to the memory."""
    parts = [] if left is None else [left] if shares.total is None else shares.total.sent()
    return torch.stack([checksum(part) for part in (shares.shift, *parts)])
