"""Cells whose recurrence is not linear: their exact state is stepped back a token at a time.

The state is cut into parts, and the parts into halves. In a token the halves are updated one after the other, each by
gates that read the input and the other half alone, so that these gates can be computed again on the way back:

    part' = z * part + c,      (z, c) = update(part, gates(half, x_t, other half), parts updated before)

z in [0, 1], or None where nothing is forgotten. This is the coupling of Dinh et al. 2014 ("NICE") and of MacKay et al.
2018 ("Reversible Recurrent Neural Networks", section 3). A subclass says what it projects (for all tokens of a chunk
at once: the input's share of the gates), what its gates read, and how it reads the state after each token.

The state is on a fixed grid after every token (:mod:`rwkv_rev.reversal.stepped`), in both sweeps, and the gradient goes
straight through the rounding, half a unit of the grid: 2**-32 of the largest number that fits 32 bits, 2**-51 of 51,
2**-62 of the 62 bits that float64 gets, so that steep gates, too, have gradients of ten digits.
Plain arithmetic (:meth:`TokenCell.step`) has no grid.

Cost: a chunk of C tokens is C times the launches of one token, forwards once, backwards three times (back, forwards
with graph, and its gradient). Gates must not draw random numbers; what :meth:`~TokenCell.project` draws (dropout of the
input) is drawn again.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.cells.contract import Advanced, Replay, ReversibleCell, leaves
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.token_checks import Token, Update, check_halves, output_of, projected
from rwkv_rev.cells.token_rules import refuse_broken_rules
from rwkv_rev.cells.token_walk import Walk
from rwkv_rev.errors import ConfigError, StrategyError
from rwkv_rev.reversal.stepped import GridOverflowError, KeptSteps, Stepped, StepsRemnant, is_recorded

MOST_MAGNITUDE = 40
"""Either way: 2**40 is beyond what a float32 tells from its neighbours, 2**-40 below what it adds to anything."""


class TokenState(NamedTuple):
    """Values of the state: memory [B, P, M], P parts of M numbers, float32 or float64."""

    memory: Tensor


@dataclass(frozen=True)
class ExactTokenState:
    """The same as integers on their grid."""

    memory: Stepped

    def tensors(self) -> list[Tensor]:
        return self.memory.tensors()

    def computed(self) -> list[Tensor]:
        return self.memory.computed()

    def like(self, tensors: list[Tensor]) -> "ExactTokenState":
        return ExactTokenState(self.memory.like(tensors))

    of_computed = like

    def fingerprint(self) -> Tensor:
        return self.memory.fingerprint()

    def coarse(self) -> None:
        return None

    def remnant(self, tensors: list[Tensor]) -> KeptSteps:
        return self.memory.remnant(tensors)


class NoPlan:
    """Of weights nothing is needed beforehand: what recordings that last over many steps ask of a plan."""

    def holds(self, other: "NoPlan") -> bool:
        """Whether a recording made with this plan serves for another one."""
        return True

    def tensors(self) -> list[Tensor]:
        """All that it is made of."""
        return []

    def prepare(self) -> None:
        """Make what is made once."""


class TokenCell(ReversibleCell):
    """Base of cells that are stepped a token at a time.

    Args:
        size: M, numbers in each part.
        magnitude: numbers of the state stay below ``2**magnitude``; a smaller one makes a finer grid.
        wide: whether integers have 51 bits (in 64), not 32; None for float64 alone. In float64 they have 62.

    Attributes:
        halves: which parts each half has, in the order of their updates.

    Raises:
        ConfigError: for a size, a magnitude or halves that cannot be meant; in use, for a method that gives something
            else than it must, by its name.
    """

    inverts_memory = True
    halves: ClassVar[tuple[tuple[int, ...], ...]]

    def __init__(self, size: int, magnitude: int, wide: bool | None = None) -> None:
        super().__init__()
        check_halves(type(self))
        if not _is_whole(size) or size < 1:
            raise ConfigError(f"size = {size!r} must be a whole number of at least 1")
        if not _is_whole(magnitude) or abs(magnitude) > MOST_MAGNITUDE:
            raise ConfigError(
                f"magnitude = {magnitude!r} must be a whole number from {-MOST_MAGNITUDE} to {MOST_MAGNITUDE}"
            )
        self.size, self.magnitude, self.wide = size, magnitude, wide
        self._keeps_rules = False  # not looked at yet

    # --- what a subclass fills in -------------------------------------------------------------------------------

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the gates read of the input x [B, C, D], for all tokens at once: tensors [B, C, ...].

        As in :meth:`read`, what is computed of a token depends on that token alone.
        """

    @abstractmethod
    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> Any:
        """What the updates of a half have in common; of ``parts`` [B, M] it may read those of the other half."""

    @abstractmethod
    def update(self, part: int, gates: Any, parts: Sequence[Tensor]) -> Update:
        """z and c, [B, M], of a part; of its own half it may read those that were updated before it."""

    @abstractmethod
    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        """The output [B, C, D] from the parts [B, C, P, M] after each token."""

    # --- the contract -------------------------------------------------------------------------------------------

    @property
    def number_of_parts(self) -> int:
        """P."""
        return sum(map(len, self.halves))

    def empty(self, batch: int, device: Any = None, dtype: torch.dtype = torch.float32) -> TokenState:
        """The state before the first token."""
        return TokenState(torch.zeros(batch, self.number_of_parts, self.size, device=device, dtype=dtype))

    def plan(self, length: int) -> NoPlan:
        return NoPlan()

    def exact(self, state: TokenState) -> ExactTokenState:
        """The exact state nearest to values; of more than 32 bits where they are float64.

        Raises:
            GridOverflowError: if one does not fit the grid.
        """
        with self._named():
            return ExactTokenState(Stepped.of(_wide(state.memory), magnitude=self.magnitude, wide=self.wide))

    def values(self, state: ExactTokenState) -> TokenState:
        return TokenState(state.memory.value(state.memory.dtype))

    def step(self, state: TokenState, x: Tensor, mask: ChunkMask | None = None) -> tuple[Tensor, TokenState]:
        walk = Walk(self, self._projected(x), list(_wide(state.memory).unbind(1)), x.dtype, mask)
        walk.forwards()
        return self._output(walk, x), TokenState(torch.stack(walk.values, dim=1))

    def step_again(
        self, state: ExactTokenState, values: TokenState, x: Tensor, mask: ChunkMask | None = None
    ) -> tuple[Tensor, TokenState]:
        walk = self._walk(state, values, self._projected(x), x, mask)
        return self._output(walk, x), TokenState(torch.stack(walk.values, dim=1))

    @torch.no_grad()
    def advance(
        self,
        state: ExactTokenState,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: NoPlan | None = None,
        *,
        output: bool = True,
    ) -> Advanced:
        """One chunk forwards, without graph.

        Raises:
            GridOverflowError: if a number of the state does not fit its grid.
            StrategyError: if a gate draws random numbers, or gives a z that is not in [0, 1]; if tokens are mixed, or a
                step depends on what the way back does not know.
        """
        inputs = self._projected(x)
        if not self._keeps_rules:
            refuse_broken_rules(self, x)
            self._keeps_rules = True
        drawn = _generators(x)
        walk = self._walk(state, self.values(state), inputs, x, mask)
        self._refuse_draws(drawn, x)
        self._refuse_growth(walk.decays)
        out = self._output(walk, x) if output else None
        with self._named():
            after = ExactTokenState(walk.end())
        return Advanced(after, out, StepsRemnant(state.memory, walk.states, walk.decays), after.fingerprint())

    def replay(
        self,
        state: ExactTokenState,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: NoPlan | None = None,
        after: ExactTokenState | None = None,
    ) -> Replay:
        return self._again(state, self._projected(x), x, mask, after)

    def retreat(
        self,
        state: ExactTokenState,
        x: Tensor,
        mask: ChunkMask | None,
        remnant: KeptSteps,
        plan: NoPlan | None = None,
        after: ExactTokenState | None = None,
    ) -> Replay:
        inputs = self._projected(x)
        rebuilt = None
        if not remnant.all_whole:
            with torch.no_grad():
                quiet, memory = tuple(part.detach() for part in inputs), state.memory
                walk = Walk(self, quiet, list(self.values(state).memory.unbind(1)), x.dtype, mask, memory)
                rebuilt = walk.backwards(remnant.bits(memory))
        before = ExactTokenState(remnant.completed(rebuilt, state.memory))
        return self._again(before, inputs, x, mask, after)

    def lossy(self, state: ExactTokenState) -> None:
        raise StrategyError(
            f"reversible-lossy divides a whole chunk's decay out of a memory, and a {type(self).__name__} is stepped "
            "token by token: use 'reversible', which is exact"
        )

    def _projected(self, x: Tensor) -> Token:
        return projected(self, self.project(x), x)

    def _output(self, walk: Walk, x: Tensor) -> Any:
        return output_of(self, self.read(walk.parts(), x), x)

    def _again(
        self,
        state: ExactTokenState,
        inputs: tuple[Tensor, ...],
        x: Tensor,
        mask: ChunkMask | None,
        after: ExactTokenState | None,
    ) -> Replay:
        start = leaves(self.values(state))
        walk = self._walk(state, start, inputs, x, mask)
        out, end = self._output(walk, x), TokenState(torch.stack(walk.values, dim=1))
        with torch.no_grad(), self._named():
            printed = walk.end().fingerprint()
        same = None if after is None else (printed == after.fingerprint()).all()
        return Replay(state, out, start, end, printed, same)

    def _walk(
        self,
        state: ExactTokenState,
        start: TokenState,
        inputs: tuple[Tensor, ...],
        x: Tensor,
        mask: ChunkMask | None,
    ) -> Walk:
        """A chunk forwards on the grid."""
        walk = Walk(self, inputs, list(start.memory.unbind(1)), x.dtype, mask, state.memory)
        walk.forwards()
        return walk

    def _refuse_draws(self, before: random_state.GeneratorStates | None, x: Tensor) -> None:
        """Refuse gates that have drawn, in the first sweep: the second one would come too late."""
        if before is not None and not before.same(random_state.capture({x.device})):
            raise StrategyError(
                f"a gate of layer {self.layer} ({type(self).__name__}) draws random numbers (dropout?), and on the way "
                "back it would draw them in another order: draw in the input, or use bptt='full'"
            )

    def _refuse_growth(self, decays: list[Tensor]) -> None:
        if not decays or is_recorded(decays[0]):
            return
        least, most = torch.stack(decays).aminmax()  # NaN is neither
        if least < 0 or most > 1:
            outside = float(least if least < 0 else most)
            raise StrategyError(
                f"a gate of layer {self.layer} ({type(self).__name__}) multiplies the state by z = {outside:g}, and "
                "the way back needs z in [0, 1]: make it a sigmoid, or clamp it; or use bptt='full'"
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says of an overflow inside where it was, and what to do."""
        try:
            yield
        except GridOverflowError as error:
            raise GridOverflowError(
                f"the state of layer {self.layer} ({type(self).__name__}) has left its grid: {error}; make the cell "
                f"with magnitude={self.magnitude + 3} or more{'' if self.wide else ' (and wide=True for a finer grid)'}"
            ) from None


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _wide(memory: Tensor) -> Tensor:
    """In float32 at least: a state that comes in half precision goes on in full."""
    return memory.to(torch.promote_types(memory.dtype, torch.float32))


def _generators(x: Tensor) -> random_state.GeneratorStates | None:
    """The random generators' states; None where a CUDA graph is recorded, which a first chunk has gone before."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return random_state.capture({x.device})
