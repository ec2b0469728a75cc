"""The exact update and its reversal on a CUDA device: one Triton launch each instead of some seventy small ones.

The same formulas as :mod:`rwkv_rev.reversal.fixed_point`, one program per batch row and head. Remnants are packed by
bit planes: a row of width b stores b planes of N bits, so every width costs exactly its bits, as in
:class:`~rwkv_rev.reversal.packing.BitPacking` (the order of the bits differs; a tape is read by the device that
wrote it). The programs also give what each sweep needs next: the state as float32, and its fingerprint per head.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(2147483646.0)
_SLACK = tl.constexpr(2.0**-19)
_ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: adding and subtracting it rounds half to even
_MULTIPLIER = tl.constexpr(-7046029254386353131)


@triton.jit
def _power(exponent):
    """2**exponent, float64, exact."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _round(x):
    return (x + _ROUND) - _ROUND


@triton.jit
def _base(decayed, decay):
    return tl.where(decay == 1.0, decayed, tl.ceil((decayed - 0.5) / decay - _SLACK))


@triton.jit
def _fingerprint(mantissa, exponent, place):
    words = mantissa.to(tl.int64) * (place.to(tl.int64) * 2 * _MULTIPLIER + 1)
    return tl.sum(tl.sum(words, 1), 0) * 3 + exponent.to(tl.int64)


