"""Exact reversal of ``s <- z s + c`` a token at a time, on a fixed grid, whatever z in [0, 1] and c are made of.

Numbers are integers on one power-of-two grid, ``s = mantissa * 2**exponent``. A step computes

    D  = floor(z * s + 1/2)
    s' = D + round(c / grid)

and is undone by ``D = s' - round(c / grid)`` and a look at which integers z sends to D: those from ``least(D)`` to
``least(D + 1) - 1``. Which of them s was is all that the step forgot. Its number among them is pushed on a stack, in
as many bits as tell them apart: ``ceil(log2(count))``, none where D has one preimage (z = 1 always), all of s where z
is 0. Counts follow from D and z, so that nothing but these bits is kept. The arithmetic is
:mod:`rwkv_rev.reversal.step_arithmetic`'s. MacKay, Vicol, Ba and Grosse 2018, "Reversible Recurrent Neural Networks",
section 5, keep the same information in a buffer of integers that is multiplied and divided by rational z; their z has
10 bits and their buffer gives back 10 bits of noise, which no gradient agrees with to 1e-5.

A number's step takes 1.39 times ``log2(1/z)`` bits on average for z near 1 (rounding forgets more than z says), as
many at z = 1/2, some 1.2 times below (:func:`ideal_bits`). Where a row's steps in a chunk forget as much as it holds
(32 bits a number, or 64), the row is kept whole, and all rows where that takes no more: the remnant of a chunk is never
larger than the state.

Limits: the grid is fixed. A finite number beyond :attr:`Stepped.largest` ends the step with a
:class:`GridOverflowError`; inf and NaN stay NaN for good, and end in a NaN loss. Integers have, with their sign, 32
bits for float32, 51 (in int64) where range and precision matter more than what a state takes, and 62 for float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rwkv_rev.errors import RwkvRevError
from rwkv_rev.reversal.bit_stack import BitStack, pack
from rwkv_rev.reversal.fingerprint import fingerprint
from rwkv_rev.reversal.step_arithmetic import Arithmetic, Floats, Integers

_FLOATS, _INTEGERS = Floats(), Integers()


class GridOverflowError(RwkvRevError, OverflowError):
    """A state has left the grid that its integers can hold."""


@dataclass(frozen=True)
class Stepped:
    """``mantissa * 2**exponent``.

    Attributes:
        mantissa: [B, P, M] int32 or int64, P parts that are stepped one after another.
        exponent: of the grid, the same for all.
        dtype: of its values, float32 or float64.
    """

    mantissa: Tensor
    exponent: int
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, value: Tensor, *, magnitude: int, wide: bool | None = None) -> "Stepped":
        """The memory nearest to ``value`` [B, P, M].

        Args:
            magnitude: numbers below ``2**magnitude`` fit.
            wide: integers of 51 bits, not of 32; what is not said is so for float64.

        Raises:
            GridOverflowError: if a number does not fit.
        """
        wide = value.dtype == torch.float64 if wide is None else wide
        mantissa = torch.empty(0, dtype=torch.int64 if wide else torch.int32, device=value.device)
        empty = cls(mantissa, magnitude - cls(mantissa, 0, value.dtype).bits, value.dtype)
        units = empty.units(value)
        return empty.after([units[:, part] for part in range(value.shape[1])], units[None])

    @property
    def bits(self) -> int:
        """Of a magnitude: with 50 float64 computes its steps, with 61 int64."""
        return 31 if not self.wide else 61 if self.dtype == torch.float64 else 50

    @property
    def largest(self) -> int:
        """The largest magnitude of a mantissa; one less than fits, so that its neighbours do."""
        return (1 << self.bits) - 2

    @property
    def wide(self) -> bool:
        """Whether numbers have more than 32 bits."""
        return self.mantissa.dtype == torch.int64

    def units(self, value: Tensor) -> Tensor:
        """A contribution in units of the grid, rounded; float64 or int64, as :attr:`_arithmetic` computes."""
        return self._arithmetic.units(value.double() * 2.0**-self.exponent)

    def floats(self, units: Tensor) -> Tensor:
        """The value of units, rounded once."""
        return (self._arithmetic.floats(units) * 2.0**self.exponent).to(self.dtype)

    def step(self, units: Tensor, decay: Tensor | None, contribution: Tensor) -> Tensor:
        """s' from s, in units both; ``decay`` z None is 1."""
        kept = units if decay is None else self._arithmetic.decayed(units, decay.double())
        return self._arithmetic.sum(kept, self.units(contribution))

    def undo(
        self, units: Tensor, decay: Tensor | None, contribution: Tensor, bits: BitStack | None
    ) -> Tensor:
        """s from s', the same z and c bit for bit, and the stack of what was forgotten."""
        kept = self._arithmetic.difference(units, self.units(contribution))
        if decay is None:
            return kept
        assert bits is not None
        first, widths = self._arithmetic.preimages(kept, decay.double(), self.largest)
        return self._arithmetic.sum(first, bits.pop(widths))

    def parts(self) -> list[Tensor]:
        """The parts [B, M] in units, to be stepped."""
        arithmetic = self._arithmetic
        units = self.mantissa.to(arithmetic.dtype)
        return list(torch.where(self.mantissa == self._lost, arithmetic.lost, units).unbind(1))

    def after(self, parts: Sequence[Tensor], seen: Tensor) -> "Stepped":
        """The memory of ``parts`` [B, M] after a chunk, in which all the numbers of ``seen`` [steps, B, ...] were held.

        Raises:
            GridOverflowError: if one of them does not fit. Where a CUDA graph is recorded nobody can look: such rows
                are NaN from here on.
        """
        size = seen.abs()
        beyond = ((size > self.largest) & size.isfinite()).flatten(2).any(2).any(0)
        if not is_recorded(seen) and bool(beyond.any()):
            row = int(beyond.nonzero()[0])
            raise GridOverflowError(
                f"a number beyond {self.largest * 2.0**self.exponent:g} in row {row}; its integers hold "
                f"{self.bits} bits and a sign, in steps of 2**{self.exponent}"
            )
        return self.held([torch.where(beyond[:, None], self._arithmetic.lost, part) for part in parts])

    def held(self, parts: Sequence[Tensor]) -> "Stepped":
        """The memory of ``parts`` [B, M] in units; none that does not fit is looked for."""
        units = torch.stack(list(parts), dim=1)
        lost = ~(units.abs() <= self.largest)
        return self.like([torch.where(lost, self._lost, units).to(self.mantissa.dtype)])

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The memory as floats, rounded once."""
        return torch.stack([self.floats(part) for part in self.parts()], dim=1).to(dtype)

    def tensors(self) -> list[Tensor]:
        return [self.mantissa]

    def computed(self) -> list[Tensor]:
        return [self.mantissa]

    def like(self, tensors: list[Tensor]) -> "Stepped":
        return Stepped(tensors[0], self.exponent, self.dtype)

    of_computed = like

    def fingerprint(self) -> Tensor:
        """Checksum, int64 [1]."""
        return fingerprint(self.mantissa)[None]

    def coarse(self) -> None:
        return None

    when_coarse = ""

    def remnant(self, tensors: list[Tensor]) -> "KeptSteps":
        return KeptSteps.of(tensors)

    @property
    def _arithmetic(self) -> Arithmetic:
        return _INTEGERS if self.bits > 50 else _FLOATS

    @property
    def _lost(self) -> int:
        """The mantissa of inf and NaN: one that no number has."""
        return -(1 << self.bits)


def ideal_bits(decays: Tensor) -> Tensor:
    """``log2(1/z)`` of factors z, float64: what a step must forget; at most 32 bits, all that there are."""
    return (-decays.double().log2()).clamp(max=32.0)


def most_bits(limit: float) -> int:
    """Bits that a step of a number takes at most where z is ``2**-limit`` or more: of the integers that one may be."""
    return math.ceil(math.log2(math.floor(2.0**limit) + 1))


@dataclass(frozen=True)
class StepsRemnant:
    """What the steps of a chunk forgot.

    Attributes:
        before: the memory before the chunk (a reference, not a copy).
        states: s before each step that multiplies, units [B, M], in the order of the steps.
        decays: its z [B, M].
    """

    before: Stepped
    states: list[Tensor]
    decays: list[Tensor]

    @cached_property
    def forgotten(self) -> tuple[Tensor, Tensor]:
        """Of every step, [B, steps, M] int64: which preimage s was, and in how many bits."""
        units, decays = torch.stack(self.states, dim=1), torch.stack(self.decays, dim=1).double()
        arithmetic, largest = self.before._arithmetic, self.before.largest
        first, widths = arithmetic.preimages(arithmetic.decayed(units, decays), decays, largest)
        there = arithmetic.floats(units).isfinite()
        return torch.where(there, units - first, 0).to(torch.int64), torch.where(there, widths, 0)

    @cached_property
    def size(self) -> Tensor | None:
        """Bits that each row forgot, int32 [B]; None where no step multiplies."""
        return (
            self.forgotten[1].sum(dim=(1, 2)).clamp_(max=2**31 - 1).to(torch.int32) if self.states else None
        )

    excess = None
    """A mantissa takes the same whatever was forgotten of it."""

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        """What must be kept: :class:`KeptSteps`'s parts; the mantissa alone where ``size`` is not known."""
        mantissa = self.before.mantissa
        if not self.states:
            return []
        if size is None:
            return [mantissa]
        whole = size >= 8 * mantissa[0].nbytes
        bits = int(size[~whole].sum())
        words = 4 * -(-bits // 32)
        if size.nbytes + words + mantissa[0].nbytes * int(whole.sum()) > mantissa.nbytes:
            return [mantissa]
        rows = whole.nonzero()[:, 0].to(mantissa.device)
        others = (~whole).nonzero()[:, 0].to(mantissa.device)
        values, widths = (part.index_select(0, others).flatten() for part in self.forgotten)
        packed = pack(values, widths, bits, wide=self.before.wide)
        sizes = torch.where(whole, -1, size).to(torch.int32).to(mantissa.device)
        return [sizes, packed, mantissa.index_select(0, rows)]


@dataclass(frozen=True)
class KeptSteps:
    """The same from the tape.

    Attributes:
        whole: mantissas [rows, P, M] before the chunk of rows that were kept whole; None where nothing was forgotten.
        sizes: bits of each row, int32 [B]; -1 for a row that was kept whole. None where all were, without a look.
        words: what the others forgot, one row behind the other.
    """

    whole: Tensor | None = None
    sizes: Tensor | None = None
    words: Tensor | None = None

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "KeptSteps":
        """From what :meth:`StepsRemnant.tensors` kept."""
        return cls(tensors[-1], *tensors[:-1]) if tensors else cls()

    @property
    def all_whole(self) -> bool:
        """Whether no row has to be stepped back."""
        return self.whole is not None and (self.sizes is None or len(self.whole) == len(self.sizes))

    def bits(self, memory: Stepped) -> BitStack | None:
        """The stack that steps back pop from; None where nothing was forgotten."""
        if self.sizes is None or self.words is None:
            return None
        return BitStack.of(self.words, self.sizes.clamp(min=0), wide=memory.wide)

    def completed(self, rebuilt: Stepped | None, after: Stepped) -> Stepped:
        """The memory before the chunk, from the rows that were stepped back and those that were kept."""
        if rebuilt is None:
            assert self.whole is not None
            return after.like([self.whole])
        if self.sizes is None or self.whole is None or not len(self.whole):
            return rebuilt
        rows = (self.sizes < 0).nonzero()[:, 0]
        return after.like([rebuilt.mantissa.index_copy(0, rows, self.whole)])


def is_recorded(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, so that nobody may look at the tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
