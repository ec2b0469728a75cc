"""A residual block of reversible cells, ``x += cell(norm(x))`` for each of them (RWKV's: time mix, channel mix).

A block goes through a chunk in the same three ways as its cells (:mod:`rwkv_rev.cells.contract`): plain and
differentiable, exact without graph, and with graph from an exact state before or after the chunk.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev import random_state
from rwkv_rev.cells.at_once import of_all
from rwkv_rev.cells.borders import Mask, of_part
from rwkv_rev.cells.contract import (
    Again,
    Forwards,
    OnceMore,
    ReversibleCell,
    Stream,
    beside,
    joined,
    leaves,
    parts_of,
    residual,
    tensors_of,
)
from rwkv_rev.cells.recomputation import checkpointed
from rwkv_rev.cells.token_cell import TokenCell
from rwkv_rev.errors import ConfigError
from rwkv_rev.initialization import note_parts
from rwkv_rev.reversal.fingerprint import checksum

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
"""Ways into a module."""

FloatStates = tuple[Any, ...]
"""Values of the states of a block's cells, a NamedTuple each."""
ExactStates = tuple[Any, ...]
"""Their exact states (:class:`.contract.Exact`)."""
Remnants = tuple[Any, ...]
Plans = tuple[Any, ...]


class BlockAdvanced(NamedTuple):
    """A block's chunk run forwards: output [B, C, D] (None without one), exact states after it, remnants, print."""

    out: Stream | None
    states: ExactStates
    remnants: Remnants
    print: Tensor


class BlockReplay(NamedTuple):
    """A block's chunk computed again, with graph: exact states before it, output, leaves, values after it, print.

    ``print``, int64, holds checksums of the block's input and of what its cells did (:class:`.contract.Replay`): the
    same in both sweeps, if both computed the same; the first ``before_the_state`` of these depend on the input of the
    first cell alone, not on the state it reads. ``handed_on``, bool scalar or None, is that of all cells.
    """

    states: ExactStates
    out: Stream
    start: FloatStates
    end: FloatStates
    print: Tensor
    before_the_state: int
    handed_on: Tensor | None


@dataclass(frozen=True)
class BlockForwards:
    """Run a block's chunk forwards; the ``output``, which only the block above reads, may be left out."""

    states: ExactStates
    plans: Plans
    output: bool = True


@dataclass(frozen=True)
class BlockAgain:
    """Compute a block's chunk again, with graph.

    Attributes:
        states: exact states before the chunk, or after it when ``remnants`` are given.
        checkpointed: where the block has a function to ``recompute`` by, keep only its input and states, and compute
            it once more when its gradient is taken (activation checkpointing).
        after: states that the chunk after this one began with, to be compared with what this one leaves.
    """

    states: ExactStates
    plans: Plans
    remnants: Remnants | None = None
    checkpointed: bool = False
    after: ExactStates | None = None