@triton.jit
def _advance(
    mantissa, exponent, contribution, decay, decay_stride, widths, offsets, row_bytes,
    target_bits, non_finite, coarse_below, smallest_exponent,
    after, new_exponent, raised, coarse, packed, floats, prints,
    H, N: tl.constexpr, planes, BN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, head = program // H, program % H
    i = tl.arange(0, BN)
    inside = (i[:, None] < N) & (i[None, :] < N)
    place = i[:, None] * N + i[None, :]
    at = program.to(tl.int64) * N * N + place
    m = tl.load(mantissa + at, mask=inside, other=0)
    e = tl.load(exponent + program)
    w = tl.load(decay + row * decay_stride + head * N + i, mask=i < N, other=1.0)[:, None]
    u = tl.load(contribution + at, mask=inside, other=0.0).to(tl.float64) * _power(-e)
    d = w * m.to(tl.float64)
    total = tl.abs(d + u)
    nan = tl.max(tl.max((total != total).to(tl.int32), 1), 0) > 0  # tl.max passes over NaN
    largest = tl.max(tl.max(tl.where(total == total, total, 0.0), 1), 0)
    rises = (largest > _LARGEST) | nan
    bits = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    rise = (bits - 1022).to(tl.int32) - target_bits
    e2 = tl.where(rises, tl.where(nan | (bits == 0x7FF), non_finite, tl.minimum(e + rise, non_finite)), e)
    shrink = _power(e - e2)
    d = _round(d * shrink)
    s = d + _round(u * shrink)
    tl.store(after + at, s.to(tl.int32), mask=inside)
    tl.store(new_exponent + program, e2)
    tl.store(raised + program, rises.to(tl.int8))
    few = tl.max(tl.max(tl.where(inside, tl.abs(s), 0.0), 1), 0) < coarse_below
    tl.store(coarse + program, (few & (e2 > smallest_exponent) & (e2 < non_finite)).to(tl.int8))
    tl.store(floats + at, (s * _power(e2)).to(tl.float32), mask=inside)
    tl.store(prints + program, _fingerprint(tl.where(inside, s.to(tl.int32), 0), e2, place))
    width = tl.load(widths + head * N + i, mask=i < N, other=0)
    offset = tl.load(offsets + head * N + i, mask=i < N, other=0)
    rho = m.to(tl.float64) - _base(d, w)
    value = tl.where(width[:, None] == 32, m, rho.to(tl.int32))
    byte = tl.arange(0, BN // 8)
    lane = tl.arange(0, 8)
    target = packed + row.to(tl.int64) * row_bytes + offset[:, None] + byte[None, :]
    exists = byte[None, :] < N // 8
    for plane in tl.static_range(32):
        if plane < planes:
            bit = tl.reshape((value >> plane) & 1, (BN, BN // 8, 8))
            word = tl.sum(bit << lane[None, None, :], 2)
            tl.store(target + plane * (N // 8), word.to(tl.uint8), mask=exists & (width[:, None] > plane))


@triton.jit
def _retreat(
    mantissa, exponent, contribution, decay, decay_stride, widths, offsets, row_bytes,
    packed, before, floats, prints,
    H, N: tl.constexpr, planes, BN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, head = program // H, program % H
    i = tl.arange(0, BN)
    inside = (i[:, None] < N) & (i[None, :] < N)
    place = i[:, None] * N + i[None, :]
    at = program.to(tl.int64) * N * N + place
    m = tl.load(mantissa + at, mask=inside, other=0)
    e = tl.load(exponent + program)
    w = tl.load(decay + row * decay_stride + head * N + i, mask=i < N, other=1.0)[:, None]
    u = tl.load(contribution + at, mask=inside, other=0.0).to(tl.float64) * _power(-e)
    d = m.to(tl.float64) - _round(u)
    width = tl.load(widths + head * N + i, mask=i < N, other=0)
    offset = tl.load(offsets + head * N + i, mask=i < N, other=0)
    column = i[None, :]
    source = packed + row.to(tl.int64) * row_bytes + offset[:, None] + column // 8
    value = tl.zeros((BN, BN), dtype=tl.int32)
    for plane in tl.static_range(32):
        if plane < planes:
            word = tl.load(source + plane * (N // 8), mask=inside & (width[:, None] > plane), other=0)
            value |= ((word.to(tl.int32) >> (column % 8)) & 1) << plane
    s = tl.where(width[:, None] == 32, value.to(tl.float64), _base(d, w) + value.to(tl.float64))
    found = s.to(tl.int32)
    tl.store(before + at, found, mask=inside)
    tl.store(floats + at, (s * _power(e)).to(tl.float32), mask=inside)
    tl.store(prints + program, _fingerprint(tl.where(inside, found, 0), e, place))


class PlaneLayout(NamedTuple):
    """Where a row's bit planes lie: widths and byte offsets [H * N] int32, and bytes per batch row."""

    widths: Tensor
    offsets: Tensor
    row_bytes: int
    planes: int

    @classmethod
    def of(cls, widths: Tensor, columns: int, device: torch.device) -> "PlaneLayout":
        """For rows of ``columns`` numbers whose ``widths`` [H * N] are on the host."""
        widths = widths.to(torch.int32)
        sizes = widths * (columns // 8)
        offsets = torch.cumsum(sizes, 0) - sizes
        layout = torch.stack([widths, offsets.to(torch.int32)])
        if device.type == "cuda":
            layout = layout.pin_memory()
        layout = layout.to(device, non_blocking=True)
        return cls(layout[0], layout[1], int(sizes.sum()), int(widths.max()))


class Retreated(NamedTuple):
    """Results of :func:`retreat`: mantissa of the state before the chunk, its value in float32, its fingerprint."""

    mantissa: Tensor
    floats: Tensor
    fingerprint: Tensor


class Advanced(NamedTuple):
    """Results of :func:`advance`: the state after the chunk, raised and coarse heads, packed remnant; floats and
    fingerprint."""

    mantissa: Tensor
    exponent: Tensor
    raised: Tensor
    coarse: Tensor
    packed: Tensor
    floats: Tensor
    fingerprint: Tensor


def advance(
    mantissa: Tensor, exponent: Tensor, contribution: Tensor, decay: Tensor, layout: PlaneLayout,
    *, target_bits: int, non_finite: int, coarse_bits: int, smallest_exponent: int,
) -> Advanced:  # fmt: skip
    """One chunk forwards; ``decay`` [B or 1, H, N, 1] float64. The fingerprint [B, H] is of the state after."""
    batch, heads, size, _ = mantissa.shape
    result = Advanced(
        torch.empty_like(mantissa),
        torch.empty_like(exponent),
        torch.empty_like(exponent, dtype=torch.int8),
        torch.empty_like(exponent, dtype=torch.int8),
        torch.empty(batch * layout.row_bytes, dtype=torch.uint8, device=mantissa.device),
        torch.empty_like(mantissa, dtype=torch.float32),
        torch.empty_like(exponent, dtype=torch.int64),
    )
    with torch.cuda.device_of(mantissa):
        _advance[(batch * heads,)](
            mantissa, exponent, contribution.contiguous(), decay, 0 if decay.shape[0] == 1 else heads * size,
            layout.widths, layout.offsets, layout.row_bytes,
            target_bits, non_finite, float(2**coarse_bits), smallest_exponent, *result,
            heads, size, layout.planes, BN=triton.next_power_of_2(size), num_warps=_warps(size),
        )  # fmt: skip
    return result._replace(raised=result.raised.view(torch.bool), coarse=result.coarse.view(torch.bool))


def retreat(
    mantissa: Tensor,
    exponent: Tensor,
    contribution: Tensor,
    decay: Tensor,
    layout: PlaneLayout,
    packed: Tensor,
) -> Retreated:
    """One chunk backwards; the exponent stays (heads whose grid rose are the caller's to restore)."""
    batch, heads, size, _ = mantissa.shape
    before = torch.empty_like(mantissa)
    floats = torch.empty_like(mantissa, dtype=torch.float32)
    prints = torch.empty_like(exponent, dtype=torch.int64)
    with torch.cuda.device_of(mantissa):
        _retreat[(batch * heads,)](
            mantissa, exponent, contribution.contiguous(), decay, 0 if decay.shape[0] == 1 else heads * size,
            layout.widths, layout.offsets, layout.row_bytes, packed, before, floats, prints,
            heads, size, layout.planes, BN=triton.next_power_of_2(size), num_warps=_warps(size),
        )  # fmt: skip
    return Retreated(before, floats, prints)


def _warps(size: int) -> int:
    return 8 if size <= 64 else 16
