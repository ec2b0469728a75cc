"""``D = Lambda * S``, rounded, of a head's integers S, and the least integer that gives D: two ways to compute it.

:class:`Narrow` has mantissas of 31 bits in int32 and multiplies in float64, which holds every product's integers.
:class:`Wide` is for models in float64: mantissas of 61 bits in int64, as fine as float64 itself, and a Lambda in 62
bits, whose products :class:`~rwkv_rev.reversal.step_arithmetic.Integers` takes exactly. It takes some three times as
long, so float32 does without.

In both, D follows from S alone and rises with it, so that S is the least integer that gives D and a remnant, whose
width follows from Lambda. That is all that the way back needs; how near D is to Lambda S is a matter of precision.

*Units* are whole numbers on a head's grid, ``2**exponent``: float64 of the narrow arithmetic, int64 of the wide one.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rwkv_rev.reversal.step_arithmetic import Integers

SMALLEST_EXPONENT = -200
NON_FINITE = 1024
"""Exponent of a head that holds inf or NaN: ``2**1024`` is inf in float64, so all its values are inf or NaN."""
LARGEST = 2**31 - 2
"""Largest magnitude before rounding (so that int32 holds it after); above it the grid rises."""
TARGET_BITS = 27
"""Bits of the largest mantissa after a rise: 3 more than float32 keeps, 4 doublings below the next rise."""
WIDE_LARGEST = 2**61 - 2**11
"""The same of int64: what float64 says of a magnitude up to 2**61 is right within 2**9."""
WIDE_TARGET_BITS = 58
"""5 more than float64 keeps, 3 doublings below the next rise."""
SLACK = 2.0**-19
"""Bound on the float64 error of ``Lambda * S`` and of the division, in units of the grid, with room to spare."""
_FLOAT64_BIAS = 1023
_FLOAT64_MANTISSA_BITS = 52
_MOST_SHIFT = 62


class Decayed(NamedTuple):
    """What a chunk leaves: S' and D [B, H, N, M] as mantissas, exponents [B, H], and the heads [B, H] that rose."""

    mantissa: Tensor
    kept: Tensor
    exponent: Tensor
    raised: Tensor


class Arithmetic(Protocol):
    """Of a mantissa's format.

    Attributes:
        dtype: of mantissas.
        target_bits: of the largest one after a rise.
    """

    dtype: torch.dtype
    target_bits: int

    def units(self, value: Tensor, exponent: Tensor) -> Tensor:
        """A value [B, H, N, M] in units, rounded."""

    def decayed(self, mantissa: Tensor, exponent: Tensor, contribution: Tensor, decay: Tensor) -> Decayed:
        """``S' = D + round(U / grid)``, on a grid that has risen where it must; ``decay`` [B or 1, H, N, 1] float64."""

    def base(self, kept: Tensor, decay: Tensor) -> Tensor:
        """The least integer that Lambda sends to D, in units."""

    def bits(self, decay: Tensor) -> Tensor:
        """Bits, int64, that tell apart whatever Lambda sends to one D; those of a mantissa for "whole"."""


class Narrow:
    """int32, by way of float64."""

    dtype = torch.int32
    target_bits = TARGET_BITS

    def units(self, value: Tensor, exponent: Tensor) -> Tensor:
        return (value.double() * power(-exponent)).round_()

    def decayed(self, mantissa: Tensor, exponent: Tensor, contribution: Tensor, decay: Tensor) -> Decayed:
        decayed = decay * mantissa
        unit = contribution.double() * power(-exponent)
        raised, above = risen((decayed + unit).abs_().amax(dim=(2, 3)), exponent, LARGEST, TARGET_BITS)
        shrink = power(exponent - above)
        decayed = decayed.mul_(shrink).round_()
        after = unit.mul_(shrink).round_().add_(decayed).to(torch.int32)
        return Decayed(after, decayed.to(torch.int32), above, raised)

    def base(self, kept: Tensor, decay: Tensor) -> Tensor:
        """Up to :data:`SLACK` (so D itself for Lambda = 1)."""
        return (kept.double() - 0.5).div_(decay).sub_(SLACK).ceil_()

    def bits(self, decay: Tensor) -> Tensor:
        """0 for Lambda = 1, 32 for "whole"."""
        largest = torch.floor(1 / decay + 2 * SLACK).clamp(max=2.0**32)
        _, bits = torch.frexp(largest)
        return torch.where(decay == 1, 0, bits.clamp(max=32)).to(torch.int64)


class Wide:
    """int64. Lambda is rounded to 2**-62, which D feels as less than a unit; nothing is ever whole."""

    dtype = torch.int64
    target_bits = WIDE_TARGET_BITS
    _integers = Integers()

    def units(self, value: Tensor, exponent: Tensor) -> Tensor:
        return self._integers.units(value.double() * power(-exponent))

    def decayed(self, mantissa: Tensor, exponent: Tensor, contribution: Tensor, decay: Tensor) -> Decayed:
        unit = contribution.double() * power(-exponent)
        largest = (decay * mantissa + unit).abs_().amax(dim=(2, 3))
        raised, above = risen(largest, exponent, WIDE_LARGEST, WIDE_TARGET_BITS)
        rise = (above - exponent).to(torch.int64).clamp(max=_MOST_SHIFT)[:, :, None, None]
        kept = self._integers.decayed(mantissa, decay)
        kept = kept.add_((1 << rise) >> 1).bitwise_right_shift_(rise)
        after = self._integers.units(unit.mul_(power(exponent - above))).add_(kept)
        return Decayed(after, kept, above, raised)

    def base(self, kept: Tensor, decay: Tensor) -> Tensor:
        return self._integers.least(kept, decay, WIDE_LARGEST + 2**10)

    def bits(self, decay: Tensor) -> Tensor:
        """0 for Lambda = 1, 62 for 0."""
        return self._integers.most_widths(decay)


_NARROW, _WIDE = Narrow(), Wide()


def arithmetic_of(*, wide: bool) -> Arithmetic:
    """Of a model in float64, or of any other."""
    return _WIDE if wide else _NARROW


def risen(largest: Tensor, exponent: Tensor, most: int, bits: int) -> tuple[Tensor, Tensor]:
    """The heads whose ``largest`` magnitude in units [B, H] is beyond ``most``, and exponents at which all fit."""
    raised = ~(largest <= most)  # NaN too
    above = torch.where(raised, exponent + exponent_for(largest, bits), exponent)
    return raised, above.clamp(max=NON_FINITE)


def power(exponent: Tensor) -> Tensor:
    """2**exponent [B, H, 1, 1], float64, exact: written into the exponent bits of the format."""
    bits = (exponent.to(torch.int64) + _FLOAT64_BIAS) << _FLOAT64_MANTISSA_BITS
    return bits.view(torch.float64)[:, :, None, None]


def exponent_for(largest: Tensor, bits: int) -> Tensor:
    """The exponent at which a value of magnitude ``largest`` [B, H] has so many bits, int32.

    :data:`SMALLEST_EXPONENT` for 0; for inf and NaN so large that any sum with it exceeds NON_FINITE.
    """
    _, exponent = torch.frexp(largest)
    exponent = torch.where(largest > 0, exponent - bits, SMALLEST_EXPONENT).clamp(-500, 500)
    return torch.where(largest.isfinite(), exponent, 4 * NON_FINITE).to(torch.int32)
