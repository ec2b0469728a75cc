"""Exact reversal of ``S <- P S + U`` for any square P, by integer lifting: RWKV-7's transition, singular or not.

S is on a :class:`~rwkv_rev.reversal.fixed_point.FixedPoint`'s grid. With ``P[rows][:, columns] = (1 + L) diag(d)
(1 + R)`` of :mod:`rwkv_rev.reversal.pivoting`, every column x of S's integers, taken in the order ``columns``, goes

    t = x + round(R x)                       back from the last number to the first, each needs only those behind it
    D = round(d t),    rho = t - base(D)     what d destroys, log2(1/|d|) bits: as in fixed point, number by number
    o = D + round(L D)                       back from the first number to the last
    S'[rows] = o + round(U / grid)

Rounded shears are inverted by subtraction whatever their entries (the lifting scheme: Bruekers and van den Enden 1992;
Hao and Shi 2001 factor a matrix into such steps), so that all that is lost is lost in D. Derivation: docs/lifting.md.

**The same bits in any order of summation.** L and R are used as ``(high + low / 2**q) / 2**q`` with whole high and low,
q so small that every sum of N products of theirs with 31 bits is a whole number below 2**53: float64 adds them
exactly. What that rounds off the factors is below 2**-32 for N = 64. So models in float64 have 31 bits here, too.

**Bits.** The count of the t that give D is ``floor((D + 1/2) / d) - ceil((D - 1/2) / d) + 1``; rho has the bits that
tell so many apart (none for most where |d| is near 1, none at all for |d| > 1), and as D is known before rho on the way
back, no width is kept. Where these are not fewer than those of the head's largest t, t itself is kept. A head whose
remnant would be no smaller than its state keeps that, in as many bits as its largest number has. So do one whose grid
rises, one whose t or D leave 31 bits, and one that is not finite.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rev.reversal.bit_stack import BitStack, pack, widths_of
from rwkv_rev.reversal.fixed_point import FixedPoint
from rwkv_rev.reversal.on_grid import OnGrid
from rwkv_rev.reversal.pivoting import Factors, factor
from rwkv_rev.reversal.stepped import is_recorded
from rwkv_rev.wkv.dispatch import is_fused

LARGEST = 2.0**31 - 2
"""Largest magnitude of t and D, so that they have 32 bits with their sign."""
SLACK = 2.0**-18
"""Bound on the float64 error of ``d t`` and of the division, with room to spare: 3 * 2**31 * 2**-53 = 0.75 * 2**-20."""
MOST_COUNT = 2.0**40
_EXACT_BITS = 53 - 31
LIFTED = 128
"""Added to the bits of a head's largest number where it was lifted."""


class Transition(NamedTuple):
    """What one chunk does to the state: ``matrix`` P and ``update`` U, [B, H, N, N], float32 or float64."""

    matrix: Tensor
    update: Tensor


