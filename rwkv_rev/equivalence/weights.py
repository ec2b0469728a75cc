"""Whether a converted model holds exactly the values of its original, tensor by tensor.

Logits show what a text makes visible; a weight of a token that the text lacks, or one too small to move a
logit by the tolerance, shows here only. Two tensors are read at a time, both memory-mapped.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.converters.converted import ConvertedModel


@dataclass(frozen=True)
class DifferentTensor:
    """A tensor whose stored values are not the original's: its name in the converted model, and how many."""

    name: str
    values: int
    of: int

    def __str__(self) -> str:
        return f"{self.name} ({self.values} of {self.of} values)"


@dataclass(frozen=True)
class WeightComparison:
    """Outcome of :func:`compare_weights`.

    Attributes:
        tensors: how many were compared. different: those that differ, in the order of the model.
        rounded_to: the dtype some values were rounded to, where the stored dtype is narrower than the
        source's; None
            when every value was kept.
    """

    tensors: int
    different: tuple[DifferentTensor, ...]
    rounded_to: torch.dtype | None

    @property
    def passed(self) -> bool:
        """No tensor differs from the original's, rounded once to the stored dtype."""
        return not self.different


def compare_weights(original: Mapping[str, Tensor], converted: ConvertedModel) -> WeightComparison:
    """Compare every tensor with the original's after one rounding to the dtype it is stored in.

    Args:
        original: tensors under our names and shapes, in the order of the model.
        converted: the open directory; must hold the same names and shapes.
    """
    different = []
    rounded_to = None
    for name, tensor in original.items():
        stored = converted.tensor(name)
        rounded = tensor.to(stored.dtype)
        unequal = int((rounded != stored).sum())
        if unequal:
            different.append(DifferentTensor(name, unequal, stored.numel()))
        if tensor.dtype != stored.dtype and not torch.equal(rounded.to(tensor.dtype), tensor):
            rounded_to = stored.dtype
    return WeightComparison(len(original), tuple(different), rounded_to)
