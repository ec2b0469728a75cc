"""The EBRT contract: a recurrent cell whose state can be run backwards, a chunk of C >= 1 tokens at a time.

    advance(state, x, mask, plan)           -> state', out, remnant
    retreat(state', x, mask, remnant, plan) -> state, out

x is the cell's own input; in the backward sweep it is known again, because the layers below have just been
computed. What flows up the layers is the residual, and beside it what a cell has made for those above it
(:data:`Stream`). The laws every cell keeps (tests/cell_laws.py runs any cell through them):

* *write-first*: out depends on the state only through what ``retreat`` rebuilds from state', x and the remnant;
* *write-once*: state' is produced by one update;
* *masked additive update*: ``s' = s + m g(s, x)``, a masked token leaves every part of the state unchanged;
* ``retreat(advance(s)) == s`` and ``advance(retreat(s')) == s'``, bit for bit.

Nothing here knows of RWKV. A state has two forms: *values*, a NamedTuple of differentiable tensors that the cell
declares, and an *exact* one (:class:`Exact`), which comes back to the bit. Whatever runs a cell calls it as a module,
``cell(x, state, mask)``, so that hooks and wrappers of other tools are heard in every sweep alike. What ``state`` is
says what is to be done: values are stepped, a :class:`Forwards` is advanced, an :class:`Again` computed again with
graph, and those of a :class:`OnceMore` stepped as in there. A cell that leaves ``forward`` as it is needs no
declaration; a module inside of it which is neither PyTorch's nor ours, a gate say, is right in chunks only if it treats
each position by itself, and is declared with :func:`rwkv_rev.position_wise`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rwkv_rev.cells.borders import BorderedChunk, Mask
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.shared_chunk import SharedChunk
from rwkv_rev.reversal.additive import NoRemnant
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.reversal.memory import Remnant

Stream = Tensor | tuple[Tensor, ...]
"""What flows up the layers: the residual [B, C, D]; or a tuple of it and of tensors [B, C, ...] that flow beside it. Of
a cell's input the first is the residual behind the norm; of its output, what is added to the residual."""

Values = tuple[Tensor | None, ...]
"""A NamedTuple of the cell's own: its state as ordinary tensors [B, ...]; None for a part that it does not have."""


class Exact(Protocol):
    """A cell's state that is exact to the bit; what it is made of is the cell's affair."""

    def tensors(self) -> list[Tensor]:
        """All that it is made of: what a tape keeps of a whole state."""
        ...

    def computed(self) -> list[Tensor]:
        """:meth:`tensors`, and what was computed of them and will be asked for again."""
        ...

    def like(self, tensors: list[Tensor]) -> Any:
        """A state of this kind from :meth:`tensors` of one of the same shape."""
        ...

    def of_computed(self, tensors: list[Tensor]) -> Any:
        """The same from :meth:`computed`."""
        ...

    def fingerprint(self) -> Tensor | None:
        """Checksum, int64 [n], of what the cell inverts; None where nothing is inverted by arithmetic."""
        ...

    def coarse(self) -> Tensor | None:
        """[B, H] bool, parts that have become less precise than they should be; None where that cannot happen."""
        ...

    @property
    def when_coarse(self) -> str:
        """What that means, as the end of a sentence that begins with the part (:class:`~.memory.Memory`)."""
        ...

    def remnant(self, tensors: list[Tensor]) -> Any:
        """The remnant of the chunk before this state, from what :meth:`~.memory.Remnant.tensors` kept."""
        ...


class Plan(Protocol):
    """What a cell computes of its weights once per sweep."""

    def tensors(self) -> list[Tensor]:
        """All that it is made of, on the device: a recording that lasts is given those of the next sweep."""
        ...

    def prepare(self) -> None:
        """Make now what is made at its first use, on the host: where launches are recorded, that is too late."""
        ...

    def holds(self, other: Any) -> bool:
        """Whether chunks planned as ``other`` can be run by this plan, once it has the other's tensors."""
        ...