@dataclass(frozen=True)
class Lifted(OnGrid):
    """A memory on a :class:`FixedPoint`'s grid, [B, H, N, N], that another matrix is multiplied to in each chunk."""

    def advance(self, transition: Transition, plan: "LiftingPlan") -> tuple["Lifted", "LiftedRemnant"]:
        """One chunk forwards."""
        if is_fused(self.grid.mantissa):
            return self._advance_by_kernel(transition, plan)
        lift = Lift.of(transition.matrix)
        before = self.grid.mantissa.double()
        unit = self.grid.units(transition.update)
        found = lift.forwards(before)
        after = found.lifted + unit.round()
        fits = torch.stack([found.turned, found.scaled, after]).abs().amax(dim=(0, 3, 4)) <= LARGEST
        own_before, own_turned = _own_bits(before), _own_bits(torch.where(_each(fits), found.turned, 0.0))
        widths = lift.widths(found.scaled, own_turned)
        lifts = fits & (widths.sum(dim=(2, 3)) < before.shape[-1] ** 2 * own_before)
        whole = self.grid.nearest(transition.matrix.double() @ before + unit)
        mantissa = torch.where(_each(lifts), after.to(torch.int32), whole.mantissa)
        exponent = torch.where(lifts, self.grid.exponent, whole.exponent)
        own = torch.where(lifts, own_turned, own_before)
        widths = torch.where(_each(lifts), widths, own_before[..., None, None])
        values = torch.where(_each(lifts), lift.kept(found, widths, own), before + _middle(own))
        remnant = LiftedRemnant(
            values, widths, own + LIFTED * lifts, self.grid.exponent, transition.matrix, plan
        )
        return Lifted(FixedPoint(mantissa, exponent)), remnant

    def retreat(self, transition: Transition, remnant: "KeptLifted") -> "Lifted":
        """One chunk backwards, from the same transition bit for bit."""
        if is_fused(self.grid.mantissa):
            return self._retreat_by_kernel(transition, remnant)
        lifts = remnant.code >= LIFTED
        own = (remnant.code % LIFTED).to(torch.int64)
        # nothing is to be had from those of whole heads, which need not be finite
        matrix = torch.where(_each(lifts), transition.matrix, 0.0)
        lift = Lift.of(matrix)
        after = self.grid.mantissa.double() - self.grid.units(transition.update).round()
        scaled = lift.to_scaled(torch.where(_each(lifts), after, 0.0))
        widths = torch.where(_each(lifts), lift.widths(scaled, own), own[..., None, None])
        stack = BitStack.of(remnant.words, widths.sum()[None], wide=False)
        values = stack.pop(widths.view(1, -1)).view_as(widths).double()
        turned = lift.turned(scaled, values, widths, own)
        before = torch.where(_each(lifts), lift.to_before(turned), values - _middle(own))
        found = FixedPoint(before.to(torch.int32), remnant.exponent)
        # a head that was kept whole vouches for the state after it, too: where that is another, so is what comes back
        again = found.nearest(transition.matrix.double() @ before + found.units(transition.update))
        same = (again.mantissa == self.grid.mantissa).all(3).all(2) & (again.exponent == self.grid.exponent)
        mantissa = torch.where(_each(lifts | same), found.mantissa, found.mantissa.bitwise_not())
        return Lifted(FixedPoint(mantissa, remnant.exponent))

    def _advance_by_kernel(
        self, transition: Transition, plan: "LiftingPlan"
    ) -> tuple["Lifted", "LiftedRemnant"]:
        from rwkv_rev.reversal import triton_lifting as kernel

        exponent = self.grid.exponent
        found = kernel.advance(self.grid.mantissa, exponent, *transition, exact_bits(transition.matrix))
        remnant = LiftedRemnant(found.values, found.widths, found.code, exponent, transition.matrix, plan)
        return Lifted(FixedPoint(found.mantissa, found.exponent)), remnant

    def _retreat_by_kernel(self, transition: Transition, remnant: "KeptLifted") -> "Lifted":
        from rwkv_rev.reversal import triton_lifting as kernel

        bits = exact_bits(transition.matrix)
        mantissa = kernel.retreat(self.grid.mantissa, self.grid.exponent, *transition, *remnant, bits)
        return Lifted(FixedPoint(mantissa, remnant.exponent))

    def remnant(self, tensors: list[Tensor]) -> "KeptLifted":
        """What :meth:`LiftedRemnant.tensors` kept."""
        return KeptLifted(*tensors)


class Through(NamedTuple):
    """The stations of a state [B, H, N, N] on its way through the factors: t, D, and o with its rows in order."""

    turned: Tensor
    scaled: Tensor
    lifted: Tensor


@dataclass(frozen=True)
class Lift:
    """The lifting steps of transitions P [B, H, N, N].

    Attributes:
        rows, columns: [B, H, N, N] int64, the number of each row, repeated.
        lower, upper: L and R. scale: |d| [B, H, N, 1], and its sign.
    """

    rows: Tensor
    columns: Tensor
    lower: "Shear"
    upper: "Shear"
    scale: Tensor
    sign: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Lift":
        found: Factors = factor(matrix.double().flatten(0, 1))
        shape = matrix.shape
        diagonal = found.diagonal.view(*shape[:3], 1)
        return cls(
            found.rows.view(*shape[:3], 1).expand(shape),
            found.columns.view(*shape[:3], 1).expand(shape),
            Shear.of(found.lower.view(shape)),
            Shear.of(found.upper.view(shape)),
            diagonal.abs(),
            torch.where(diagonal < 0, -1.0, 1.0).to(torch.float64),
        )

    def forwards(self, before: Tensor) -> Through:
        turned = self.upper.add(before.gather(2, self.columns))
        scaled = (self.scale * turned).round_()
        out = self.lower.add(self.sign * scaled)
        return Through(turned, scaled, torch.empty_like(out).scatter_(2, self.rows, out))

    def to_scaled(self, lifted: Tensor) -> Tensor:
        """|d|'s D from what came of it; its sign has been taken out."""
        return self.sign * self.lower.subtract(lifted.gather(2, self.rows))

    def to_before(self, turned: Tensor) -> Tensor:
        found = self.upper.subtract(turned)
        return torch.empty_like(found).scatter_(2, self.columns, found)

    def base(self, scaled: Tensor) -> Tensor:
        """The least t that gives D."""
        return ((scaled - 0.5) / self.scale).sub_(SLACK).ceil_()

    def widths(self, scaled: Tensor, own: Tensor) -> Tensor:
        """Bits of each number's remnant, int64; ``own`` [B, H] where t itself is kept."""
        last = ((scaled + 0.5) / self.scale).add_(SLACK).floor_()
        counts = (last - self.base(scaled)).add_(1).clamp_(1, MOST_COUNT)
        return torch.minimum(widths_of(counts), own[..., None, None])

    def kept(self, found: Through, widths: Tensor, own: Tensor) -> Tensor:
        """rho, or t counted from the least number of its bits; float64."""
        whole = widths >= own[..., None, None]
        return torch.where(whole, found.turned + _middle(own), found.turned - self.base(found.scaled))

    def turned(self, scaled: Tensor, values: Tensor, widths: Tensor, own: Tensor) -> Tensor:
        """t again."""
        whole = widths >= own[..., None, None]
        return torch.where(whole, values - _middle(own), self.base(scaled) + values)


