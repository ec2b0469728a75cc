"""Exact reversal of ``S <- Lambda S + U`` in fixed point.

S is held as integers on a power-of-two grid, ``S = mantissa * 2**exponent``, one exponent per batch row and head,
only ever rising. A chunk of n valid tokens multiplies by ``Lambda = w**n`` and adds its contribution U:

    D   = round(Lambda * S)
    S'  = D + round(U / grid)
    rho = S - base(D),   base(D) = ceil((D - 1/2) / Lambda)      the remnant

and in reverse ``D = S' - round(U / grid)``, ``S = base(D) + rho``. Every quantity is a whole number that is held
exactly or an expression evaluated twice on the same bits, so S comes back exactly whatever the rounding of the
division. Mantissas have 31 bits, and 61 in models in float64: :mod:`rwkv_rev.reversal.decay_arithmetic`. ``base(D)`` is
the least integer that Lambda sends to D: rho counts from there and needs ``log2(1/Lambda)`` bits rounded up (at most
one more), the information the decay destroys (MacKay et al. 2018, "Reversible Recurrent Neural Networks", section 3,
account for it in the same way, with rational decays and a buffer). Where those are 32 bits the narrow mantissa itself
is the remnant.

The width of rho follows from Lambda alone, so packing needs no look at the data (no host synchronisation). Only a
*rise* of the grid does: those heads keep their mantissa whole. A state that has overflowed to inf or NaN stays
non-finite for good (:data:`NON_FINITE`): a diverged run ends in a NaN loss, never in plausible integers.

Limit: the grid never falls. A state is as precise as 2**-27 of the largest number its head has held since the start
of the context (2**-58 in float64), so after a spike of 10,000 times the usual size states have some 1e-4 relative error
until the end; :meth:`FixedPoint.coarse` finds heads that have come to this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.reversal.decay_arithmetic import (
    LARGEST,
    NON_FINITE,
    SMALLEST_EXPONENT,
    TARGET_BITS,
    Arithmetic,
    arithmetic_of,
    exponent_for,
    power,
    risen,
)
from rwkv_rev.reversal.fingerprint import head_fingerprints
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.reversal.packing import BitPacking
from rwkv_rev.wkv.dispatch import choose_kernel

COARSE_BITS = 18
"""Below it even a head's largest number is off by some 1e-6 of itself, and RWKV-6's gradients by ten times that."""
AT_ONCE = 2**24
"""Numbers of several states that are put on their grids at once: 128 MiB in float64."""
ROOM = 2.0**-0.125
"""Factor on a chunk's decay for which a kernel's layout has room: an eighth of a bit per element."""


@dataclass(frozen=True)
class FixedPoint:
    """A state on its grid.

    Attributes:
        mantissa: [B, H, N, N] int32, or int64 of a model in float64.
        exponent: [B, H] int32; the state's value is ``mantissa * 2**exponent``.
        floats: the value in float32, where the kernel that made the state gave it.
        prints: the fingerprint, likewise.
        found_coarse: :meth:`coarse`, likewise.
    """

    mantissa: Tensor
    exponent: Tensor
    floats: Tensor | None = None
    prints: Tensor | None = None
    found_coarse: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, *, wide: bool = False) -> "FixedPoint":
        """The grid state nearest to a float state [B, H, N, N]; ``wide``: of 61 bits, as a model in float64 has."""
        own = arithmetic_of(wide=wide)
        value = value.double()
        exponent = exponent_for(value.abs().amax(dim=(2, 3)), own.target_bits).clamp(max=NON_FINITE)
        return cls(own.units(value, exponent).to(own.dtype), exponent)

    @property
    def arithmetic(self) -> Arithmetic:
        """Of the mantissa's format."""
        return arithmetic_of(wide=self.mantissa.dtype == torch.int64)

    @classmethod
    def of_each(cls, values: Sequence[Tensor], *, wide: bool = False) -> list["FixedPoint"]:
        """:meth:`of` of several float states of one shape, and what is asked of them first, in few launches."""
        if len({(value.shape, value.dtype, value.device) for value in values}) > 1:
            return [cls.of(value, wide=wide) for value in values]
        found: list[FixedPoint] = []
        rows, several = len(values[0]), max(1, AT_ONCE // max(1, values[0].numel()))
        for start in range(0, len(values), several):
            whole = cls.of(torch.cat(list(values[start : start + several])), wide=wide)
            found += map(cls, *(tensor.split(rows) for tensor in whole.computed()))
        return found

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The state [B, H, N, N] as floats, rounded once."""
        if self.floats is not None and dtype == torch.float32:
            return self.floats
        return (self.mantissa.double() * power(self.exponent)).to(dtype)

    def advance(
        self, contribution: Tensor, count: Tensor | None, plan: "DecayPlan"
    ) -> tuple["FixedPoint", "MemoryRemnant"]:
        """One chunk forwards: S' and the remnant.

        Args:
            contribution: U [B, H, N, N], float32 or float64.
            count: [B] valid tokens per row, or None when no token of the chunk is masked.
            plan: for this chunk's length.
        """
        decay = plan.decay_of(count)
        if plan.uses_kernels(contribution):
            return self._advance_by_kernel(contribution, decay, plan)
        after, kept, raised = self.decayed(contribution, decay)
        packing = plan.packing  # made now: where a CUDA graph is recorded, nothing may come from the host

        def pack() -> Tensor:
            return packing.pack(self.forgotten(kept, decay).flatten(1, 2), self.mantissa.flatten(1, 2))

        return after, MemoryRemnant(pack, raised, self)

    def decayed(self, contribution: Tensor, decay: Tensor) -> tuple["FixedPoint", Tensor, Tensor]:
        """S' by ``decay`` [B or 1, H, N, 1] float64, the mantissa D, and the heads [B, H] that rose."""
        found = self.arithmetic.decayed(self.mantissa, self.exponent, contribution, decay)
        return FixedPoint(found.mantissa, found.exponent), found.kept, found.raised

    def units(self, contribution: Tensor) -> Tensor:
        """A contribution [B, H, N, N] in units of the grid, float64, not rounded."""
        return contribution.double() * power(-self.exponent)

    def nearest(self, units: Tensor) -> "FixedPoint":
        """The state of 31 bits nearest to ``units`` of this grid [B, H, N, N], float64; it rises where it must."""
        _, exponent = risen(units.abs().amax(dim=(2, 3)), self.exponent, LARGEST, TARGET_BITS)
        mantissa = (units * power(self.exponent - exponent)).round_().to(torch.int32)
        return FixedPoint(mantissa, exponent)

    def forgotten(self, kept: Tensor, decay: Tensor) -> Tensor:
        """rho = S - base(D), of the mantissa's format, where no grid rose; ``kept`` is D."""
        return self.arithmetic.base(kept, decay).neg_().add_(self.mantissa).to(self.mantissa.dtype)

    def undecayed(self, contribution: Tensor, decay: Tensor, rho: Tensor, whole: Tensor) -> Tensor:
        """The mantissa before a chunk that left this state; rows in ``whole`` hold it in place of rho."""
        decayed = self.arithmetic.units(contribution, self.exponent).neg_().add_(self.mantissa)
        found = self.arithmetic.base(decayed, decay).add_(rho).to(rho.dtype)
        return torch.where(whole, rho, found)

    def retreat(
        self, contribution: Tensor, count: Tensor | None, remnant: "MemoryRemnant", plan: "DecayPlan"
    ) -> "FixedPoint":
        """One chunk backwards: S from S' (this state), the same U bit for bit, and the remnant."""
        decay = plan.decay_of(count)
        if plan.uses_kernels(contribution):
            return self._retreat_by_kernel(contribution, decay, remnant, plan)
        rho = plan.packing.unpack(remnant.packed, self.mantissa.flatten(1, 2).shape).view_as(self.mantissa)
        mantissa = self.undecayed(contribution, decay, rho, plan.packing.whole.view_as(plan.decay))
        return remnant.kept_heads(FixedPoint(mantissa, self.exponent))

    when_coarse = (
        "has been hundreds of times larger earlier in this context, and its grid stays as coarse as that needed: "
        "gradients through it may be off by more than 1e-5. bptt='checkpoint' has the same grid; 'full' has none"
    )

    def coarse(self) -> Tensor:
        """Heads [B, H] bool whose largest number has fewer than :data:`COARSE_BITS` bits on the grid that they got."""
        if self.found_coarse is not None:
            return self.found_coarse
        largest = self.mantissa.abs().amax(dim=(2, 3))
        finite = self.exponent < NON_FINITE
        return (largest < 2**COARSE_BITS) & (self.exponent > SMALLEST_EXPONENT) & finite

    def tensors(self) -> list[Tensor]:
        return [self.mantissa, self.exponent]

    def computed(self) -> list[Tensor]:
        return [self.mantissa, self.exponent, self.value(), self.fingerprint()]

    def like(self, tensors: list[Tensor]) -> "FixedPoint":
        return FixedPoint(*tensors)

    of_computed = like  # by itself it is a cell's exact state, too

    def remnant(self, tensors: list[Tensor]) -> "MemoryRemnant":
        """What :meth:`MemoryRemnant.tensors` kept, of the chunk before this state."""
        return MemoryRemnant.restore(tensors, self)

    def fingerprint(self) -> Tensor:
        """Checksum of the state's bits, int64 [B, H]."""
        if self.prints is not None:
            return self.prints
        return head_fingerprints(self.mantissa, self.exponent)

    def _advance_by_kernel(
        self, contribution: Tensor, decay: Tensor, plan: "DecayPlan"
    ) -> tuple["FixedPoint", "MemoryRemnant"]:
        from rwkv_rev.reversal import triton_fixed_point as kernel

        found = kernel.advance(
            self.mantissa,
            self.exponent,
            contribution,
            decay,
            plan.planes,
            target_bits=TARGET_BITS,
            non_finite=NON_FINITE,
            coarse_bits=COARSE_BITS,
            smallest_exponent=SMALLEST_EXPONENT,
        )
        after = FixedPoint(found.mantissa, found.exponent, found.floats, found.fingerprint, found.coarse)
        return after, MemoryRemnant(lambda: found.packed, found.raised, self)

    def _retreat_by_kernel(
        self, contribution: Tensor, decay: Tensor, remnant: "MemoryRemnant", plan: "DecayPlan"
    ) -> "FixedPoint":
        from rwkv_rev.reversal import triton_fixed_point as kernel

        planes = plan.planes
        before = kernel.retreat(self.mantissa, self.exponent, contribution, decay, planes, remnant.packed)
        return remnant.kept_heads(
            FixedPoint(before.mantissa, self.exponent, before.floats, before.fingerprint)
        )


@dataclass(frozen=True)
class MemoryRemnant:
    """What a chunk's decay destroyed of a :class:`FixedPoint`.

    Attributes:
        pack: makes :attr:`packed`; not called by strategies that keep the state itself.
        raised: [B, H] bool, heads whose grid rose.
        before: the state before the chunk (a reference, not a copy), needed for the raised heads only: None says
            that no grid rose.
    """

    pack: Callable[[], Tensor]
    raised: Tensor
    before: FixedPoint | None

    @cached_property
    def packed(self) -> Tensor:
        """The rho of every row at its own width (:class:`BitPacking`), uint8."""
        return self.pack()

    @property
    def size(self) -> Tensor:
        """The one thing that what must be kept depends on."""
        return self.raised

    @property
    def excess(self) -> Tensor:
        return self.raised

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        """What must be kept; ``size`` is ``self.raised`` on the CPU, None where no grid rose."""
        heads = torch.empty(0, device="cpu") if size is None else size.flatten().nonzero()[:, 0]
        if self.before is None or heads.numel() == 0:
            return [self.packed]
        heads = heads.to(self.packed.device)
        mantissa = self.before.mantissa.flatten(0, 1).index_select(0, heads)
        return [self.packed, heads, mantissa, self.before.exponent.flatten().index_select(0, heads)]

    def kept_heads(self, rebuilt: FixedPoint) -> FixedPoint:
        """``rebuilt``, with the heads whose grid rose as they were kept."""
        if self.before is None:
            return rebuilt
        return FixedPoint(
            torch.where(self.raised[:, :, None, None], self.before.mantissa, rebuilt.mantissa),
            torch.where(self.raised, self.before.exponent, rebuilt.exponent),
        )

    @classmethod
    def restore(cls, tensors: list[Tensor], after: FixedPoint) -> "MemoryRemnant":
        """The remnant from what :meth:`tensors` kept; ``after`` is the state after the chunk."""
        raised = torch.zeros_like(after.exponent, dtype=torch.bool)
        if len(tensors) == 1:
            return cls(lambda: tensors[0], raised, None)
        packed, heads, kept, exponents = tensors
        mantissa = after.mantissa.flatten(0, 1).index_copy(0, heads, kept).view_as(after.mantissa)
        exponent = after.exponent.flatten().index_copy(0, heads, exponents).view_as(after.exponent)
        raised = raised.flatten().index_fill(0, heads, True).view_as(raised)
        return cls(lambda: packed, raised, FixedPoint(mantissa, exponent))


@dataclass(frozen=True)
class DecayPlan:
    """What the exact update needs of the decays for chunks of a given length, computed once per sweep.

    Attributes:
        log_decay: [H, N] float64.
        decay: [1, H, N, 1] float64, Lambda for a chunk without masked tokens.
        widths: gives the bits of each remnant, [H * N] int64, on the host. A function, so that the copy from a
            device goes on while the plans of other layers are made.
        kernels: whether updates run in :mod:`rwkv_rev.reversal.triton_fixed_point`. Their layout has room for decays
            that are a little faster, so that it serves for many steps of a training.
        needed: the widths without that room, likewise; None where they are the same.
        dtype: of the mantissas.
    """

    log_decay: Tensor
    decay: Tensor
    widths: Callable[[], Tensor]
    kernels: bool = False
    needed: Callable[[], Tensor] | None = None
    dtype: torch.dtype = torch.int32

    @cached_property
    def packing(self) -> BitPacking:
        """Layout of the remnants, [H * N] rows."""
        return BitPacking(self.widths().tolist(), self.log_decay.device, self.dtype)

    @cached_property
    def planes(self) -> Any:
        """The same for the CUDA kernels."""
        from rwkv_rev.reversal.triton_fixed_point import PlaneLayout

        return PlaneLayout.of(self.widths(), self.log_decay.shape[1], self.log_decay.device)

    def tensors(self) -> list[Tensor]:
        """All that it is made of, on the device."""
        return [self.log_decay, self.decay]

    def prepare(self) -> None:
        """Make the layout now, on the host: where launches are recorded, its first use is too late."""
        _ = self.planes if self.kernels else self.packing

    def holds(self, other: "DecayPlan") -> bool:
        """Whether the remnants of other decays fit into this layout; looks at the host alone."""
        needed = other.widths() if other.needed is None else other.needed()
        return self.kernels and bool((needed <= self.widths()).all())

    def uses_kernels(self, contribution: Tensor) -> bool:
        """Whether an update by ``contribution`` runs in :mod:`rwkv_rev.reversal.triton_fixed_point`."""
        return self.kernels and contribution.dtype == torch.float32

    def decay_of(self, count: Tensor | None) -> Tensor:
        """Lambda for rows of ``count`` [B] valid tokens, [B, H, N, 1]; [1, H, N, 1] for None, all valid."""
        if count is None:
            return self.decay
        return torch.exp(count.double()[:, None, None, None] * self.log_decay[None, :, :, None])


def decay_plan(log_decay: Tensor, length: int, *, wide: bool = False) -> DecayPlan:
    """Plan for chunks of up to ``length`` tokens; ``log_decay`` [H, N] is log w, natural; ``wide`` as of the state."""
    return decay_plans(log_decay[None], length, wide=wide)[0]


def decay_plans(log_decay: Tensor, length: int, *, wide: bool = False) -> list[DecayPlan]:
    """:func:`decay_plan` of each layer in ``log_decay`` [L, H, N]."""
    log_decay = log_decay.detach().double()
    decay = torch.exp(length * log_decay)
    own = arithmetic_of(wide=wide)
    fused = choose_kernel(None, torch.empty(0, device=log_decay.device)) == "triton"
    kernels = fused and log_decay.shape[2] % 8 == 0 and not wide
    room = torch.where(decay == 1, decay, decay * ROOM) if kernels else decay
    bits = start_copy(own.bits(torch.stack([decay, room]) if kernels else decay[None]).flatten(2))

    def plan(layer: int) -> DecayPlan:
        needed = (lambda: bits()[0, layer]) if kernels else None
        widths = lambda: bits()[-1, layer]  # noqa: E731
        factor = decay[layer, None, :, :, None]
        return DecayPlan(log_decay[layer], factor, widths, kernels, needed, own.dtype)

    return [plan(layer) for layer in range(len(decay))]