class Advanced(NamedTuple):
    """A chunk run forwards: exact state after it, output [B, C, D] (or None), remnant, and the chunk's print."""

    state: Any
    out: Stream | None
    remnant: Remnant
    print: Tensor


class Replay(NamedTuple):
    """A chunk computed again, with graph.

    ``state`` is the exact state before the chunk, ``out`` [B, C, D] the output, ``start`` the same state as
    differentiable leaves and ``end`` the differentiable values after the chunk. ``print``, int64 [n], holds checksums
    of what the chunk did: the same bits in both sweeps. ``handed_on``, bool scalar, says whether the chunk after this
    one began with what this one leaves; None where the state after it was not given.
    """

    state: Any
    out: Stream
    start: Values
    end: Values
    print: Tensor
    handed_on: Tensor | None


@dataclass(frozen=True)
class Forwards:
    """Run a chunk forwards from the exact ``state`` before it; without ``output`` where none will be read."""

    state: Any
    plan: Any
    output: bool = True


@dataclass(frozen=True)
class Again:
    """Compute a chunk again; ``state`` is the exact one before it, or after it where a ``remnant`` is given.

    ``after`` is the state that the chunk after this one began with, to be compared with what this one leaves.
    """

    state: Any
    plan: Any
    remnant: Any = None
    after: Any = None


class OnceMore(NamedTuple):
    """Step ``values``, the leaves of a replay that began with the exact ``state``: to the same bits as there."""

    state: Any
    values: Any