class Shear(NamedTuple):
    """A strictly triangular matrix [B, H, N, N] as ``(high + low / 2**bits) / 2**bits``, both whole."""

    high: Tensor
    low: Tensor
    bits: int

    @classmethod
    def of(cls, triangle: Tensor) -> "Shear":
        bits = exact_bits(triangle)
        scaled = triangle * 2.0**bits
        high = scaled.round()
        return cls(high, (scaled - high).mul_(2.0**bits).round_(), bits)

    def add(self, x: Tensor) -> Tensor:
        """``x + round(A x)`` for whole x."""
        return x + self._product(x)

    def subtract(self, y: Tensor) -> Tensor:
        """The x of ``y = x + round(A x)``.

        Each repetition of ``x = y - round(A x)`` makes one number more right, whatever the others are; most become so
        at once. N are enough.
        """
        found = y
        for _ in range(y.shape[-2]):
            again = y - self._product(found)
            if not is_recorded(y) and torch.equal(again, found):
                break
            found = again
        return found

    def _product(self, x: Tensor) -> Tensor:
        high, low = self.high @ x, self.low @ x  # whole numbers, exact
        return low.mul_(2.0**-self.bits).add_(high).mul_(2.0**-self.bits).round_()


@dataclass
class LiftingPlan:
    """How much room the remnant of a chunk has where it cannot wait for the host to say it (a recording of launches).

    Attributes:
        needed: bits of the largest remnant so far; 0 where none is known.
        given: bits of the room that a recording has; 0 where none does.
    """

    needed: int = 0
    given: int = 0

    def room(self, numbers: int) -> int:
        """Bits for a state of so many numbers: an eighth more than has been needed, at most all that it has."""
        most = 32 * numbers
        return min(most, (self.needed + self.needed // 8 | 31) + 1) if self.needed else most

    def tensors(self) -> list[Tensor]:
        return []

    def prepare(self) -> None:
        return None

    def holds(self, other: "LiftingPlan") -> bool:
        """Whether recordings made by this plan have had room; what was needed, the other one knows from now on."""
        other.needed = max(other.needed, self.needed)
        return self.needed <= self.given or not self.given


@dataclass(frozen=True)
class LiftedRemnant:
    """What a chunk destroyed.

    Attributes:
        values, widths: [B, H, N, N], what is kept of each number, float64, and its bits, int64.
        code: [B, H] int64, bits of the head's largest number, and whether it was lifted.
        exponent: of the grid before the chunk. matrix: P.
    """

    values: Tensor
    widths: Tensor
    code: Tensor
    exponent: Tensor
    matrix: Tensor
    plan: LiftingPlan

    @property
    def size(self) -> Tensor:
        """int32 [1]: all bits."""
        return self.widths.sum().to(torch.int32)[None]

    @property
    def excess(self) -> Tensor:
        return self.size > self.plan.room(self.widths.numel())

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        """What must be kept: :class:`KeptLifted`'s parts; in the room that there is where ``size`` is not known."""
        if size is None:
            total = self.plan.given = self.plan.room(self.widths.numel())
        else:
            total = int(size)
            self.plan.needed = max(self.plan.needed, total)
        words = pack(self.values.to(torch.int64).flatten(), self.widths.flatten(), total, wide=False)
        return [words, self.code.to(torch.uint8), self.exponent]


class KeptLifted(NamedTuple):
    """The same from the tape: numbers one behind the other, the code as uint8, and the exponent before the chunk."""

    words: Tensor
    code: Tensor
    exponent: Tensor


def exact_bits(matrix: Tensor) -> int:
    """Bits that each of the two parts of an [..., N, N] factor has for its sums to be exact."""
    return _EXACT_BITS - math.ceil(math.log2(matrix.shape[-1]))


def _own_bits(x: Tensor) -> Tensor:
    """[B, H] int64, bits of the largest of whole numbers [B, H, N, N], with a sign; at least 1."""
    return (widths_of(x.abs().amax(dim=(2, 3)) + 1) + 1).clamp_(max=32)


def _middle(own: Tensor) -> Tensor:
    """What is added to numbers of so many bits [B, H] with their signs, so that they are none below zero."""
    return (torch.ones_like(own) << (own - 1)).double()[..., None, None]


def _each(heads: Tensor) -> Tensor:
    """[B, H] beside [B, H, N, N]."""
    return heads[..., None, None]