class ResidualBlock(nn.Module):
    """Cells, each behind its norm, on the residual stream; what flows beside it has no norm."""

    recompute: Callable[..., Any] | None = None  # torch.utils.checkpoint.checkpoint, with settings

    def parts(self) -> list[tuple[nn.Module, ReversibleCell]]:
        """(norm, cell) in the order in which they are computed."""
        raise NotImplementedError

    @property
    def cells(self) -> list[ReversibleCell]:
        return [cell for _, cell in self.parts()]

    def forward(
        self, x: Stream, states: FloatStates | BlockForwards | BlockAgain, mask: Mask = None
    ) -> tuple[Stream | None, Any]:
        """Output [B, C, D] for x [B, C, D], and what else came of the chunk, by what ``states`` ask for.

        Values: plain differentiable arithmetic, and the values after x. :class:`BlockForwards`: exact, without
        graph, and a :class:`BlockAdvanced`. :class:`BlockAgain`: with graph, and a :class:`BlockReplay`. Everybody
        calls the block, and the block its cells, as modules: hooks of other tools are heard in each of these ways.
        """
        if isinstance(states, BlockForwards):
            advanced = self._advance(x, states, mask)
            return advanced.out, advanced
        if isinstance(states, BlockAgain):
            again = states.checkpointed and self.recompute is not None
            replay = (self._checkpointed if again else self._replay)(x, states, mask)
            return replay.out, replay
        after = []
        for number, ((norm, cell), state) in enumerate(zip(self.parts(), states, strict=True)):
            out, state = cell(_input(norm, cell, x), state, of_part(mask, number))
            x = _added(x, out, cell)
            after.append(state)
        return x, tuple(after)

    def exact(self, states: FloatStates) -> ExactStates:
        """The exact states nearest to values."""
        return tuple(cell.exact(state) for cell, state in zip(self.cells, states, strict=True))

    @classmethod
    def exact_at_once(
        cls, blocks: "Sequence[ResidualBlock]", states: Sequence[FloatStates]
    ) -> list[ExactStates]:
        """:meth:`exact` of several blocks, each of its states."""
        if len({len(block.cells) for block in blocks}) > 1:
            return [block.exact(values) for block, values in zip(blocks, states, strict=True)]
        columns = zip(
            zip(*(block.cells for block in blocks), strict=True), zip(*states, strict=True), strict=True
        )
        return list(zip(*(of_all(cells, "exact", own=values) for cells, values in columns), strict=True))

    def values(self, states: ExactStates) -> FloatStates:
        """The values that outputs read from exact states."""
        return tuple(cell.values(state) for cell, state in zip(self.cells, states, strict=True))

    def plan(self, length: int, piece: int | None = None) -> Plans:
        """The cells' plans for chunks of ``length`` tokens, while the weights stay as they are.

        ``piece``: tokens of them that are run here, where they are split over ranks.
        """
        cells: list[Any] = list(self.cells)  # those of whom a piece is asked take it
        return tuple(cell.plan(length) if piece is None else cell.plan(length, piece) for cell in cells)

    @classmethod
    def plan_at_once(
        cls, blocks: "Sequence[ResidualBlock]", length: int, piece: int | None = None
    ) -> list[Plans]:
        """:meth:`plan` of several blocks."""
        given = (length,) if piece is None else (length, piece)
        if len({len(block.cells) for block in blocks}) > 1:
            return [block.plan(*given) for block in blocks]
        columns = zip(*(block.cells for block in blocks), strict=True)
        return list(zip(*(of_all(cells, "plan", *given) for cells in columns), strict=True))

    def lift(self, wanted: bool) -> None:
        """Choose the kind of memory of cells that have two (:meth:`.ReversibleCell.lift`)."""
        for cell in self.cells:
            cell.lift(wanted)

    def refuse_changing(self) -> None:
        """Refuse weights that would be others at each look (:meth:`.ReversibleCell.refuse_changing`)."""
        for cell in self.cells:
            cell.refuse_changing()

    @torch.no_grad()
    def _advance(self, x: Stream, asked: BlockForwards, mask: Mask) -> BlockAdvanced:
        prints = [checksums(x)]
        parts, after, remnants = self.parts(), [], []
        for number, (norm, cell) in enumerate(parts):
            whole = asked.output or number < len(parts) - 1
            forwards = Forwards(asked.states[number], asked.plans[number], whole)
            out, advanced = cell(_input(norm, cell, x), forwards, of_part(mask, number))
            after.append(advanced.state)
            remnants.append(advanced.remnant)
            prints.append(advanced.print)
            x = _added(x, out, cell) if whole else x
        return BlockAdvanced(x if asked.output else None, tuple(after), tuple(remnants), torch.cat(prints))

    def _replay(self, x: Stream, asked: BlockAgain, mask: Mask) -> BlockReplay:
        prints, cells = [checksums(x)], []
        for number, (norm, cell) in enumerate(self.parts()):
            again = Again(
                asked.states[number],
                asked.plans[number],
                None if asked.remnants is None else asked.remnants[number],
                None if asked.after is None else asked.after[number],
            )
            out, replay = cell(_input(norm, cell, x), again, of_part(mask, number))
            cells.append(replay)
            prints.append(replay.print)
            x = _added(x, out, cell)
        handed_on = None
        if asked.after is not None:
            handed_on = cells[0].handed_on
            for cell in cells[1:]:
                handed_on = handed_on & cell.handed_on
        return BlockReplay(
            tuple(cell.state for cell in cells),
            x,
            tuple(cell.start for cell in cells),
            tuple(cell.end for cell in cells),
            torch.cat(prints),
            len(prints[0]) + len(prints[1]),
            handed_on,
        )

    def _checkpointed(self, x: Stream, asked: BlockAgain, mask: Mask) -> BlockReplay:
        generators = random_state.capture({residual(x).device})
        with torch.no_grad():
            quiet = self._replay(x, asked, mask)
        random_state.restore(generators)
        start = tuple(leaves(values) for values in self.values(quiet.states))
        assert self.recompute is not None
        given = tuple(map(OnceMore, quiet.states, start))
        out, end = checkpointed(self.recompute, self.forward, x, given, mask)
        return quiet._replace(out=out, start=start, end=end)


