"""A memory that only adds: integers on a grid of their own, so that subtraction undoes addition to the bit.

``S <- S + round(U / grid)`` modulo 2**bits. Nothing is forgotten, and nothing goes on the tape. Integers of a fixed
width wrap around: reversal stays exact, the value does not, so :meth:`Additive.coarse` tells of parts that have come
within a factor of two of the largest number, before any wraps that adds less than half the range at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.reversal.fingerprint import fingerprint

_KINDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class Additive:
    """``mantissa * 2**exponent``.

    Attributes:
        mantissa: [B, ...] integers.
        exponent: of the grid, the same for all.
    """

    mantissa: Tensor
    exponent: int

    @classmethod
    def of(cls, value: Tensor, *, bits: int = 32, exponent: int = -20) -> "Additive":
        """The memory nearest to ``value`` [B, ...], in integers of 16, 32 or 64 bits."""
        return cls(torch.zeros(value.shape, dtype=_KINDS[bits], device=value.device), exponent).advance(
            value
        )[0]

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The memory as floats, rounded once."""
        return (self.mantissa.double() * 2.0**self.exponent).to(dtype)

    def advance(self, contribution: Tensor) -> tuple["Additive", "NoRemnant"]:
        """One chunk forwards: the memory after ``contribution`` [B, ...] was added."""
        return Additive(self.mantissa + self._units(contribution), self.exponent), NoRemnant()

    def retreat(self, contribution: Tensor) -> "Additive":
        """One chunk backwards, from the same contribution, bit for bit."""
        return Additive(self.mantissa - self._units(contribution), self.exponent)

    def tensors(self) -> list[Tensor]:
        return [self.mantissa]

    def computed(self) -> list[Tensor]:
        return [self.mantissa]

    def like(self, tensors: list[Tensor]) -> "Additive":
        return Additive(tensors[0], self.exponent)

    of_computed = like  # by itself it is a cell's exact state, too

    def fingerprint(self) -> Tensor:
        """Checksum, int64 [1]."""
        return fingerprint(self.mantissa)[None]

    def coarse(self) -> Tensor:
        """[B, 1] bool, rows with a number beyond half the range: the next additions may wrap around."""
        largest = torch.iinfo(self.mantissa.dtype).max
        return (self.mantissa.flatten(1).abs() > largest // 2).any(1, keepdim=True)

    @property
    def when_coarse(self) -> str:
        bits = self.mantissa.dtype.itemsize * 8
        return (
            f"has come within a factor of two of the largest number that its integers of {bits} bits hold on the grid "
            f"2^{self.exponent}, beyond which it wraps around and is wrong: take more bits or a coarser grid"
        )

    def remnant(self, tensors: list[Tensor]) -> "NoRemnant":
        return NoRemnant()

    def _units(self, contribution: Tensor) -> Tensor:
        return torch.round(contribution.double() * 2.0**-self.exponent).to(self.mantissa.dtype)


@dataclass(frozen=True)
class NoRemnant:
    """Nothing was forgotten."""

    size: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return []
