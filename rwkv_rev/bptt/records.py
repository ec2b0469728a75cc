"""What a chunk puts on the tape: by layer, what is compared, and what each cell needs to come back.

What is compared are a block's print and the fingerprints of the memories before it. A record is a flat list of groups
of tensors, ``1 + cells`` groups for every layer.

Of a chunk with borders the states before it are kept whole, whatever the strategy: a border forgets everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.cells.contract import Exact
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.reversal.memory import Remnant


class Sizes(NamedTuple):
    """What the size of a record depends on: tensors of all parts, or None, and all of them in one, on the device."""

    shapes: list[torch.Size | None]
    joined: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[Remnant]) -> "Sizes":
        sizes = [part.size for part in parts]
        there = [size.flatten() for size in sizes if size is not None]
        return cls(
            [None if size is None else size.shape for size in sizes],
            torch.cat(there).to(torch.int32) if there else None,
        )

    def split(self, joined: Tensor | None) -> list[Tensor | None]:
        """Each part's own, from :attr:`joined` on the host; None for parts without and where ``joined`` is None."""
        found: list[Tensor | None] = []
        place = 0
        for shape in self.shapes:
            if shape is None or joined is None:
                found.append(None)
                continue
            found.append(joined[place : place + shape.numel()].view(shape))
            place += shape.numel()
        return found


class Record(NamedTuple):
    """What a chunk puts on the tape.

    Attributes:
        sizes: on the device, what the record's size depends on, in one tensor; None where it depends on no data.
        tensors: the record, from ``sizes`` on the host (None for what depends on no data).
        excess: computes on the device what is not zero where ``tensors(None)`` is not enough; None where it always is.
        coarse: [L, B, H] bool, parts of memories that are coarse after the chunk; None where none can be.
        compared: of each layer what is compared, its block's print first.
    """

    sizes: Tensor | None
    tensors: Callable[[Tensor | None], list[list[Tensor]]]
    excess: Callable[[], Tensor | None]
    coarse: Tensor | None = None
    compared: Sequence[Sequence[Tensor]] = ()

    def start(self) -> Callable[[], list[list[Tensor]]]:
        """A function that gives the record; called a chunk later, it does not wait for the device."""
        sizes = None if self.sizes is None else start_copy(self.sizes)
        return lambda: self.tensors(None if sizes is None else sizes())


def make_record(
    before: Sequence[ExactStates],
    advanced: Sequence[BlockAdvanced],
    kept: Sequence[Sequence[Remnant]],
    *,
    exact: bool,
) -> Record:
    """The record of a chunk: ``kept`` is what each layer's cells need to come back.

    ``exact``: memories come back to the bit, and their fingerprints are compared.
    """
    front = [
        [layer.print, *(fingerprints(states) if exact else [])]
        for states, layer in zip(before, advanced, strict=True)
    ]
    parts = [part for layer in kept for part in layer]
    sizes = Sizes.of(parts)

    def tensors(joined: Tensor | None) -> list[list[Tensor]]:
        own = iter(sizes.split(joined))
        groups: list[list[Tensor]] = []
        for compared, layer in zip(front, kept, strict=True):
            groups.append(compared)
            groups.extend(part.tensors(next(own)) for part in layer)
        return groups

    def excess() -> Tensor | None:
        found = [part.excess.flatten() for part in parts if part.excess is not None]
        return torch.cat(found) if found else None

    return Record(sizes.joined, tensors, excess, coarse([layer.states for layer in advanced]), front)


@dataclass(frozen=True)
class WholeState:
    """In the place of a remnant: the exact state before a chunk, whole."""

    state: Exact
    size: None = None
    excess: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return self.state.tensors()


def keep_whole(before: Sequence[ExactStates]) -> list[list[Remnant]]:
    """In the place of remnants: the states themselves."""
    return [[WholeState(state) for state in layer] for layer in before]


def whole_again(after: ExactStates, record: "LayerRecord", plans: Plans) -> BlockAgain:
    """How a layer whose state was kept whole computes a chunk again."""
    before = tuple(state.like(tensors) for state, tensors in zip(after, record.cells, strict=True))
    return BlockAgain(before, plans)


class LayerRecord(NamedTuple):
    """A layer's part of a record: what is compared, and what each cell needs."""

    compared: list[Tensor]
    cells: list[list[Tensor]]


def layer_record(record: list[list[Tensor]], layer: int, cells: int) -> LayerRecord:
    """The part of ``layer``, whose block has so many cells; all blocks have as many."""
    compared, *parts = record[layer * (1 + cells) :][: 1 + cells]
    return LayerRecord(compared, parts)


def fingerprints(states: ExactStates) -> list[Tensor]:
    """Of the memories of a block's cells that have one, int64."""
    return [found for state in states if (found := state.fingerprint()) is not None]


def coarse(states: Sequence[ExactStates]) -> Tensor | None:
    """[L, B, H] bool, parts of memories less precise than they should be; None where that cannot happen."""
    each = [[part for state in layer if (part := state.coarse()) is not None] for layer in states]
    found = [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in each if parts]
    return torch.stack(found) if found else None
