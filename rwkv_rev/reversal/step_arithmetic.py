"""``D = floor(z s + 1/2)`` of integers s, and which integers z sends to D: two ways to compute it.

:class:`Floats` keeps integers of up to 50 bits in float64, where a product is rounded once and inf and NaN stay by
themselves. :class:`Integers` computes in int64, with 61 bits and z in 62, exactly: a grid as fine as float64 itself, so
that a gradient in float64 has ten digits whatever the gates do to a state's rounding. It takes three times as many
launches, so float32 does without.

Both are monotone in s, so that the preimages of D are the integers from ``least(D)`` to ``least(D + 1) - 1``.
"""

from typing import Protocol

import torch
from torch import Tensor

from rwkv_rev.reversal.bit_stack import widths_of


class Arithmetic(Protocol):
    """Of *units*, tensors of whole numbers.

    Attributes:
        dtype: of the tensors.
        lost: the unit that stands for inf and NaN; it stays, whatever is added or multiplied.
    """

    dtype: torch.dtype
    lost: float

    def units(self, value: Tensor) -> Tensor:
        """The nearest, of float64."""

    def floats(self, units: Tensor) -> Tensor:
        """As float64, rounded once."""

    def sum(self, units: Tensor, others: Tensor) -> Tensor:
        """``units + others``."""

    def difference(self, units: Tensor, others: Tensor) -> Tensor:
        """``units - others``."""

    def decayed(self, units: Tensor, decay: Tensor) -> Tensor:
        """D of s and z in [0, 1], float64."""

    def preimages(self, kept: Tensor, decay: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        """The least of the integers up to ``largest``, or down to its negative, that z sends to D, and the bits that
        tell them apart, int64. Of what is lost nobody looks at them."""


class Floats:
    """float64 integers of up to 50 bits."""

    dtype = torch.float64
    lost: float = float("nan")

    def units(self, value: Tensor) -> Tensor:
        return value.round()

    def floats(self, units: Tensor) -> Tensor:
        return units

    def sum(self, units: Tensor, others: Tensor) -> Tensor:
        return units + others

    def difference(self, units: Tensor, others: Tensor) -> Tensor:
        return units - others

    def decayed(self, units: Tensor, decay: Tensor) -> Tensor:
        """In place of the product; halves go up, so that z = 1/2 sends two integers to each, not three and one."""
        return (decay * units).add_(0.5).floor_()

    def preimages(self, kept: Tensor, decay: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        first = self.least(kept, decay, largest)
        count = self.least(kept + 1, decay, largest) - first
        return first, widths_of(count.nan_to_num_(1.0, 1.0, 1.0).clamp_(min=1))

    def least(self, target: Tensor, decay: Tensor, largest: int) -> Tensor:
        """The least of them whose D is ``target`` or above; ``largest + 1`` if none.

        The quotient is off by less than a half for up to 50 bits: its ceiling, less a half, is the answer or the
        integer below it, and one product tells which.
        """
        guess = ((target - 0.5) / decay - 0.5).ceil_().clamp_(-largest, largest + 1)
        short = self.decayed(guess, decay) < target
        return guess.add_(short).clamp_(max=largest + 1)


class Integers:
    """int64 of up to 61 bits: sums of a state and what is added to it, cut at 62, have room."""

    dtype = torch.int64
    lost: float = -(1 << 63)
    _ONE = 1 << 62
    """z in units of 2**-62; at least one of them, so that it can be divided by."""
    _HALF, _LOW = 31, (1 << 31) - 1

    def units(self, value: Tensor) -> Tensor:
        whole = value.round().clamp(-float(self._ONE), float(self._ONE)).nan_to_num(0.0).to(torch.int64)
        return torch.where(value.isfinite(), whole, self.lost)

    def floats(self, units: Tensor) -> Tensor:
        return torch.where(units == self.lost, torch.nan, units.double())

    def sum(self, units: Tensor, others: Tensor) -> Tensor:
        return self._unless_lost(units + others, units, others)

    def difference(self, units: Tensor, others: Tensor) -> Tensor:
        return self._unless_lost(units - others, units, others)

    def decayed(self, units: Tensor, decay: Tensor) -> Tensor:
        """``(Z s + 2**61) >> 62`` without the 124 bits of the product: in halves of 31 bits."""
        found = self._decayed(units, self._whole(decay))
        return torch.where(decay.isfinite() & (units != self.lost), found, self.lost)

    def preimages(self, kept: Tensor, decay: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        first = self.least(kept, decay, largest)
        last = (self.least(kept + 1, decay, largest) - first - 1).clamp_(min=0)
        return torch.where(kept == self.lost, self.lost, first), self._widths(last)

    def most_widths(self, decay: Tensor) -> Tensor:
        """Bits that tell apart what z sends to any D, int64: 0 for z = 1, 62 for 0.

        There is room for a z that is 4 of float64's last digits smaller: the same exponential, computed in another
        place of a vector, may be one smaller.
        """
        whole = self._whole(decay)
        last = torch.div(self._ONE - 1, (whole - (whole >> 50) - 1).clamp_(min=1), rounding_mode="floor")
        return torch.where(decay == 1, 0, self._widths(last))

    def least(self, target: Tensor, decay: Tensor, largest: int) -> Tensor:
        """As above: ``ceil((2**62 D - 2**61) / Z)``.

        Guessed in float64, off by up to 2**9; once better, so that what is missing has 63 bits; and then the rest by a
        division of integers.
        """
        whole = self._whole(decay)
        real = whole.double() / self._ONE
        guess = self._cut((target.double() - 0.5) / real, largest)
        guess = guess + self._cut((target - self._decayed(guess, whole)).double() / real, self._ONE)
        guess = guess.clamp(-largest, largest)
        short = target * self._ONE - (self._ONE >> 1) - whole * guess  # modulo 2**64
        found = guess - torch.div(-short, whole, rounding_mode="floor")
        return found.clamp(-largest, largest + 1)

    def _widths(self, last: Tensor) -> Tensor:
        """Bits of numbers from 0 to ``last``."""
        last = torch.where(last < 1 << 53, last, last & ~1023)  # so that float64 does not round it up
        _, widths = torch.frexp(last.double())
        return widths.to(torch.int64)

    def _whole(self, decay: Tensor) -> Tensor:
        """Z, from 1 to 2**62."""
        return (decay.nan_to_num(1.0) * float(self._ONE)).round().to(torch.int64).clamp(1, self._ONE)

    def _decayed(self, units: Tensor, whole: Tensor) -> Tensor:
        high, low = units >> self._HALF, units & self._LOW
        whole_high, whole_low = whole >> self._HALF, whole & self._LOW
        middle = whole_high * low + whole_low * high + (whole_low * low >> self._HALF)
        return whole_high * high + ((middle + (1 << 30)) >> self._HALF)

    def _cut(self, value: Tensor, largest: int) -> Tensor:
        return value.nan_to_num(0.0).clamp(-float(largest), float(largest)).round().to(torch.int64)

    def _unless_lost(self, found: Tensor, *of: Tensor) -> Tensor:
        lost = (of[0] == self.lost) | (of[1] == self.lost)
        return torch.where(lost, self.lost, found)
