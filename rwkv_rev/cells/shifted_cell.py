"""The kind of cell that RWKV is made of: a token shift, then a memory that reads and writes once per chunk.

Such a cell computes in four strokes, which its subclasses fill in: project the input mixed with the token before (the
only heavy part), compute the output and the chunk's contribution to the memory, and update the memory once. The
contract that it keeps is :mod:`rwkv_rev.cells.contract`; x_{a-1} comes back through its carried ``y``
(:mod:`rwkv_rev.cells.token_shift`), so that the law ``retreat(advance(s)) == s`` holds of states whose x_{a-1} has been
through y once.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from rwkv_rev.cells.at_once import of_all
from rwkv_rev.cells.borders import BorderedChunk
from rwkv_rev.cells.cell_plan import CellPlan
from rwkv_rev.cells.changing import refuse_changing
from rwkv_rev.cells.contract import (
    Advanced,
    Replay,
    ReversibleCell,
    Stream,
    beside,
    joined,
    leaves,
    residual,
)
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recomputation import not_kept
from rwkv_rev.cells.shared_chunk import Counted, SharedChunk
from rwkv_rev.cells.shifted_documents import documents
from rwkv_rev.cells.shifted_ranks import over_ranks
from rwkv_rev.cells.shifted_state import ExactShiftedState, ShiftedRemnant, ShiftedState
from rwkv_rev.cells.token_shift import (
    Border,
    carried_mix,
    carried_mixes,
    last_token,
    mixes_and_last,
    token_mixes,
)
from rwkv_rev.distributed.context_group import ContextGroup
from rwkv_rev.errors import StrategyError
from rwkv_rev.reversal.fingerprint import checksum, same_bits
from rwkv_rev.reversal.memory import Memory


class ShiftedCell(ReversibleCell):
    """A reversible cell with a token shift of constant mixes."""

    shifts = 1
    mixes_are_tokens = False  # whether they are 1 and 0: the token itself, and the one before

    # --- what a cell fills in ---------------------------------------------------------------------------------

    @abstractmethod
    def mixes(self) -> list[Tensor]:
        """The cell's token-mix coefficients mu, each [D]."""

    @abstractmethod
    def project(self, *mixed: Tensor) -> Any:
        """Linear maps of the mixed inputs [B, C, D], one for each of :meth:`mixes`; independent of the memory.

        A tensor, or a tuple in which those of more than two dimensions are [B, C, ...], of each token.

        A cell that ``reads_beside`` is given what flows beside the residual, too, behind them.
        """

    @abstractmethod
    def compute(
        self, projection: Any, memory: Tensor | None, mask: ChunkMask | None, plan: Any = None
    ) -> tuple[Tensor, Any]:
        """What is read [B, C, ...] and the chunk's contribution to the memory, a tensor or a tuple of them.

        ``plan`` saves time, where there is one.
        """

    def output_of(self, projection: Any, read: Tensor) -> Tensor:
        """Output [B, C, D] of what :meth:`compute` read, each token by itself; of packed documents as they stand."""
        return read

    def handed_up(self, projection: Any) -> tuple[Tensor, ...]:
        """What is to flow beside the residual from here on, [B, C, ...] each; nothing new when empty."""
        return ()

    def update(
        self, memory: Tensor | None, projection: Any, contribution: Any, mask: ChunkMask | None
    ) -> Any:
        """The memory after the chunk, differentiable."""
        return None

    def memory_plan(self, length: int, piece: int | None = None) -> Any:
        """What chunks of C = ``length`` tokens need of the weights beyond themselves, or None."""
        return None

    def plan_sources(self) -> list[Tensor]:
        """The parameters that :meth:`plan` reads."""
        return self.mixes()

    def exact_memory(self, memory: Tensor) -> Memory:
        """The exact form of a memory."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def memory_dtype(self) -> torch.dtype:
        """What outputs read the memory in."""
        return torch.float32

    def advance_memory(
        self, memory: Any, projection: Any, contribution: Any, mask: Any, plan: Any
    ) -> tuple[Any, Any]:
        """The exact memory after the chunk and its remnant; over ranks the ``projection`` is None, the mask a count."""
        return None, None

    def retreat_memory(
        self, memory: Any, projection: Any, mask: ChunkMask | None, remnant: Any, plan: Any
    ) -> Any:
        """The exact memory before the chunk, from the one after it."""
        return None

    # --- the same where a chunk is split over ranks -------------------------------------------------------------

    def nothing(self, projection: Any) -> Tensor:
        """The memory [B, ...] before the first token."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def piece(self, projection: Any, chunk: SharedChunk, plan: Any = None) -> Any:
        """What this rank's tokens do to a memory (:class:`~.state_exchange.StatePiece`), differentiable."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def received(self, rank: int, sent: list[Tensor], projection: Any, chunk: SharedChunk) -> Any:
        """The piece of a rank, from what it sent."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def contribution(self, total: Any, memory: Tensor | None, whole: Counted | None) -> Any:
        """What :meth:`advance_memory` takes of a whole chunk's piece; ``memory`` is that before it, where known."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def pull(self, projection: Any, d_read: Tensor, mask: ChunkMask | None) -> Tensor:
        """What the gradient of what tokens read wants of the memory before them; no graph. Where :attr:`pulls`.

        Then gradients take the pieces' way back: with d the one of the memory after this rank's tokens, the one of the
        memory before them is what a piece of this update (:meth:`piece`) makes of d.
        """
        raise NotImplementedError(f"{type(self).__name__} does not pull")

    def relayed(self, projection: Any, memory: Tensor, group: ContextGroup) -> tuple[Tensor, Tensor] | None:
        """What tokens read, and the memory after the chunk, handed on inside a kernel; None where none can."""
        return None

    def undo(self, memory: Any, contribution: Any, mask: Any, remnant: Any, plan: Any) -> Any:
        """The exact memory before a chunk, from the one after it and its contribution."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def _over_ranks(self, x: Any, state: Any, chunk: SharedChunk) -> tuple[Stream | None, Any]:
        return over_ranks(self, x, state, chunk)

    # --- the contract -----------------------------------------------------------------------------------------

    def refuse_changing(self) -> None:
        """Refuse mixes or decays that are others at each look: a parametrization or a method of others draws them.

        Raises:
            StrategyError: for such a cell.
        """
        refuse_changing(self, self.planned_by)

    def planned_by(self) -> list[Tensor]:
        """What a plan is made of, and looked at again in chunks; decays [...] where :meth:`memory_plan` reads them."""
        plans = type(self).memory_plan is not ShiftedCell.memory_plan
        decay = self.log_decay() if plans else None
        return [*self.plan_sources(), *([] if decay is None else [decay])]

    def check_plan(self, plan: CellPlan) -> None:
        if parametrize.is_parametrized(self):  # computed at each look, the same each time
            return
        for now, planned in zip(self.plan_sources(), plan.sources, strict=True):
            if now.data_ptr() != planned.data_ptr():
                raise StrategyError(
                    f"a hook (weight_norm, prune) or a method that is overridden makes the mixes or decays of the "
                    f"{type(self).__name__} of layer {self.layer} anew at each call, and chunks need them before it: "
                    "use a parametrization (torch.nn.utils.parametrizations), or bptt='full'"
                )

    def plan(self, length: int, piece: int | None = None) -> CellPlan:
        """The plan for chunks of C = ``length`` tokens, while the weights stay as they are."""
        memory = self.memory_plan(length) if piece is None else self.memory_plan(length, piece)
        return CellPlan(carried_mix(self.mixes()), memory, tuple(self.plan_sources()))

    @classmethod
    def plan_at_once(
        cls, cells: "Sequence[ShiftedCell]", length: int, piece: int | None = None
    ) -> list[CellPlan]:
        """:meth:`plan` of several layers."""
        memories = of_all(cells, "memory_plan", *((length,) if piece is None else (length, piece)))
        mixes = carried_mixes([cell.mixes() for cell in cells])
        sources = [tuple(cell.plan_sources()) for cell in cells]
        return list(map(CellPlan, mixes, memories, sources))

    def exact(self, state: ShiftedState) -> ExactShiftedState:
        """The exact state nearest to values."""
        memory = None if state.memory is None else self.exact_memory(state.memory.detach())
        return ExactShiftedState(state.shift.detach(), memory)

    @classmethod
    def exact_at_once(
        cls, cells: "Sequence[ShiftedCell]", states: Sequence[ShiftedState]
    ) -> list[ExactShiftedState]:
        """:meth:`exact` of several layers, each of its state."""
        given = [None if state.memory is None else state.memory.detach() for state in states]
        there = [memory is not None for memory in given]
        if any(there) and not all(there):
            return [cell.exact(state) for cell, state in zip(cells, states, strict=True)]
        memories: Sequence[Any] = of_all(cells, "exact_memory", own=given) if any(there) else given
        return [
            ExactShiftedState(state.shift.detach(), memory)
            for state, memory in zip(states, memories, strict=True)
        ]

    def lossy(self, state: ExactShiftedState) -> ExactShiftedState | None:
        return state if state.memory is None else None

    def values(self, state: ExactShiftedState) -> ShiftedState:
        """The values that outputs read from an exact state."""
        return ShiftedState(
            state.shift, None if state.memory is None else state.memory.value(self.memory_dtype())
        )

    def step(
        self, state: ShiftedState, x: Stream, mask: ChunkMask | None = None
    ) -> tuple[Stream, ShiftedState]:
        """Output and next values by plain differentiable arithmetic, no rounding to a grid."""
        projection, last = self._projection(x, state.shift, mask)
        read, contribution = self.compute(projection, state.memory, mask)
        memory = self.update(state.memory, projection, contribution, mask)
        shift = last_token(residual(x), state.shift, mask) if last is None else last
        return joined(self.output_of(projection, read), self.handed_up(projection)), ShiftedState(
            shift, memory
        )

    @torch.no_grad()
    def advance(
        self,
        state: ExactShiftedState,
        x: Stream,
        mask: ChunkMask | None = None,
        plan: CellPlan | None = None,
        *,
        output: bool = True,
    ) -> Advanced:
        """One chunk forwards: the next exact state, the output [B, C, D] and what the chunk forgot.

        Without a memory and without ``output`` no product is computed.
        """
        x, further = residual(x), beside(x)
        plan = plan if plan is not None else self.plan(x.shape[1])
        state = self.carried(state, x, mask, plan)
        assert state.carried is not None
        shift = last_token(x, state.shift, mask)
        if not output and state.memory is None:
            after = ExactShiftedState(shift, None)
            return Advanced(after, None, ShiftedRemnant(state.carried, None), _print(None, shift))
        values = self.values(state)
        mixed = token_mixes(x, state.shift, mask, self.mixes(), as_they_are=self.mixes_are_tokens)
        projection = self.project(*mixed, *further)
        read, contribution = self.compute(projection, values.memory, mask, plan.memory)
        memory, remnant = self.advance_memory(state.memory, projection, contribution, mask, plan.memory)
        return Advanced(
            ExactShiftedState(shift, memory),
            joined(self.output_of(projection, read), self.handed_up(projection)),
            ShiftedRemnant(state.carried, remnant),
            _print(contribution, shift),
        )

    def _projection(self, stream: Stream, shift: Tensor, mask: ChunkMask | None) -> tuple[Any, Tensor | None]:
        """The projection of x [B, C, D], differentiable, for which no mix is kept; the last token where it is there."""
        mixes, x = self.mixes(), residual(stream)
        mixed, last = mixes_and_last(x, shift, mask, mixes, as_they_are=self.mixes_are_tokens)
        with not_kept(mixed, lambda: token_mixes(x, shift, mask, mixes)):
            return self.project(*mixed, *beside(stream)), last

    # --- the same with graph, for the backward sweep ------------------------------------------------------------

    def carried(
        self, state: ExactShiftedState, x: Tensor, mask: ChunkMask | None, plan: CellPlan | None = None
    ) -> ExactShiftedState:
        """The state with its x_{a-1} sent through the carried y (a state that has one keeps it)."""
        if state.carried is not None:
            return state
        mu = carried_mix(self.mixes()) if plan is None else plan.mix
        border = Border.of(x.detach(), mu, mask)
        y = border.carry(state.shift)
        return ExactShiftedState(border.uncarry(y), state.memory, y, border)

    def replay(
        self,
        state: ExactShiftedState,
        x: Stream,
        mask: ChunkMask | None = None,
        plan: CellPlan | None = None,
        after: ExactShiftedState | None = None,
    ) -> Replay:
        """A chunk whose exact state before it is known, with graph; the same bits as ``advance``."""
        plan = plan if plan is not None else self.plan(residual(x).shape[1])
        state = self.carried(state, residual(x), mask, plan)
        start = leaves(self.values(state))
        projection, last = self._projection(x, start.shift, mask)
        return self._finish(state, start, projection, last, residual(x), mask, plan, after, vouched=False)

    def retreat(
        self,
        state: ExactShiftedState,
        x: Stream,
        mask: ChunkMask | None,
        remnant: ShiftedRemnant,
        plan: CellPlan | None = None,
        after: ExactShiftedState | None = None,
    ) -> Replay:
        """A chunk whose exact state *after* it is known: rebuild the one before, then compute with graph."""
        plan = plan if plan is not None else self.plan(residual(x).shape[1])
        border = Border.of(residual(x).detach(), plan.mix, mask)
        shift = border.uncarry(remnant.carried)
        shift_leaf = leaves(ShiftedState(shift, None)).shift
        projection, last = self._projection(x, shift_leaf, mask)
        with torch.no_grad():
            memory = self.retreat_memory(state.memory, projection, mask, remnant.memory, plan.memory)
        before = ExactShiftedState(shift, memory, remnant.carried, border)
        start = ShiftedState(shift_leaf, leaves(self.values(before)).memory)
        vouched = self.inverts_memory
        return self._finish(before, start, projection, last, residual(x), mask, plan, after, vouched=vouched)

    def _finish(
        self,
        state: ExactShiftedState,
        start: ShiftedState,
        projection: Any,
        last: Tensor | None,
        x: Tensor,
        mask: ChunkMask | None,
        plan: CellPlan,
        after: ExactShiftedState | None,
        *,
        vouched: bool,
    ) -> Replay:
        read, contribution = self.compute(projection, start.memory, mask, plan.memory)
        memory = self.update(start.memory, projection, contribution, mask)
        shift = last_token(x, start.shift, mask) if last is None else last
        handed_on = None
        if after is not None:
            update = None if vouched else contribution
            handed_on = self._handed_on(state.memory, projection, update, shift.detach(), after, mask, plan)
        end = ShiftedState(shift, memory)
        stream = joined(self.output_of(projection, read), self.handed_up(projection))
        return Replay(state, stream, start, end, _print(contribution, shift), handed_on)

    @torch.no_grad()
    def _handed_on(
        self,
        memory: Any,
        projection: Any,
        contribution: Any,
        shift: Tensor,
        after: ExactShiftedState,
        mask: ChunkMask | None,
        plan: CellPlan,
    ) -> Tensor:
        """Whether the next chunk's y, and its memory if there is a contribution, are what this chunk leaves; bool."""
        left = None
        if contribution is not None and after.memory is not None:
            left, _ = self.advance_memory(memory, projection, contribution, mask, plan.memory)
        return self.is_left(ExactShiftedState(shift, left), after)

    def _documents(
        self, values: ShiftedState, x: Stream, chunk: BorderedChunk
    ) -> tuple[Stream, ShiftedState, Callable[[], Tensor]]:
        out, shift, memory, print_ = documents(self, values, x, chunk)
        return out, ShiftedState(shift, memory), print_

    def is_left(self, state: ExactShiftedState, after: ExactShiftedState) -> Tensor:
        assert after.border is not None and after.carried is not None
        same = same_bits(after.border.carry(state.shift), after.carried)
        of_memory = super().is_left(state, after)
        return same if of_memory is None else same & of_memory


def _print(contribution: Any, shift: Tensor) -> Tensor:
    """Checksums, int64, of the shift after a chunk and of every part of its contribution to the memory."""
    parts = contribution if isinstance(contribution, tuple) else (contribution,)
    return torch.stack([checksum(part) for part in (shift, *parts) if part is not None])
