"""What memories share whose state lies on a :class:`FixedPoint`'s grid, whatever they do with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rwkv_rev.reversal.fixed_point import FixedPoint


@dataclass(frozen=True)
class OnGrid:
    """A memory of :class:`~rwkv_rev.reversal.memory.Memory` but for how it advances, retreats and what it forgets."""

    grid: FixedPoint

    @classmethod
    def of(cls, value: Tensor, *, wide: bool = False) -> Self:
        """The memory nearest to a float state [B, H, N, N]; ``wide`` as of :meth:`FixedPoint.of`."""
        return cls(FixedPoint.of(value, wide=wide))

    @classmethod
    def of_each(cls, values: Sequence[Tensor], *, wide: bool = False) -> list[Self]:
        """:meth:`of` of several float states, in few launches."""
        return list(map(cls, FixedPoint.of_each(values, wide=wide)))

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The state [B, H, N, N] as floats, rounded once."""
        return self.grid.value(dtype)

    def tensors(self) -> list[Tensor]:
        return self.grid.tensors()

    def computed(self) -> list[Tensor]:
        return self.grid.computed()

    def like(self, tensors: list[Tensor]) -> Self:
        return type(self)(self.grid.like(tensors))

    of_computed = like

    def fingerprint(self) -> Tensor:
        """Checksum of the state's bits, int64 [B, H]."""
        return self.grid.fingerprint()

    when_coarse = FixedPoint.when_coarse

    def coarse(self) -> Tensor:
        return self.grid.coarse()
