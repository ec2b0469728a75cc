"""A memory that only adds, in a number format of one's choice, and that says so when it is full.

``S <- S + round(U / grid)``, with the grid ``2**exponent``. Nothing is forgotten, nothing goes on the tape, and
subtraction undoes addition to the bit. A sum that leaves its format ends the step with a
:class:`~rwkv_rev.reversal.stepped.GridOverflowError`. The formats (the "EBRT-Int" and "EBRT-Infinite" cells
of the EBRT draft):

* ``int16``, ``int32``, ``int64``: integers;
* ``float32``, ``float64``: floating-point numbers with a *restricted mantissa*: what is added is rounded to the grid
  first, so that sums below 2**24 (2**53) units are exact, and nothing is ever rounded away.

An unrestricted sum loses half of its mantissa within NUHMC updates (:mod:`rwkv_rev.numerics`). A restricted one gives
up bits of each update beforehand instead: with q bits for an update, b bits and a sign hold at least ``2**(b - q)`` of
them (:func:`capacity`), all to the bit; the state of a context that is longer is named, not wrong.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.errors import ConfigError
from rwkv_rev.reversal.fingerprint import fingerprint
from rwkv_rev.reversal.stepped import GridOverflowError, is_recorded

FORMATS = {
    "int16": (torch.int16, 15),
    "int32": (torch.int32, 31),
    "int64": (torch.int64, 63),
    "float32": (torch.float32, 24),
    "float64": (torch.float64, 53),
}
"""Of each format the tensor's, and the bits that it has beside the sign."""
_BITS = dict(FORMATS.values())


@dataclass(frozen=True)
class Additive:
    """``units * 2**exponent``.

    Attributes:
        units: [B, ...] whole numbers, in a tensor of the chosen format.
        exponent: of the grid, the same for all.
    """

    units: Tensor
    exponent: int

    @classmethod
    def of(cls, value: Tensor, *, format: str = "int32", exponent: int = -20) -> "Additive":
        """The memory nearest to ``value`` [B, ...].

        Raises:
            ConfigError: for a format that does not exist.
            GridOverflowError: if a number does not fit.
        """
        if format not in FORMATS:
            raise ConfigError(f"the format {format!r} of a state does not exist; use {', '.join(FORMATS)}")
        empty = torch.zeros(value.shape, dtype=FORMATS[format][0], device=value.device)
        return cls(empty, exponent).advance(value)[0]

    @property
    def bits(self) -> int:
        """Beside the sign."""
        return _BITS[self.units.dtype]

    @property
    def largest(self) -> int:
        """The largest number of units."""
        return (1 << self.bits) - 1

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The memory as floats, rounded once."""
        units = self.units.double()
        if not self.units.is_floating_point():
            units = torch.where(self.units == self._lost, torch.nan, units)
        return (units * 2.0**self.exponent).to(dtype)

    def advance(self, contribution: Tensor) -> tuple["Additive", "NoRemnant"]:
        """One chunk forwards: the memory after ``contribution`` [B, ...] was added; inf and NaN make it NaN for good.

        Raises:
            GridOverflowError: if a number does not fit. Where a CUDA graph is recorded nobody can look: it is NaN then.
        """
        change = torch.round(contribution.double() * 2.0**-self.exponent)
        if self.units.is_floating_point():
            after = self.units.double() + change
            beyond = (after.abs() > self.largest) & after.isfinite()
            kept = torch.where(beyond, torch.nan, after)
        else:
            lost = ~change.isfinite() | (self.units == self._lost)
            outside = change.abs() >= 2.0**63
            change = torch.where(lost | outside, 0.0, change).to(torch.int64)
            before = self.units.to(torch.int64)
            after = before + change  # modulo 2**64: wrong where both have the sign that the sum has not
            wrapped = ((before ^ after) & (change ^ after)) < 0
            beyond = ~lost & (outside | wrapped | (after > self.largest) | (after < -self.largest))
            kept = torch.where(lost | beyond, self._lost, after)
        if not is_recorded(beyond) and bool(beyond.any()):
            row = int(beyond.flatten(1).any(1).nonzero()[0])
            raise GridOverflowError(
                f"the sum of row {row} has left its grid: a number beyond {self.largest * 2.0**self.exponent:g}; "
                f"{str(self.units.dtype).removeprefix('torch.')} holds {self.bits} bits and a sign, in steps of "
                f"2**{self.exponent}; take a wider format or a larger exponent"
            )
        return self.like([kept.to(self.units.dtype)]), NoRemnant()

    def retreat(self, contribution: Tensor) -> "Additive":
        """One chunk backwards, from the same contribution, bit for bit; what is NaN stays so."""
        change = torch.round(contribution.double() * 2.0**-self.exponent)
        if self.units.is_floating_point():
            return self.like([(self.units.double() - change).to(self.units.dtype)])
        whole = change.nan_to_num(0.0, 0.0, 0.0).to(torch.int64)
        before = torch.where(self.units == self._lost, self._lost, self.units.to(torch.int64) - whole)
        return self.like([before.to(self.units.dtype)])

    def tensors(self) -> list[Tensor]:
        return [self.units]

    def computed(self) -> list[Tensor]:
        return [self.units]

    def like(self, tensors: list[Tensor]) -> "Additive":
        return Additive(tensors[0], self.exponent)

    of_computed = like

    def fingerprint(self) -> Tensor:
        """Checksum, int64 [1]."""
        return fingerprint(self.units)[None]

    def coarse(self) -> None:
        return None

    @property
    def when_coarse(self) -> str:
        return ""

    def remnant(self, tensors: list[Tensor]) -> "NoRemnant":
        return NoRemnant()

    @property
    def _lost(self) -> int:
        """The integer that stands for NaN: one that no sum has."""
        return -(1 << self.bits)


@dataclass(frozen=True)
class NoRemnant:
    """Nothing was forgotten."""

    size: None = None
    excess: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return []


def check_exponent(format: str, exponent: int, name: str = "exponent") -> None:
    """Refuse a grid 2^e that cannot be meant: numbers of order one must fit, and be no less than one unit.

    Raises:
        ConfigError: for such an ``exponent``, which is called ``name``, and for a format that does not exist.
    """
    if format not in FORMATS:
        raise ConfigError(f"the format {format!r} of a state does not exist; use {', '.join(FORMATS)}")
    least = 1 - FORMATS[format][1]
    if not least <= exponent <= 0:
        why = "does not fit" if exponent < least else "is rounded away"
        raise ConfigError(
            f"{name} = {exponent} must be from {least} to 0 for {format}: on a grid of 2^{exponent} a 1 {why}"
        )


def capacity(format: str, update_bits: int) -> int:
    """Updates of up to ``2**update_bits - 1`` units that a sum from 0 holds for certain.

    Half of the format's bits for an update, as NUHMC counts: int16 258, int32 65,538, int64 4,294,967,298, float32
    4,097, float64 134,217,730.
    """
    return ((1 << FORMATS[format][1]) - 1) // ((1 << update_bits) - 1)