class ReversibleCell(nn.Module, ABC):
    """Base of all cells. Inputs x are [B, C, D]; masks are :class:`ChunkMask` or None for all valid.

    A cell whose output is a tuple puts the tensors behind the first in the place of what flows beside the residual,
    for all layers above. One that :attr:`reads_beside` is handed a tuple, once there is such a tensor.

    Attributes:
        shifts: how many of the state's parts, and of a remnant's tensors, are token shifts; they stand first.
        passes_between_ranks: whether a chunk's tokens may be split over ranks (context parallelism).
        relayed_ranks: up to how many of them hand the memory on, one after another, instead of exchanging pieces (then
            it is kept whole, and undoing a chunk needs no contribution).
        pulls: whether, over ranks, the gradient by the memory before some tokens is found before that by the tokens.
        reads_beside: whether its input is the whole stream, not the residual alone.
        lifts: of a cell with two kinds of memories, whether :meth:`exact` makes the one whose remnant is smaller and
            takes longer (:meth:`lift`).
        layer: index of the block the cell is in; only its initialisation and messages depend on it.
        undividable: why a memory has no form that :meth:`lossy` could give, in words for people.
        inverts_memory: whether :meth:`retreat` computes the memory before a chunk from the one after it, so that the
            former's fingerprint vouches for the latter; else it takes it from the remnant.
        norms_of_tokens: names of norms inside that it gives every token as a row of its own, so that they treat each
            position by itself, whatever they would do with [B, C, D].
    """

    layer: int = 0
    shifts: int = 0
    passes_between_ranks: bool = False
    relayed_ranks: int = 0
    pulls: bool = False
    reads_beside: bool = False
    lifts: bool = False
    undividable: str = "this one (RWKV-4's, say, which is forgotten within a few tokens)"
    inverts_memory: bool = False
    norms_of_tokens: tuple[str, ...] = ()

    @abstractmethod
    def plan(self, length: int) -> Any:
        """What chunks of C = ``length`` tokens need of the weights beyond themselves, computed once per sweep.

        None, or a :class:`Plan`. A cell that :attr:`passes_between_ranks` is told how many of them are run here, too.
        A class may make those of several layers in few launches, as of :meth:`exact` (:mod:`rwkv_rev.cells.at_once`).
        """

    @abstractmethod
    def exact(self, state: Any) -> Any:
        """The exact state nearest to values."""

    @abstractmethod
    def values(self, state: Any) -> Any:
        """The values that outputs read from an exact state."""

    @abstractmethod
    def step(self, state: Any, x: Any, mask: ChunkMask | None = None) -> tuple[Stream, Any]:
        """Output and next values by plain differentiable arithmetic, no rounding to a grid."""

    def step_again(
        self, state: Any, values: Any, x: Any, mask: ChunkMask | None = None
    ) -> tuple[Stream, Any]:
        """:meth:`step` with the bits that :meth:`replay` has from the exact ``state`` of these ``values``."""
        return self.step(values, x, mask)

    @abstractmethod
    def advance(
        self, state: Any, x: Any, mask: ChunkMask | None = None, plan: Any = None, *, output: bool = True
    ) -> Advanced:
        """One chunk forwards, without graph. Without ``output`` it need not be made, and may be None."""

    @abstractmethod
    def replay(
        self, state: Any, x: Any, mask: ChunkMask | None = None, plan: Any = None, after: Any = None
    ) -> Replay:
        """A chunk whose exact state before it is known, with graph; the same bits as :meth:`advance`."""

    @abstractmethod
    def retreat(
        self, state: Any, x: Any, mask: ChunkMask | None, remnant: Any, plan: Any = None, after: Any = None
    ) -> Replay:
        """A chunk whose exact state *after* it is known: rebuild the one before, then compute with graph."""

    def log_decay(self) -> Tensor | None:
        """log w of a memory that decays elementwise by constants, one per row of it, natural logarithm; else None."""
        return None

    def lossy(self, state: Any) -> Any | None:
        """An exact state in a form that runs back without a remnant, approximately; None where there is none."""
        return None

    def divided_by(self, remnant: Any) -> Tensor | None:
        """Factors by which a memory decayed in the chunk of ``remnant``, if they follow from the data.

        The singular values of its transition, where that is no elementwise decay.
        """
        return None

    def check_plan(self, plan: Any) -> None:
        """Called before every chunk; refuses weights that are not those of the plan any more."""

    def refuse_changing(self) -> None:
        """Called before the first chunk; refuses weights that will be others at each look."""

    def lift(self, wanted: bool) -> None:
        """Called before a sweep makes plans and exact states: a cell with two kinds of memories sets :attr:`lifts`."""

    def carried(self, state: Any, x: Tensor, mask: ChunkMask | None, plan: Any = None) -> Any:
        """The exact ``state`` as the chunk x [B, C, D] is computed from it, where that is not as it is."""
        return state

    def is_left(self, state: Any, after: Any) -> Tensor | None:
        """Whether the exact ``state`` at the end of a chunk is ``after``, which the next one began with; bool scalar.

        None for a cell without a state.
        """
        left = state.fingerprint()
        return None if left is None else (left == after.fingerprint()).all()

    def forward(self, x: Any, state: Any, mask: Mask = None) -> tuple[Stream | None, Any]:
        """Output [B, C, D] of a chunk and what else came of it, by what ``state`` asks for.

        A chunk with borders is computed by :meth:`step`, its documents each in a row of their own, and the state after
        it is the nearest exact one. What it forgets is kept whole (:mod:`rwkv_rev.bptt.records`).

        Raises:
            StrategyError: where a hook has made other weights than the plan was made of.
        """
        if isinstance(mask, SharedChunk):
            return self._over_ranks(x, state, mask)
        if isinstance(mask, BorderedChunk):
            return self._over_borders(x, state, mask)
        if isinstance(state, Forwards):
            self.check_plan(state.plan)
            advanced = self.advance(state.state, x, mask, state.plan, output=state.output)
            return advanced.out, advanced
        if isinstance(state, Again):
            self.check_plan(state.plan)
            if state.remnant is None:
                replay = self.replay(state.state, x, mask, state.plan, state.after)
            else:
                replay = self.retreat(state.state, x, mask, state.remnant, state.plan, state.after)
            return replay.out, replay
        if isinstance(state, OnceMore):
            return self.step_again(state.state, state.values, x, mask)
        return self.step(state, x, mask)

    def _over_ranks(self, x: Any, state: Any, chunk: SharedChunk) -> tuple[Stream | None, Any]:
        """:meth:`forward` of this rank's piece of a chunk."""
        raise NotImplementedError(f"the state of a {type(self).__name__} is not passed between ranks")

    def _over_borders(self, x: Any, state: Any, chunk: BorderedChunk) -> tuple[Stream, Any]:
        """:meth:`forward` of a chunk with borders."""
        if isinstance(state, Forwards):
            self.check_plan(state.plan)
            with torch.no_grad():
                before = self.carried(state.state, residual(x), chunk.mask, state.plan)
                out, after, print_ = self._documents(self.values(before), x, chunk)
                return out, Advanced(self.exact(after), out, NoRemnant(), print_())
        if isinstance(state, Again):
            self.check_plan(state.plan)
            before = self.carried(state.state, residual(x), chunk.mask, state.plan)
            start = leaves(self.values(before))
            out, after, print_ = self._documents(start, x, chunk)
            handed_on = None
            if state.after is not None:
                same = self.is_left(self.exact(detached(after)), state.after)
                everywhere = torch.ones((), dtype=torch.bool, device=residual(x).device)
                handed_on = everywhere if same is None else same
            return out, Replay(before, out, start, after, print_(), handed_on)
        values = state.values if isinstance(state, OnceMore) else state
        return self._documents(values, x, chunk)[:2]

    def _documents(
        self, values: Any, x: Stream, chunk: BorderedChunk
    ) -> tuple[Stream, Any, Callable[[], Tensor]]:
        """Output, values after the chunk, and what computes checksums of those after each document."""
        if not tensors_of(values):
            out, after = self.step(values, x, chunk.mask)
            return out, after, lambda: torch.zeros(0, dtype=torch.int64, device=residual(x).device)

        def step(
            stream: list[Tensor], state: list[Tensor], mask: ChunkMask | None
        ) -> tuple[list[Tensor], list[Tensor]]:
            out, after = self.step(values_like(values, state), joined(stream[0], tuple(stream[1:])), mask)
            return parts_of(out), tensors_of(after)

        stream, ends = chunk.run(step, parts_of(x), tensors_of(values), tensors_of(chunk.starts))
        chunk.keep(ends)
        after = values_like(values, [end.index_select(0, chunk.last) for end in ends])
        out = joined(stream[0], tuple(stream[1:]))
        return out, after, lambda: torch.stack([checksum(end.detach()) for end in ends])


