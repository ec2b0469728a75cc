"""The exact state of a cell whose memories only add: nothing is forgotten, and no remnant is kept.

Also that of a cell without a memory, which has none of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.reversal.additive import Additive, NoRemnant


@dataclass(frozen=True)
class ExactSums:
    """Any number of memories of one tensor each."""

    memories: tuple[Additive, ...] = ()

    def tensors(self) -> list[Tensor]:
        return [tensor for memory in self.memories for tensor in memory.tensors()]

    computed = tensors

    def like(self, tensors: list[Tensor]) -> "ExactSums":
        pairs = zip(self.memories, tensors, strict=True)
        return ExactSums(tuple(memory.like([tensor]) for memory, tensor in pairs))

    of_computed = like

    def fingerprint(self) -> Tensor | None:
        """int64 [n], one for each memory."""
        return torch.cat([memory.fingerprint() for memory in self.memories]) if self.memories else None

    def coarse(self) -> None:
        return None

    @property
    def when_coarse(self) -> str:
        return self.memories[0].when_coarse

    def remnant(self, tensors: list[Tensor]) -> NoRemnant:
        return NoRemnant()
