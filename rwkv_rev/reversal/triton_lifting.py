"""Integer lifting on a CUDA device: the factorisation and both directions of the lift, in five launches.

The formulas are those of :mod:`rwkv_rev.reversal.pivoting` and :mod:`rwkv_rev.reversal.lifting`. A program eliminates
one head's P in registers, N steps of three reductions each; L and R stay in the order in which the steps found them and
are read through ``rows`` and ``columns``. Products are sums of outer products, exact in float64. On the way back a
program has 8 columns of a head, whose N numbers depend on each other one after the other.

Between the launches are those that lay remnants one behind the other (:mod:`rwkv_rev.reversal.bit_stack`).
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.reversal.triton_fixed_point import _power, _round

_LARGEST = tl.constexpr(2147483646.0)
_SLACK = tl.constexpr(2.0**-18)
_MOST_COUNT = tl.constexpr(2.0**40)
_LIFTED = tl.constexpr(128)
_TARGET_BITS = tl.constexpr(27)
_NON_FINITE = tl.constexpr(1024)
COLUMNS, WARPS_BACK = 8, 1
MAX_SIZE = 128


@triton.jit
def _eliminate(matrices, rows, columns, diagonal, lower, upper, N: tl.constexpr, BN: tl.constexpr):
    """Complete pivoting; the largest magnitude and its place are found as one integer."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    at = i[:, None] * N + i[None, :]
    inside = (i[:, None] < N) & (i[None, :] < N)
    rest = tl.load(matrices + head * N * N + at, mask=inside, other=0.0).to(tl.float64)
    last = BN * BN - 1
    place = (last - (i[:, None] * BN + i[None, :])).to(tl.int64)
    free_rows = i < N
    free_columns = i < N
    for step in range(N):
        bits = tl.abs(rest).to(tl.int64, bitcast=True)
        best = tl.max(tl.max((bits & -(BN * BN)) | place, 1), 0)
        nothing = (best & -(BN * BN)) == 0
        found = (last - (best & last)).to(tl.int32)
        r = tl.where(nothing, tl.min(tl.where(free_rows, i, BN), 0), found // BN)
        c = tl.where(nothing, tl.min(tl.where(free_columns, i, BN), 0), found % BN)
        row = tl.sum(tl.where(i[:, None] == r, rest, 0.0), 0)
        column = tl.sum(tl.where(i[None, :] == c, rest, 0.0), 1)
        pivot = tl.where(nothing, 0.0, tl.sum(tl.where(i == c, row, 0.0), 0))
        divisor = tl.where(nothing, 1.0, pivot)
        row = row / divisor
        tl.store(rows + head * N + step, r)
        tl.store(columns + head * N + step, c)
        tl.store(diagonal + head * N + step, pivot)
        tl.store(upper + (head * N + step) * N + i, row, mask=i < N)
        tl.store(lower + (head * N + step) * N + i, column / divisor, mask=i < N)
        rest = rest - column[:, None] * row[None, :]
        rest = tl.where((i[:, None] == r) | (i[None, :] == c), 0.0, rest)
        free_rows = free_rows & (i != r)
        free_columns = free_columns & (i != c)


@triton.jit
def _parts(x, UNIT: tl.constexpr):
    """x in whole units of 1 / UNIT, and what that leaves in whole units of 1 / UNIT**2."""
    scaled = x * UNIT
    high = _round(scaled)
    return high, _round((scaled - high) * UNIT)


@triton.jit
def _sum(high, low, UNIT: tl.constexpr):
    return _round((low * (1.0 / UNIT) + high) * (1.0 / UNIT))


@triton.jit
def _base(scaled, scale):
    return tl.ceil((scaled - 0.5) / scale - _SLACK)


@triton.jit
def _length(x):
    """Bits of a whole number of at least 0, float64."""
    return tl.where(x >= 1.0, ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022, 0)


@triton.jit
def _widths(scaled, scale, own):
    counts = tl.floor((scaled + 0.5) / scale + _SLACK) - _base(scaled, scale)
    return tl.minimum(_length(tl.minimum(tl.maximum(counts, 0.0), _MOST_COUNT)), own)


@triton.jit
def _middle(own):
    return (tl.full([], 1, tl.int64) << (own - 1)).to(tl.float64)


@triton.jit
def _turn(
    mantissa, rows, columns, diagonal, lower, upper, turned, scaled,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """t and |d|'s D of some columns."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (i[:, None] < N) & (c[None, :] < N)
    high = tl.zeros((BN, BC), tl.float64)
    low = tl.zeros((BN, BC), tl.float64)
    for j in range(N):
        column = tl.load(columns + head * N + j)
        x = tl.load(mantissa + head * N * N + column * N + c, mask=c < N, other=0).to(tl.float64)
        of_high, of_low = _parts(tl.load(upper + (head * N + i) * N + column, mask=i < j, other=0.0), UNIT)
        high += of_high[:, None] * x[None, :]
        low += of_low[:, None] * x[None, :]
    order = tl.load(columns + head * N + i, mask=i < N, other=0)
    x = tl.load(mantissa + head * N * N + order[:, None] * N + c[None, :], mask=inside, other=0).to(
        tl.float64
    )
    t = x + _sum(high, low, UNIT)
    scale = tl.abs(tl.load(diagonal + head * N + i, mask=i < N, other=1.0))
    at = head * N * N + i[:, None] * N + c[None, :]
    tl.store(turned + at, t, mask=inside)
    tl.store(scaled + at, _round(scale[:, None] * t), mask=inside)


@triton.jit
def _straight(matrix, x, head, i, c, N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """P times whole numbers, float64, added in one order."""
    total = tl.zeros((BN, BC), tl.float64)
    for j in range(N):
        column = tl.load(matrix + (head * N + i) * N + j, mask=i < N, other=0.0).to(tl.float64)
        row = tl.load(x + (head * N + j) * N + c, mask=c < N, other=0).to(tl.float64)
        total = tl.fma(
            tl.broadcast_to(column[:, None], (BN, BC)), tl.broadcast_to(row[None, :], (BN, BC)), total
        )
    return total


@triton.jit
def _advance(
    mantissa, exponent, matrix, update, rows, diagonal, lower, turned, scaled,
    after, new_exponent, values, widths, code,
    N: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The state after the chunk, and what is kept of each number, of one head."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    inside = (i[:, None] < N) & (i[None, :] < N)
    start = head * N * N
    at = start + i[:, None] * N + i[None, :]
    e = tl.load(exponent + head)
    signs = tl.where(tl.load(diagonal + head * N + i, mask=i < N, other=1.0) < 0.0, -1.0, 1.0).to(tl.float64)
    order = tl.load(rows + head * N + i, mask=i < N, other=0)
    high = tl.zeros((BN, BN), tl.float64)
    low = tl.zeros((BN, BN), tl.float64)
    for j in range(N):
        sign = tl.where(tl.load(diagonal + head * N + j) < 0.0, -1.0, 1.0).to(tl.float64)
        row = sign * tl.load(scaled + start + j * N + i, mask=i < N, other=0.0)
        below = (i > j) & (i < N)
        of_high, of_low = _parts(tl.load(lower + start + j * N + order, mask=below, other=0.0), UNIT)
        high += of_high[:, None] * row[None, :]
        low += of_low[:, None] * row[None, :]
    kept = tl.load(scaled + at, mask=inside, other=0.0)
    t = tl.load(turned + at, mask=inside, other=0.0)
    target = start + order[:, None] * N + i[None, :]
    unit = tl.load(update + target, mask=inside, other=0.0).to(tl.float64) * _power(-e)
    s = signs[:, None] * kept + _sum(high, low, UNIT) + _round(unit)
    most = tl.maximum(tl.maximum(tl.abs(t), tl.abs(kept)), tl.abs(s))
    bad = (most != most) | (most > _LARGEST)
    fits = tl.max(tl.max(tl.where(inside, bad, False).to(tl.int32), 1), 0) == 0
    m = tl.load(mantissa + at, mask=inside, other=0).to(tl.float64)
    own_before = tl.minimum(_length(tl.max(tl.max(tl.abs(m), 1), 0)) + 1, 32)
    t = tl.where(fits, t, 0.0)
    kept = tl.where(fits, kept, 0.0)
    own = tl.minimum(_length(tl.max(tl.max(tl.abs(t), 1), 0)) + 1, 32)
    scale = tl.abs(tl.load(diagonal + head * N + i, mask=i < N, other=1.0))[:, None]
    bits = _widths(kept, scale, own)
    total = tl.sum(tl.sum(tl.where(inside, bits, 0), 1), 0)
    lifts = fits & (total < N * N * own_before)
    if lifts:
        tl.store(after + target, s.to(tl.int32), mask=inside)
        tl.store(new_exponent + head, e)
        tl.store(code + head, own + _LIFTED)
        found = tl.where(bits >= own, t + _middle(own), t - _base(kept, scale))
        tl.store(values + at, found.to(tl.int64), mask=inside)
        tl.store(widths + at, bits, mask=inside)
    else:
        unit = tl.load(update + at, mask=inside, other=0.0).to(tl.float64) * _power(-e)
        exact = _straight(matrix, mantissa, head, i, i, N, BN, BN) + unit
        size = tl.abs(exact)
        nan = tl.max(tl.max((size != size).to(tl.int32), 1), 0) > 0
        largest = tl.max(tl.max(tl.where(size == size, size, 0.0), 1), 0)
        length = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        rise = (length - 1022).to(tl.int32) - _TARGET_BITS
        higher = tl.where(nan | (length == 0x7FF), _NON_FINITE, tl.minimum(e + rise, _NON_FINITE))
        e2 = tl.where(nan | (largest > _LARGEST), higher, e)
        tl.store(after + at, _round(exact * _power(e - e2)).to(tl.int32), mask=inside)
        tl.store(new_exponent + head, e2)
        tl.store(code + head, own_before)
        tl.store(values + at, (m + _middle(own_before)).to(tl.int64), mask=inside)
        tl.store(widths + at, own_before, mask=inside)


@triton.jit
def _unscale(
    mantissa, exponent, update, code, rows, diagonal, lower, scaled, widths,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Back to |d|'s D of some columns, and the widths that follow from it."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (i[:, None] < N) & (c[None, :] < N)
    start = head * N * N
    at = start + i[:, None] * N + c[None, :]
    found = tl.load(code + head).to(tl.int64)
    own = found % _LIFTED
    if found < _LIFTED:
        tl.store(widths + at, tl.zeros((BN, BC), tl.int64) + own, mask=inside)
    else:
        order = tl.load(rows + head * N + i, mask=i < N, other=0)
        source = start + order[:, None] * N + c[None, :]
        unit = tl.load(update + source, mask=inside, other=0.0).to(tl.float64) * _power(
            -tl.load(exponent + head)
        )
        out = tl.load(mantissa + source, mask=inside, other=0).to(tl.float64) - _round(unit)
        high = tl.zeros((BN, BC), tl.float64)
        low = tl.zeros((BN, BC), tl.float64)
        for j in range(N):
            row = tl.sum(tl.where(i[:, None] == j, out - _sum(high, low, UNIT), 0.0), 0)
            below = (i > j) & (i < N)
            of_high, of_low = _parts(tl.load(lower + start + j * N + order, mask=below, other=0.0), UNIT)
            high += of_high[:, None] * row[None, :]
            low += of_low[:, None] * row[None, :]
        d = tl.load(diagonal + head * N + i, mask=i < N, other=1.0)
        kept = tl.where(d < 0.0, -1.0, 1.0).to(tl.float64)[:, None] * (out - _sum(high, low, UNIT))
        tl.store(scaled + at, kept, mask=inside)
        tl.store(widths + at, _widths(kept, tl.abs(d)[:, None], own), mask=inside)


@triton.jit
def _read(words, start, width, inside):
    """Numbers of ``width`` bits that begin at the bits ``start``."""
    place = start >> 5
    there = inside & (width > 0)
    one = tl.load(words + place, mask=there, other=0).to(tl.int64) & 0xFFFFFFFF
    more = there & ((start & 31) + width > 32)
    other = tl.load(words + place + 1, mask=more, other=0).to(tl.int64) & 0xFFFFFFFF
    both = one | (other << 32)
    return (both >> (start & 31)) & ((tl.full([], 1, tl.int64) << width) - 1)


@triton.jit
def _return(
    mantissa, exponent, old_exponent, matrix, update, code, columns, diagonal, upper, scaled, widths, ends, words,
    before, N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The state before the chunk, some columns of it."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (i[:, None] < N) & (c[None, :] < N)
    start = head * N * N
    at = start + i[:, None] * N + c[None, :]
    found = tl.load(code + head).to(tl.int64)
    own = found % _LIFTED
    width = tl.load(widths + at, mask=inside, other=0)
    value = _read(words, tl.load(ends + at, mask=inside, other=0) - width, width, inside).to(tl.float64)
    if found < _LIFTED:
        x = value - _middle(own)
        # it vouches for the state after it as well: where that is another, so is what comes back
        total = tl.zeros((BN, BC), tl.float64)
        for j in range(N):
            column = tl.load(matrix + (head * N + i) * N + j, mask=i < N, other=0.0).to(tl.float64)
            row = tl.sum(tl.where(i[:, None] == j, x, 0.0), 0)
            total = tl.fma(
                tl.broadcast_to(column[:, None], (BN, BC)), tl.broadcast_to(row[None, :], (BN, BC)), total
            )
        e = tl.load(old_exponent + head)
        total += tl.load(update + at, mask=inside, other=0.0).to(tl.float64) * _power(-e)
        again = _round(total * _power(e - tl.load(exponent + head))).to(tl.int32)
        other = inside & (again != tl.load(mantissa + at, mask=inside, other=0))
        wrong = tl.max(tl.max(other.to(tl.int32), 1), 0)
        tl.store(before + at, tl.where(wrong > 0, ~x.to(tl.int32), x.to(tl.int32)), mask=inside)
    else:
        scale = tl.abs(tl.load(diagonal + head * N + i, mask=i < N, other=1.0))[:, None]
        kept = tl.load(scaled + at, mask=inside, other=0.0)
        t = tl.where(width >= own, value - _middle(own), _base(kept, scale) + value)
        high = tl.zeros((BN, BC), tl.float64)
        low = tl.zeros((BN, BC), tl.float64)
        for step in range(N):
            j = N - 1 - step
            row = tl.sum(tl.where(i[:, None] == j, t - _sum(high, low, UNIT), 0.0), 0)
            column = tl.load(columns + head * N + j)
            of_high, of_low = _parts(
                tl.load(upper + (head * N + i) * N + column, mask=i < j, other=0.0), UNIT
            )
            high += of_high[:, None] * row[None, :]
            low += of_low[:, None] * row[None, :]
        order = tl.load(columns + head * N + i, mask=i < N, other=0)
        x = t - _sum(high, low, UNIT)
        tl.store(before + start + order[:, None] * N + c[None, :], x.to(tl.int32), mask=inside)


class Eliminated(NamedTuple):
    """Of M matrices the steps of their elimination: each one's row and column [M, N] int32, and its pivot.

    ``lower`` and ``upper`` [M, N, N] hold for each step the column and the row over the pivot, as they were in P.
    """

    rows: Tensor
    columns: Tensor
    diagonal: Tensor
    lower: Tensor
    upper: Tensor


def eliminate(matrices: Tensor) -> Eliminated:
    """Of [M, N, N], float32 or float64."""
    count, size, _ = matrices.shape

    def steps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(count, size, *shape, dtype=dtype, device=matrices.device)

    rows, columns = (steps(dtype=torch.int32) for _ in range(2))
    result = Eliminated(rows, columns, steps(), steps(size), steps(size))
    padded = max(16, triton.next_power_of_2(size))
    with torch.cuda.device_of(matrices):
        _eliminate[(count,)](matrices.contiguous(), *result, N=size, BN=padded, num_warps=_warps(padded))
    return result


class Advanced(NamedTuple):
    """Results of :func:`advance`: mantissa and exponent after the chunk, what is kept of each number, int64, its bits,
    and the code of each head."""

    mantissa: Tensor
    exponent: Tensor
    values: Tensor
    widths: Tensor
    code: Tensor


def advance(mantissa: Tensor, exponent: Tensor, matrix: Tensor, update: Tensor, bits: int) -> Advanced:
    """One chunk forwards; ``bits`` of each of the two parts of L and R."""
    heads, size = mantissa.shape[0] * mantissa.shape[1], mantissa.shape[-1]
    steps = eliminate(matrix.flatten(0, 1))
    wide = [torch.empty(mantissa.shape, dtype=torch.float64, device=mantissa.device) for _ in range(2)]
    values, widths = (torch.empty_like(mantissa, dtype=torch.int64) for _ in range(2))
    code = torch.empty_like(exponent, dtype=torch.int64)
    result = Advanced(torch.empty_like(mantissa), torch.empty_like(exponent), values, widths, code)
    padded = max(16, triton.next_power_of_2(size))
    unit = float(2**bits)
    with torch.cuda.device_of(mantissa):
        _turn[(heads, triton.cdiv(size, COLUMNS))](
            mantissa, *steps, *wide, N=size, BN=padded, BC=COLUMNS, UNIT=unit, num_warps=WARPS_BACK
        )
        _advance[(heads,)](
            mantissa, exponent, matrix.contiguous(), update.contiguous(), steps.rows, steps.diagonal, steps.lower,
            *wide, *result, N=size, BN=padded, UNIT=unit, num_warps=_warps(padded),
        )  # fmt: skip
    return result


def retreat(
    mantissa: Tensor,
    exponent: Tensor,
    matrix: Tensor,
    update: Tensor,
    words: Tensor,
    code: Tensor,
    old_exponent: Tensor,
    bits: int,
) -> Tensor:
    """One chunk backwards: the mantissa before it."""
    heads, size = mantissa.shape[0] * mantissa.shape[1], mantissa.shape[-1]
    steps = eliminate(matrix.flatten(0, 1))
    scaled = torch.empty(mantissa.shape, dtype=torch.float64, device=mantissa.device)
    widths = torch.empty_like(mantissa, dtype=torch.int64)
    before = torch.empty_like(mantissa)
    padded = max(16, triton.next_power_of_2(size))
    unit = float(2**bits)
    grid = (heads, triton.cdiv(size, COLUMNS))
    update = update.contiguous()
    with torch.cuda.device_of(mantissa):
        _unscale[grid](
            mantissa, exponent, update, code, steps.rows, steps.diagonal, steps.lower, scaled, widths,
            N=size, BN=padded, BC=COLUMNS, UNIT=unit, num_warps=WARPS_BACK,
        )  # fmt: skip
        # a state that is another than was packed has other widths: what it gets is compared, not where it stands
        ends = torch.minimum(
            widths.flatten().cumsum(0), torch.full((), 32 * words.numel(), device=words.device)
        )
        _return[grid](
            mantissa, exponent, old_exponent, matrix.contiguous(), update, code, steps.columns, steps.diagonal,
            steps.upper, scaled, widths, ends, words, before,
            N=size, BN=padded, BC=COLUMNS, UNIT=unit, num_warps=WARPS_BACK,
        )  # fmt: skip
    return before


def _warps(padded: int) -> int:
    return 16 if padded > 64 else 8 if padded > 32 else 4
