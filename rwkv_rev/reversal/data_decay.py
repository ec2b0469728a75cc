"""Exact reversal of ``S <- Lambda S + U`` where Lambda depends on the data: a factor per batch row, head and channel.

The arithmetic is that of :mod:`rwkv_rev.reversal.fixed_point`. What differs is the remnant: its widths are known only
when the chunk has been computed, so they are a part of it (a byte per row), and the record is packed a chunk later,
when the host has them. Where nothing may wait for the host (a recording of launches), the mantissa itself is the
remnant: no data take more.

Masked tokens are factors of 1 that their cell has multiplied into Lambda.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rev.reversal.fixed_point import FixedPoint
from rwkv_rev.reversal.on_grid import OnGrid
from rwkv_rev.reversal.packing import BitPacking


class ChunkDecay(NamedTuple):
    """The factor of one chunk, in the place of a plan: Lambda [B, H, N, 1] float64, of its valid tokens."""

    factor: Tensor

    def decay_of(self, count: Tensor | None) -> Tensor:
        """Lambda."""
        return self.factor


@dataclass(frozen=True)
class DataDecayed(OnGrid):
    """A memory on a :class:`FixedPoint`'s grid whose factor is another one in each chunk."""

    def advance(
        self, contribution: Tensor, count: None, plan: ChunkDecay
    ) -> tuple["DataDecayed", "DataRemnant"]:
        """One chunk forwards."""
        after, remnant = advance(self.grid, contribution, plan.factor[..., 0])
        return DataDecayed(after), remnant

    def retreat(
        self, contribution: Tensor, count: None, remnant: "KeptRemnant", plan: ChunkDecay
    ) -> "DataDecayed":
        """One chunk backwards, from the same contribution and factor bit for bit."""
        return DataDecayed(retreat(self.grid, contribution, plan.factor[..., 0], remnant))

    def remnant(self, tensors: list[Tensor]) -> "KeptRemnant":
        """What :meth:`DataRemnant.tensors` kept."""
        return KeptRemnant.of(tensors)


def advance(memory: FixedPoint, contribution: Tensor, decay: Tensor) -> tuple[FixedPoint, "DataRemnant"]:
    """One chunk forwards: S' and the remnant.

    Args:
        memory: S, [B, H, N, M].
        contribution: U [B, H, N, M], float32 or float64.
        decay: Lambda [B, H, N] float64, of the whole chunk, from 0 to 1.
    """
    factor = decay[..., None]
    after, kept, raised = memory.decayed(contribution, factor)
    return after, DataRemnant(memory.arithmetic.bits(decay), raised, memory, kept, factor)


def retreat(memory: FixedPoint, contribution: Tensor, decay: Tensor, remnant: "KeptRemnant") -> FixedPoint:
    """One chunk backwards: S from S' (``memory``), the same U and Lambda bit for bit, and the remnant."""
    rows, columns = decay.numel(), memory.mantissa.shape[-1]
    if remnant.widths is None:
        mantissa = remnant.packed.view_as(memory.mantissa)
    else:
        packing = BitPacking(remnant.widths.tolist(), memory.mantissa.device, memory.mantissa.dtype)
        rho = packing.unpack(remnant.packed, torch.Size((1, rows, columns))).view_as(memory.mantissa)
        whole = packing.whole.view(decay.shape)[..., None]
        mantissa = memory.undecayed(contribution, decay[..., None], rho, whole)
    if remnant.raised is None:
        return FixedPoint(mantissa, memory.exponent)
    heads, mantissas, exponents = remnant.raised
    exponent = memory.exponent.flatten().index_copy(0, heads, exponents).view_as(memory.exponent)
    kept = mantissa.flatten(0, 1).index_copy(0, heads, mantissas).view_as(mantissa)
    return FixedPoint(kept, exponent)


@dataclass(frozen=True)
class DataRemnant:
    """What a chunk's decay destroyed.

    Attributes:
        widths: [B, H, N] int64, bits of each row's remnant.
        raised: [B, H] bool, heads whose grid rose.
        before: the state before the chunk (a reference, not a copy).
        kept: D, a mantissa. decay: Lambda [B, H, N, 1].
    """

    widths: Tensor
    raised: Tensor
    before: FixedPoint
    kept: Tensor
    decay: Tensor

    @property
    def size(self) -> Tensor:
        """int32: the widths, then which heads rose."""
        return torch.cat([self.widths.flatten(), self.raised.flatten()]).to(torch.int32)

    excess = None
    """A mantissa takes the same whatever was forgotten of it."""

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        """What must be kept: :class:`KeptRemnant`'s parts; the mantissa alone where ``size`` is not known."""
        mantissa = self.before.mantissa
        if size is None:
            return [mantissa, self.before.exponent]
        widths, raised = size[: self.widths.numel()], size[self.widths.numel() :]
        rows = (1, self.widths.numel(), mantissa.shape[-1])
        rho = self.before.forgotten(self.kept, self.decay)
        packing = BitPacking(widths.tolist(), mantissa.device, mantissa.dtype)
        found = [packing.pack(rho.view(rows), mantissa.view(rows)), self.widths.flatten().to(torch.uint8)]
        heads = raised.nonzero()[:, 0].to(mantissa.device)
        if len(heads):
            found += [heads, mantissa.flatten(0, 1)[heads], self.before.exponent.flatten()[heads]]
        return found


@dataclass(frozen=True)
class KeptRemnant:
    """The same from the tape.

    Attributes:
        packed: rho of every row at its own width, uint8; or the mantissa before the chunk, whole.
        widths: [B H N] uint8; None where the mantissa was kept.
        raised: heads whose grid rose, their mantissas and exponents before; or all exponents; None where none rose.
    """

    packed: Tensor
    widths: Tensor | None
    raised: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "KeptRemnant":
        """From what :meth:`DataRemnant.tensors` kept."""
        first, second, *raised = tensors
        if first.dtype != torch.uint8:
            everyone = torch.arange(second.numel(), device=second.device)
            return cls(first, None, (everyone, first.flatten(0, 1), second.flatten()))
        return cls(first, second, (raised[0], raised[1], raised[2]) if raised else None)
