"""The state of a cell with a token shift: as values, exact, and what a chunk forgets of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rwkv_rev.cells.token_shift import Border
from rwkv_rev.reversal.memory import Memory


class ShiftedState(NamedTuple):
    """Values of the state: shift [B, D], the last valid token's input, and memory (its shape is the cell's) or None."""

    shift: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class ExactShiftedState:
    """A state that is exact to the bit.

    Attributes:
        shift: [B, D], the last valid token's input vector.
        memory: the recurrence's memory, or None.
        carried: [B, D], the y that ``shift`` was rebuilt from, when it came out of ``retreat``.
        border: what y was mixed with, likewise.
    """

    shift: Tensor
    memory: Memory | None
    carried: Tensor | None = None
    border: Border | None = None

    def tensors(self) -> list[Tensor]:
        return [self.shift, *([] if self.memory is None else self.memory.tensors())]

    def computed(self) -> list[Tensor]:
        found = [self.shift]
        if self.carried is not None and self.border is not None:
            found += [self.carried, *self.border]
        return found + ([] if self.memory is None else self.memory.computed())

    def like(self, tensors: list[Tensor]) -> "ExactShiftedState":
        shift, *rest = tensors
        return ExactShiftedState(shift, None if self.memory is None else self.memory.like(rest))

    def of_computed(self, tensors: list[Tensor]) -> "ExactShiftedState":
        if self.carried is None:
            return self.like(tensors)
        shift, carried, first, mu, *rest = tensors
        memory = None if self.memory is None else self.memory.like(rest)
        return ExactShiftedState(shift, memory, carried, Border(first, mu))

    def fingerprint(self) -> Tensor | None:
        """Of the memory: the token shift is in the print of the chunk before."""
        return None if self.memory is None else self.memory.fingerprint().flatten()

    def coarse(self) -> Tensor | None:
        return None if self.memory is None else self.memory.coarse()

    @property
    def when_coarse(self) -> str:
        return "" if self.memory is None else self.memory.when_coarse

    def remnant(self, tensors: list[Tensor]) -> "ShiftedRemnant":
        carried, *rest = tensors
        return ShiftedRemnant(carried, None if self.memory is None else self.memory.remnant(rest))


@dataclass(frozen=True)
class ShiftedRemnant:
    """What one chunk forgot: the carried y [B, D], and the memory's remnant, or None."""

    carried: Tensor
    memory: Any

    @property
    def size(self) -> Tensor | None:
        return None if self.memory is None else self.memory.size

    @property
    def excess(self) -> Tensor | None:
        return None if self.memory is None else self.memory.excess

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return [self.carried, *([] if self.memory is None else self.memory.tensors(size))]
