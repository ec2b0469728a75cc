"""RWKV's cells with coupled feedback in the place of the token shift (a proposal of the EBRT draft).

Where RWKV mixes each token's vector with that of the token before, here it is mixed with what a coupled additive cell
(:mod:`rwkv_rev.cells.coupled`) has made of all tokens so far:

    s1 <- s1 + L1(s2, x_t),  s2 <- s2 + L2(s1, x_t),   f_t = G(s),   mix_m = mu_m x_t + (1 - mu_m) f_t

and everything behind the mixes is the cell's own. The state has as many numbers as the token shift, D. Nothing of it
goes on the tape: the cell runs backwards by subtraction, where a token shift leaves D numbers at every boundary.

Limits: a token at a time (:mod:`rwkv_rev.cells.token_cell`), so slower than a token shift, which is one launch for a
chunk. What L1, L2 and G take beside the mixes: 2.5 D^2 parameters. A sum forgets nothing, so the token before is not to
be had from it exactly: a converted model loses by the change, and must be trained on.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.cells.cell_plan import CellPlan
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.contract import Advanced, Replay, ReversibleCell, leaves
from rwkv_rev.cells.coupled import CoupledCell
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.shifted_cell import ShiftedCell
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.cells.token_cell import ExactTokenState, TokenState
from rwkv_rev.cells.token_shift import mix
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.reversal.memory import Memory
from rwkv_rev.reversal.stepped import KeptSteps


class FeedbackState(NamedTuple):
    """Values of the state: feedback [B, 2, M], float32 or wider, and memory (its shape is the cell's) or None."""

    feedback: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class ExactFeedbackState:
    """The same, exact to the bit."""

    feedback: ExactTokenState
    memory: Memory | None

    def tensors(self) -> list[Tensor]:
        return [*self.feedback.tensors(), *([] if self.memory is None else self.memory.tensors())]

    def computed(self) -> list[Tensor]:
        return [*self.feedback.computed(), *([] if self.memory is None else self.memory.computed())]

    def like(self, tensors: list[Tensor]) -> "ExactFeedbackState":
        memory = None if self.memory is None else self.memory.like(tensors[1:])
        return ExactFeedbackState(self.feedback.like(tensors[:1]), memory)

    of_computed = like

    def fingerprint(self) -> Tensor:
        found = [self.feedback.fingerprint()]
        return torch.cat(found if self.memory is None else [*found, self.memory.fingerprint().flatten()])

    def coarse(self) -> Tensor | None:
        return None if self.memory is None else self.memory.coarse()

    @property
    def when_coarse(self) -> str:
        return "" if self.memory is None else self.memory.when_coarse

    def remnant(self, tensors: list[Tensor]) -> "FeedbackRemnant":
        return FeedbackRemnant(None if self.memory is None else self.memory.remnant(tensors))


@dataclass(frozen=True)
class FeedbackRemnant:
    """What one chunk forgot: the memory's remnant, or None."""

    memory: Any

    @property
    def size(self) -> Tensor | None:
        return None if self.memory is None else self.memory.size

    @property
    def excess(self) -> Tensor | None:
        return None if self.memory is None else self.memory.excess

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return [] if self.memory is None else self.memory.tensors(size)


class CoupledFeedback(ShiftedCell):
    """Put before a cell with a token shift, as a base class: the same cell with feedback.

    Args:
        feedback: of width D.
        given: the other cell's arguments.
    """

    shifts = 0
    carried = ReversibleCell.carried
    _documents = ReversibleCell._documents
    is_left = ReversibleCell.is_left  # type: ignore[assignment]

    def __init__(self, feedback: CoupledCell, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.feedback = feedback

    def exact(self, state: FeedbackState) -> ExactFeedbackState:  # type: ignore[override]
        memory = None if state.memory is None else self.exact_memory(state.memory.detach())
        return ExactFeedbackState(self.feedback.exact(TokenState(state.feedback.detach())), memory)

    def values(self, state: ExactFeedbackState) -> FeedbackState:  # type: ignore[override]
        memory = None if state.memory is None else state.memory.value(self.memory_dtype())
        return FeedbackState(self.feedback.values(state.feedback).memory, memory)

    def lossy(self, state: Any) -> Any:
        return self.feedback.lossy(state.feedback)

    def step(  # type: ignore[override]
        self, state: FeedbackState, x: Tensor, mask: ChunkMask | None = None
    ) -> tuple[Tensor, FeedbackState]:
        return self._stepped(state, x, mask, self.feedback.step(TokenState(state.feedback), x, mask))

    def step_again(
        self, state: ExactFeedbackState, values: FeedbackState, x: Tensor, mask: ChunkMask | None = None
    ) -> tuple[Tensor, FeedbackState]:
        fed = self.feedback.step_again(state.feedback, TokenState(values.feedback), x, mask)
        return self._stepped(values, x, mask, fed)

    def _stepped(
        self, state: FeedbackState, x: Tensor, mask: ChunkMask | None, fed: tuple[Tensor, TokenState]
    ) -> tuple[Tensor, FeedbackState]:
        read, after = fed
        projection = self._fed(x, read)
        seen, contribution = self.compute(projection, state.memory, mask)
        out = self.output_of(projection, seen)
        return out, FeedbackState(after.memory, self.update(state.memory, projection, contribution, mask))

    @torch.no_grad()
    def advance(  # type: ignore[override]
        self,
        state: ExactFeedbackState,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: CellPlan | None = None,
        *,
        output: bool = True,
    ) -> Advanced:
        plan = plan if plan is not None else self.plan(x.shape[1])
        wanted = output or state.memory is not None
        fed = self.feedback.advance(state.feedback, x, mask, output=wanted)
        if not wanted:
            after = ExactFeedbackState(fed.state, None)
            return Advanced(after, None, FeedbackRemnant(None), _print(fed.print, None))
        projection = self._fed(x, fed.out)
        seen, contribution = self.compute(projection, self.values(state).memory, mask, plan.memory)
        out = self.output_of(projection, seen)
        memory, remnant = self.advance_memory(state.memory, projection, contribution, mask, plan.memory)
        after = ExactFeedbackState(fed.state, memory)
        return Advanced(after, out, FeedbackRemnant(remnant), _print(fed.print, contribution))

    def replay(  # type: ignore[override]
        self,
        state: ExactFeedbackState,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: CellPlan | None = None,
        after: ExactFeedbackState | None = None,
    ) -> Replay:
        plan = plan if plan is not None else self.plan(x.shape[1])
        fed = self.feedback.replay(state.feedback, x, mask, None, None if after is None else after.feedback)
        return self._ended(state, fed, self._fed(x, fed.out), mask, plan, after)

    def retreat(  # type: ignore[override]
        self,
        state: ExactFeedbackState,
        x: Tensor,
        mask: ChunkMask | None,
        remnant: FeedbackRemnant,
        plan: CellPlan | None = None,
        after: ExactFeedbackState | None = None,
    ) -> Replay:
        plan = plan if plan is not None else self.plan(x.shape[1])
        later = None if after is None else after.feedback
        fed = self.feedback.retreat(state.feedback, x, mask, KeptSteps(), None, later)
        projection = self._fed(x, fed.out)
        with torch.no_grad():
            memory = self.retreat_memory(state.memory, projection, mask, remnant.memory, plan.memory)
        return self._ended(ExactFeedbackState(fed.state, memory), fed, projection, mask, plan, after)

    def _fed(self, x: Tensor, read: Any) -> Any:
        """The projection of x mixed with what the feedback reads, [B, C, D] both."""
        read = read.to(x.dtype)  # autocast reads in half precision
        return self.project(*(mix(x, read, mu) for mu in self.mixes()))

    def _ended(
        self,
        state: ExactFeedbackState,
        fed: Replay,
        projection: Any,
        mask: ChunkMask | None,
        plan: CellPlan,
        after: ExactFeedbackState | None,
    ) -> Replay:
        start = FeedbackState(fed.start[0], leaves(self.values(state)).memory)  # type: ignore[arg-type]
        seen, contribution = self.compute(projection, start.memory, mask, plan.memory)
        out = self.output_of(projection, seen)
        end = FeedbackState(fed.end[0], self.update(start.memory, projection, contribution, mask))  # type: ignore[arg-type]
        handed_on = fed.handed_on
        if after is not None and after.memory is not None:
            with torch.no_grad():
                left, _ = self.advance_memory(
                    state.memory, projection, contribution.detach(), mask, plan.memory
                )
                handed_on = handed_on & (left.fingerprint() == after.memory.fingerprint()).all()
        return Replay(state, out, start, end, _print(fed.print, contribution), handed_on)


class ChannelMixWithFeedback(CoupledFeedback, ChannelMix):
    """The channel mix of RWKV-4 and 5."""

    inverts_memory = True


class TimeMixRwkv4WithFeedback(CoupledFeedback, TimeMixRwkv4):
    """The time mix of RWKV-4."""


class TimeMixRwkv5WithFeedback(CoupledFeedback, TimeMixRwkv5):
    """The time mix of RWKV-5."""


def _print(fed: Tensor, contribution: Tensor | None) -> Tensor:
    """That of the feedback, and a checksum of the contribution to the memory."""
    return fed if contribution is None else torch.cat([fed, checksum(contribution)[None]])
