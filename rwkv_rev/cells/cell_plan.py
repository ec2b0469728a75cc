"""What a cell with a token shift computes of its weights once per sweep."""

from typing import Any, NamedTuple

from torch import Tensor


class CellPlan(NamedTuple):
    """What the exact update needs of the weights, computed once per sweep: mu* [D], and the memory's plan.

    ``sources`` are the tensors that both were made of.
    """

    mix: Tensor
    memory: Any
    sources: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        """All that the plan is made of, on the device."""
        return [self.mix, *([] if self.memory is None else self.memory.tensors())]

    def prepare(self) -> None:
        """Make now what is made at its first use, on the host: where launches are recorded, that is too late."""
        if self.memory is not None:
            self.memory.prepare()

    def holds(self, other: "CellPlan") -> bool:
        """Whether chunks planned so can be run by this plan, once it has the other's tensors."""
        return self.memory is None or self.memory.holds(other.memory)
