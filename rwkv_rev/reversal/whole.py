"""A memory that is kept whole: what a chunk forgets is the state before it. For states of a few numbers per channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.reversal.fingerprint import fingerprint


@dataclass(frozen=True)
class Whole:
    """``state``, a tensor of any shape and floating-point type."""

    state: Tensor

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The state as it is."""
        return self.state

    def advance(self, after: Tensor) -> tuple["Whole", "WholeRemnant"]:
        """The memory ``after`` a chunk, and its remnant."""
        return Whole(after), WholeRemnant(self.state)

    def tensors(self) -> list[Tensor]:
        return [self.state]

    def computed(self) -> list[Tensor]:
        return [self.state]

    def like(self, tensors: list[Tensor]) -> "Whole":
        return Whole(tensors[0])

    of_computed = like  # by itself it is a cell's exact state, too

    def fingerprint(self) -> Tensor:
        """Checksum, int64 [1]."""
        return fingerprint(self.state)[None]

    when_coarse = ""

    def coarse(self) -> None:
        return None

    def remnant(self, tensors: list[Tensor]) -> "WholeRemnant":
        return WholeRemnant(tensors[0])


@dataclass(frozen=True)
class WholeRemnant:
    """The state ``before`` a chunk."""

    before: Tensor
    size: None = None
    excess: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return [self.before]