def residual(stream: Stream) -> Tensor:
    """The first tensor of a stream, [B, C, D]."""
    return stream if isinstance(stream, Tensor) else stream[0]


def beside(stream: Stream) -> tuple[Tensor, ...]:
    """The other tensors of a stream."""
    return () if isinstance(stream, Tensor) else stream[1:]


def parts_of(stream: Stream) -> list[Tensor]:
    """All tensors of a stream, the residual first."""
    return [residual(stream), *beside(stream)]


def joined(x: Tensor, beside: tuple[Tensor, ...]) -> Stream:
    """The stream of x [B, C, D] and what flows beside it."""
    return (x, *beside) if beside else x


def tensors_of(state: Values) -> list[Tensor]:
    """The parts that are there, in order."""
    return [tensor for tensor in state if tensor is not None]


def values_like(state: Any, tensors: Iterable[Tensor]) -> Any:
    """Values with other tensors, of :func:`tensors_of`, in the places of those that are there."""
    following = iter(tensors)
    return type(state)(*(None if part is None else next(following) for part in state))


def detached(state: Any) -> Any:
    """The same values without graph."""
    return values_like(state, [tensor.detach() for tensor in tensors_of(state)])


def leaves(state: Any) -> Any:
    """The same values as differentiable leaves (plain tensors where gradients are disabled)."""
    grad = torch.is_grad_enabled()
    return values_like(state, [tensor.detach().requires_grad_(grad) for tensor in tensors_of(state)])