def _input(norm: nn.Module, cell: nn.Module, stream: Stream) -> Stream:
    """What a cell is handed of a stream."""
    x = norm(residual(stream))
    return joined(x, beside(stream)) if _unwrapped(cell).reads_beside else x


def _added(stream: Stream, out: Stream, cell: nn.Module) -> Stream:
    """The stream behind a cell with the output ``out``; one of another shape would be broadcast, and is refused."""
    x, change = residual(stream), residual(out)
    if change.shape != x.shape:
        known = _unwrapped(cell)
        raise ConfigError(
            f"{type(known).__name__} of layer {known.layer} gives {list(change.shape)}; what it gives is added to its "
            f"input, and must be {list(x.shape)}"
        )
    return joined(x + change, beside(out) or beside(stream))


def _unwrapped(cell: nn.Module) -> ReversibleCell:
    """The cell inside of what adapters put around it."""
    if isinstance(cell, ReversibleCell):
        return cell
    for part in cell.modules():
        if isinstance(part, ReversibleCell):
            return part
    raise ConfigError(
        f"{type(cell).__name__} is no cell, and stands where one belongs: a layer is left out by taking its block out "
        "of the model's blocks, and lowering config.num_hidden_layers by one"
    )


def checksums(stream: Stream) -> Tensor:
    """Of each tensor of a stream, int64 [n]."""
    return torch.stack([checksum(tensor) for tensor in parts_of(stream)])


class Block(ResidualBlock):
    """Layer ``layer`` of a model: the cells of its architecture, behind the norms ``ln1``, ``ln2`` and so on.

    Attributes:
        names: (norm, cell), of the attributes that hold them.
    """

    def __init__(self, config: "RwkvRevConfig", layer: int = 0) -> None:
        super().__init__()
        cells = config.architecture.cells(config, layer)
        refuse_other_states(cells, config)
        self.names = [(f"ln{number}", name) for number, name in enumerate(cells, 1)]
        for norm, _ in self.names:
            self.add_module(norm, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon))
        for name, cell in cells.items():
            cell.layer = layer
            self.add_module(name, cell)
            note_parts(cell, config.architecture.initialization)

    def parts(self) -> list[tuple[nn.Module, ReversibleCell]]:
        return [(getattr(self, norm), getattr(self, cell)) for norm, cell in self.names]


def refuse_other_states(cells: Mapping[str, ReversibleCell], config: "RwkvRevConfig") -> None:
    """Raise ConfigError where the architecture has another shape for the state of a token cell than the cell has.

    Of other cells nobody knows the shape before they are run.
    """
    known, shapes = config.architecture, config.architecture.state_shapes(config, 1)
    for (name, cell), (_, tensors) in zip(cells.items(), known.state_kind.cells, strict=False):
        if not isinstance(cell, TokenCell):
            continue
        wanted = [cell.number_of_parts, cell.size]
        for tensor in tensors:
            if (given := list(shapes[tensor][2:])) != wanted:
                letters = known.state[tensor].shape
                raise ConfigError(
                    f"{known.called}: a layer's state has {tensor} {given} (Part({letters!r})), but its {name}, "
                    f"{type(cell).__name__}, has {wanted}, parts of its halves and numbers in each: "
                    f'Part("{wanted[0]} M") where M is {wanted[1]}'
                )


def flat(states: FloatStates) -> list[Tensor]:
    """The tensors of all cells' values, in order."""
    return [tensor for state in states for tensor in tensors_of(state)]


def keeps_the_contract(layer: type[nn.Module]) -> bool:
    """Whether a class is that of a cell or a block, called by the contract's own ``forward``."""
    return any(
        issubclass(layer, base) and all(getattr(layer, name) is getattr(base, name) for name in _CALLS)
        for base in (ReversibleCell, ResidualBlock)
    )


def in_place_of_layers(blocks: Iterable[nn.Module]) -> dict[int, bool]:
    """Identities of modules that are no block or cell where one belongs: whether one is inside, as of wrappers.

    A wrapper that hands on the attributes of what it wraps is as good as that.
    """
    expected: list[tuple[nn.Module, type[nn.Module]]] = [(block, ResidualBlock) for block in blocks]
    whole = [block for block, _ in expected if isinstance(block, ResidualBlock)]
    expected += [(cell, ReversibleCell) for block in whole for cell in block.cells]
    return {
        id(module): any(isinstance(part, kind) for part in module.modules())
        for module, kind in expected
        if not isinstance(module, kind) and not all(hasattr(module, name) for name in _asked_for(kind))
    }


def _asked_for(kind: type[nn.Module]) -> list[str]:
    """What is asked of a block or a cell beside its call."""
    return [name for name in vars(kind) if not name.startswith("_")]
