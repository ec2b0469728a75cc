"""The EBRT contract: a recurrent cell whose state can be run backwards, a chunk of C >= 1 tokens at a time.

    advance(state, x, mask)           -> state', out, remnant
    reverse(state', x, mask, remnant) -> state, out

x is the cell's own input; in the backward sweep it is known again, because the layers below have just been
recomputed. The laws every cell keeps (tests/cell_laws.py runs any cell through them):

* *write-first*: out depends on the state only through what ``reverse`` rebuilds from state', x and the remnant;
* *write-once*: state' is produced by one update;
* *masked additive update*: ``s' = s + m g(s, x)``, a masked token leaves every part of the state unchanged;
* ``reverse(advance(s)) == s`` and ``advance(reverse(s')) == s'``, bit for bit. For the token shift this holds of
  states whose x_{a-1} has been through its carried ``y`` once (:mod:`rwkv_rev.cells.token_shift`).

A cell computes in four strokes, which its subclasses fill in: project the input (the only heavy part), read the
memory, make the chunk's contribution to it, update it once. ``step`` is the same computation on plain
differentiable states, for contexts whose whole graph fits in memory, and for generation.

Whatever runs a cell calls it as a module, ``cell(x, state, mask)``, so that hooks and wrappers of other tools are
heard in every sweep alike. What ``state`` is says what is to be done: a :class:`FloatState` is stepped, a
:class:`Forwards` advanced, an :class:`Again` computed again with graph.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_rev import random_state
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.token_shift import Border, carried_mix, last_token, token_mixes
from rwkv_rev.errors import StrategyError
from rwkv_rev.reversal.fingerprint import checksum, fingerprint


class FloatState(NamedTuple):
    """A state as ordinary differentiable tensors: shift [B, D] and memory (its shape is the cell's), or None."""

    shift: Tensor
    memory: Tensor | None


@dataclass(frozen=True)
class CellState:
    """A state that is exact to the bit.

    Attributes:
        shift: [B, D], the last valid token's input vector.
        memory: the recurrence's memory in the cell's exact form, or None.
        carried: [B, D], the y that ``shift`` was rebuilt from, when it came out of ``reverse``.
        border: what y was mixed with, likewise.
    """

    shift: Tensor
    memory: Any
    carried: Tensor | None = None
    border: Border | None = None


class Remnant(NamedTuple):
    """What one chunk forgot: the carried y [B, D], and the memory's remnant in the cell's own form, or None."""

    carried: Tensor
    memory: Any


class CellPlan(NamedTuple):
    """What the exact update needs of the weights, computed once per sweep: mu* [D], and the memory's plan.

    ``sources`` are the tensors that both were made of.
    """

    mix: Tensor
    memory: Any
    sources: tuple[Tensor, ...]


class Advanced(NamedTuple):
    """A chunk run forwards: exact state after it, output [B, C, D] (or None), remnant, and the chunk's print."""

    state: CellState
    out: Tensor | None
    remnant: Remnant
    print: Tensor


class Replay(NamedTuple):
    """A chunk computed again, with graph.

    ``state`` is the exact state before the chunk, ``out`` [B, C, D] the output, ``start`` the same state as
    differentiable leaves and ``end`` the differentiable state after the chunk. ``print``, int64 [1 or 2], holds
    checksums of the token shift after the chunk and of what it did to the memory: the same bits in both sweeps.
    ``handed_on``, bool scalar, says whether the chunk after this one began with what this one leaves; None where the
    state after it was not given.
    """

    state: CellState
    out: Tensor
    start: FloatState
    end: FloatState
    print: Tensor
    handed_on: Tensor | None


@dataclass(frozen=True)
class Forwards:
    """Run a chunk forwards from the exact ``state`` before it; without ``output`` where none will be read."""

    state: CellState
    plan: CellPlan
    output: bool = True


@dataclass(frozen=True)
class Again:
    """Compute a chunk again; ``state`` is the exact one before it, or after it where a ``remnant`` is given.

    ``after`` is the state that the chunk after this one began with, to be compared with what this one leaves.
    """

    state: CellState
    plan: CellPlan
    remnant: Remnant | None = None
    after: CellState | None = None


class ReversibleCell(nn.Module, ABC):
    """Base of the cells. Inputs x are [B, C, D]; masks are :class:`ChunkMask` or None for all valid.

    Attributes:
        layer: index of the block the cell is in; only its initialisation depends on it.
        inverts_memory: whether :meth:`retreat_memory` computes the memory before a chunk from the one after it, so
            that the former's print vouches for the latter; else it takes it from the remnant.
    """

    layer: int = 0
    inverts_memory = False

    # --- what a cell fills in ---------------------------------------------------------------------------------

    @abstractmethod
    def mixes(self) -> list[Tensor]:
        """The cell's token-mix coefficients mu, each [D]."""

    @abstractmethod
    def project(self, *mixed: Tensor) -> Any:
        """Linear maps of the mixed inputs [B, C, D], one for each of :meth:`mixes`; independent of the memory."""

    @abstractmethod
    def read(
        self, projection: Any, memory: Tensor | None, mask: ChunkMask | None, plan: Any = None
    ) -> tuple[Tensor, Any]:
        """Output [B, C, D] and the chunk's contribution to the memory; ``plan`` saves time, where there is one."""

    def update(self, memory: Tensor | None, contribution: Any, mask: ChunkMask | None, length: int) -> Any:
        """The memory after the chunk, differentiable; ``length`` is C."""
        return None

    def memory_plan(self, length: int) -> Any:
        """What chunks of C = ``length`` tokens need of the weights beyond themselves, or None."""
        return None

    def plan_sources(self) -> list[Tensor]:
        """The parameters that :meth:`plan` reads."""
        return self.mixes()

    def exact_memory(self, memory: Tensor | None) -> Any:
        """The exact form of a memory."""
        return memory

    def float_memory(self, memory: Any) -> Tensor | None:
        """The tensor that outputs read."""
        return memory

    def advance_memory(
        self, memory: Any, contribution: Any, mask: ChunkMask | None, plan: Any
    ) -> tuple[Any, Any]:
        """The exact memory after the chunk and its remnant."""
        return None, None

    def retreat_memory(
        self, memory: Any, projection: Any, mask: ChunkMask | None, remnant: Any, plan: Any
    ) -> Any:
        """The exact memory before the chunk, from the one after it."""
        return None

    def memory_print(self, memory: Any) -> Tensor:
        """Checksum of an exact memory, int64."""
        return fingerprint(memory)[None]

    # --- the contract -----------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, state: FloatState | Forwards | Again, mask: ChunkMask | None = None
    ) -> tuple[Tensor | None, FloatState | Advanced | Replay]:
        """Output [B, C, D] of a chunk and what else came of it, by what ``state`` asks for.

        Raises:
            StrategyError: where a hook has made other mixes or decays than the plan was made of.
        """
        if isinstance(state, Forwards | Again):
            self._refuse_other_sources(state.plan)
        if isinstance(state, Forwards):
            run = self.advance if state.output else self.advance_shift
            advanced = run(state.state, x, mask, state.plan)
            return advanced.out, advanced
        if isinstance(state, Again):
            if state.remnant is None:
                replay = self.replay(state.state, x, mask, state.plan, state.after)
            else:
                replay = self.reversed_replay(state.state, x, mask, state.remnant, state.plan, state.after)
            return replay.out, replay
        return self.step(state, x, mask)

    def refuse_changing(self) -> None:
        """Refuse a parametrization that gives other mixes or decays at each look, as a plan and the chunks would.

        Raises:
            StrategyError: for such a parametrization.
        """
        if not parametrize.is_parametrized(self):
            return
        generators = random_state.capture({tensor.device for tensor in self.plan_sources()})
        looks = [self.plan_sources() for _ in range(2)]
        random_state.restore(generators)
        if not all(torch.equal(one, other) for one, other in zip(*looks, strict=True)):
            raise StrategyError(
                f"a parametrization of the {type(self).__bases__[0].__name__} of layer {self.layer} gives other mixes "
                "or decays at each look (it draws random numbers, or counts), and chunks need them to stay as they "
                "are: use bptt='full'"
            )

    def _refuse_other_sources(self, plan: CellPlan) -> None:
        if parametrize.is_parametrized(self):  # computed at each look, the same each time
            return
        for now, planned in zip(self.plan_sources(), plan.sources, strict=True):
            if now.data_ptr() != planned.data_ptr():
                raise StrategyError(
                    f"a hook makes the mixes or decays of the {type(self).__name__} of layer {self.layer} anew at each "
                    "call (weight_norm, prune), and chunks need them before it: use a parametrization "
                    "(torch.nn.utils.parametrizations), or bptt='full'"
                )

    def plan(self, length: int) -> CellPlan:
        """The plan for chunks of C = ``length`` tokens, while the weights stay as they are."""
        return CellPlan(carried_mix(self.mixes()), self.memory_plan(length), tuple(self.plan_sources()))

    def exact(self, state: FloatState) -> CellState:
        """The exact state nearest to a float one."""
        memory = None if state.memory is None else self.exact_memory(state.memory.detach())
        return CellState(state.shift.detach(), memory)

    def float_state(self, state: CellState) -> FloatState:
        """The float state that outputs read from an exact one."""
        return FloatState(state.shift, self.float_memory(state.memory))

    def step(self, state: FloatState, x: Tensor, mask: ChunkMask | None = None) -> tuple[Tensor, FloatState]:
        """Output and next state by plain differentiable arithmetic, no rounding to a grid."""
        projection = self.project(*token_mixes(x, state.shift, mask, self.mixes()))
        out, contribution = self.read(projection, state.memory, mask)
        memory = self.update(state.memory, contribution, mask, x.shape[1])
        return out, FloatState(last_token(x, state.shift, mask), memory)

    @torch.no_grad()
    def advance(
        self, state: CellState, x: Tensor, mask: ChunkMask | None = None, plan: CellPlan | None = None
    ) -> Advanced:
        """One chunk forwards: the next exact state, the output [B, C, D] and what the chunk forgot."""
        plan = plan if plan is not None else self.plan(x.shape[1])
        state = self.carried(state, x, mask, plan)
        projection = self.project(*token_mixes(x, state.shift, mask, self.mixes()))
        out, contribution = self.read(projection, self.float_memory(state.memory), mask, plan.memory)
        memory, remnant = self.advance_memory(state.memory, contribution, mask, plan.memory)
        assert state.carried is not None
        shift = last_token(x, state.shift, mask)
        return Advanced(
            CellState(shift, memory), out, Remnant(state.carried, remnant), _print(contribution, shift)
        )

    @torch.no_grad()
    def advance_shift(self, state: CellState, x: Tensor, mask: ChunkMask | None, plan: CellPlan) -> Advanced:
        """:meth:`advance` without the output, of a cell without memory: its products are not computed."""
        state = self.carried(state, x, mask, plan)
        assert state.carried is not None and state.memory is None
        shift = last_token(x, state.shift, mask)
        return Advanced(CellState(shift, None), None, Remnant(state.carried, None), _print(None, shift))

    @torch.no_grad()
    def reverse(
        self,
        state: CellState,
        x: Tensor,
        mask: ChunkMask | None,
        remnant: Remnant,
        plan: CellPlan | None = None,
    ) -> tuple[CellState, Tensor]:
        """One chunk backwards: the exact state before it and its output, both the same bits as in ``advance``."""
        replay = self.reversed_replay(state, x, mask, remnant, plan)
        return replay.state, replay.out

    # --- the same with graph, for the backward sweep ------------------------------------------------------------

    def carried(
        self, state: CellState, x: Tensor, mask: ChunkMask | None, plan: CellPlan | None = None
    ) -> CellState:
        """The state with its x_{a-1} sent through the carried y (a state that has one keeps it)."""
        if state.carried is not None:
            return state
        mu = carried_mix(self.mixes()) if plan is None else plan.mix
        border = Border.of(x.detach(), mu, mask)
        y = border.carry(state.shift)
        return CellState(border.uncarry(y), state.memory, y, border)

    def replay(
        self,
        state: CellState,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: CellPlan | None = None,
        after: CellState | None = None,
    ) -> Replay:
        """A chunk whose exact state before it is known, with graph; the same bits as ``advance``."""
        plan = plan if plan is not None else self.plan(x.shape[1])
        state = self.carried(state, x, mask, plan)
        start = leaves(self.float_state(state))
        projection = self.project(*token_mixes(x, start.shift, mask, self.mixes()))
        return self._finish(state, start, projection, x, mask, plan, after, vouched=False)

    def reversed_replay(
        self,
        state: CellState,
        x: Tensor,
        mask: ChunkMask | None,
        remnant: Remnant,
        plan: CellPlan | None = None,
        after: CellState | None = None,
    ) -> Replay:
        """A chunk whose exact state *after* it is known: rebuild the one before, then compute with graph."""
        plan = plan if plan is not None else self.plan(x.shape[1])
        border = Border.of(x.detach(), plan.mix, mask)
        shift = border.uncarry(remnant.carried)
        shift_leaf = leaves(FloatState(shift, None)).shift
        projection = self.project(*token_mixes(x, shift_leaf, mask, self.mixes()))
        with torch.no_grad():
            memory = self.retreat_memory(state.memory, projection, mask, remnant.memory, plan.memory)
        before = CellState(shift, memory, remnant.carried, border)
        start = FloatState(shift_leaf, leaves(self.float_state(before)).memory)
        return self._finish(before, start, projection, x, mask, plan, after, vouched=self.inverts_memory)

    def _finish(
        self,
        state: CellState,
        start: FloatState,
        projection: Any,
        x: Tensor,
        mask: ChunkMask | None,
        plan: CellPlan,
        after: CellState | None,
        *,
        vouched: bool,
    ) -> Replay:
        out, contribution = self.read(projection, start.memory, mask, plan.memory)
        memory = self.update(start.memory, contribution, mask, x.shape[1])
        shift = last_token(x, start.shift, mask)
        handed_on = None
        if after is not None:
            update = None if vouched or contribution is None else contribution.detach()
            handed_on = self._handed_on(state.memory, update, shift.detach(), after, mask, plan)
        return Replay(state, out, start, FloatState(shift, memory), _print(contribution, shift), handed_on)

    @torch.no_grad()
    def _handed_on(
        self,
        memory: Any,
        contribution: Tensor | None,
        shift: Tensor,
        after: CellState,
        mask: ChunkMask | None,
        plan: CellPlan,
    ) -> Tensor:
        """Whether the next chunk's y, and its memory if there is a contribution, are what this chunk leaves; bool."""
        assert after.border is not None and after.carried is not None
        same = checksum(after.border.carry(shift)) == checksum(after.carried)
        if contribution is not None:
            left, _ = self.advance_memory(memory, contribution, mask, plan.memory)
            same &= (self.memory_print(left) == self.memory_print(after.memory)).all()
        return same


def leaves(state: FloatState) -> FloatState:
    """The same values as differentiable leaves (plain tensors where gradients are disabled)."""
    grad = torch.is_grad_enabled()
    return FloatState(
        state.shift.detach().requires_grad_(grad),
        None if state.memory is None else state.memory.detach().requires_grad_(grad),
    )


def _print(contribution: Tensor | None, shift: Tensor) -> Tensor:
    """Checksums, int64 [2], of the shift after a chunk and of its contribution to the memory; [1] without one."""
    if contribution is None:
        return checksum(shift)[None]
    return torch.stack([checksum(shift), checksum(contribution)])
