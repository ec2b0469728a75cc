"""What the RWKV-7 kernels share: products in parts, places in memory, decays, triangles and their inverses.

The formulas and the launches are in :mod:`rwkv_rev.wkv.triton_wkv7`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

import triton
import triton.language as tl

from rwkv_rev.wkv.triton_blocks import launch_place, load_rows

_BLOCK = tl.constexpr(16)  # tokens within which the triangular system is solved row by row
_LARGEST_EXPONENT = tl.constexpr(80.0)  # no model reaches it; beyond 88 a factor would be infinite


@triton.jit
def _thirds(x):
    """Three bfloat16 whose sum is x in float32."""
    high = x.to(tl.bfloat16)
    rest = x.to(tl.float32) - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b. In "bf16x3" a float32 operand is the sum of two bfloat16, in "bf16x6" of three; the lowest products
    are left out."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "bf16x3":
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        if a.dtype != tl.bfloat16:
            total = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, total)
        if b.dtype != tl.bfloat16:
            total = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), total)
        total = tl.dot(a_high, b_high, total)
    elif PRECISION == "bf16x6":
        a_high, a_middle, a_low = _thirds(a)
        b_high, b_middle, b_low = _thirds(b)
        nothing = tl.zeros(total.shape, tl.float32)
        small = tl.dot(a_low, b_high, tl.dot(a_high, b_low, tl.dot(a_middle, b_middle, nothing)))
        small = tl.dot(a_middle, b_high, tl.dot(a_high, b_middle, small))
        # tensor cores cut off what does not fit when they add, so that sums of many products are added here
        total += tl.dot(a_high, b_high, nothing) + small
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _factor(x, PRECISION: tl.constexpr):
    """As products will take it: what is rounded once needs half the registers until then."""
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _rest(x, PRECISION: tl.constexpr):
    """What :func:`_factor` leaves of x, as a factor."""
    return _factor(x - _factor(x, PRECISION).to(tl.float32), PRECISION)


@triton.jit
def _place(mask, T, H, chunks, TILES: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """Of the launch's flat index (heads are neighbours in memory): head, value tile, number among all chunks,
    tokens' places in [B * T], which of them exist, and which are valid."""
    head, tile, chunk, row = launch_place(H, chunks, TILES)
    row = row.to(tl.int64)
    t = chunk * C + tl.arange(0, C)
    token = row * T + t
    exists = t < T
    valid = exists
    if MASKED:
        valid = exists & (tl.load(mask + token, mask=exists, other=0) != 0)
    return head, tile, (row * chunks + chunk) * H + head, token, exists, valid


@triton.jit
def _at(x, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x + slot * ROWS * COLUMNS + (i[:, None] * COLUMNS + c[None, :])


@triton.jit
def _inside(i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (i[:, None] < ROWS) & (c[None, :] < COLUMNS)


@triton.jit
def _get(x, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows i and columns c of the matrix number ``slot``; zero where there are none."""
    at = _at(x, slot, i, c, ROWS, COLUMNS)
    if ROWS % 64 == 0 and COLUMNS % 64 == 0:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=_inside(i, c, ROWS, COLUMNS), other=0.0)
    return value


@triton.jit
def _put(x, value, slot, i, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = _at(x, slot, i, c, ROWS, COLUMNS)
    value = value.to(x.dtype.element_ty)
    if ROWS % 64 == 0 and COLUMNS % 64 == 0:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=_inside(i, c, ROWS, COLUMNS))


@triton.jit
def _sums(kept, x):
    """Sums over the rows of x that ``kept`` names, as products: a scan over rows costs more. Exact but for float32."""
    kept = tl.where(kept, 1.0, 0.0).to(tl.bfloat16)
    total = tl.zeros(x.shape, tl.float32)
    if x.dtype == tl.bfloat16:
        total = _dot(kept, x, total, "bf16")
    else:
        high, middle, low = _thirds(x)
        total = _dot(kept, low, total, "bf16")
        total = _dot(kept, middle, total, "bf16")
        total = _dot(kept, high, total, "bf16")
    return total


@triton.jit
def _decay(log_decay, token, valid, head, channel, H, N: tl.constexpr, C: tl.constexpr, ITSELF: tl.constexpr):
    """c_t, or c_{t-1}; of tokens that are not valid w = 1."""
    t = tl.arange(0, C)
    kept = t[:, None] > t[None, :]
    if ITSELF:
        kept = t[:, None] >= t[None, :]
    return _sums(kept, load_rows(log_decay, token, valid, head, channel, H, N))


@triton.jit
def _grown(until):
    """e^{-c_t}."""
    return tl.exp(tl.minimum(-until, _LARGEST_EXPONENT))


@triton.jit
def _pairs(
    a, b, slot, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr
):
    """A B^T of two factors."""
    t = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        total = _dot(_get(a, slot, t, i, C, N), tl.trans(_get(b, slot, t, i, C, N)), total, LOW)
    return total


@triton.jit
def _lower(x, C: tl.constexpr, ITSELF: tl.constexpr, LOW: tl.constexpr):
    """What a token (row) has of those before it, and of itself or not, as a factor."""
    t = tl.arange(0, C)
    kept = t[:, None] > t[None, :]
    if ITSELF:
        kept = t[:, None] >= t[None, :]
    return _factor(tl.where(kept, x, 0.0), LOW)


@triton.jit
def _upper(x, C: tl.constexpr, ITSELF: tl.constexpr, LOW: tl.constexpr):
    """The same transposed: what a token (row) gives to those after it."""
    t = tl.arange(0, C)
    kept = t[:, None] < t[None, :]
    if ITSELF:
        kept = t[:, None] <= t[None, :]
    return _factor(tl.where(kept, x, 0.0), LOW)


@triton.jit
def _inverse(a, C: tl.constexpr, MERGES: tl.constexpr, PRECISION: tl.constexpr):
    """(I - a)^{-1} of a strictly lower triangular [C, C], C = 16 << MERGES."""
    BLOCKS: tl.constexpr = C // _BLOCK
    t = tl.arange(0, C)
    i = tl.arange(0, _BLOCK)
    same = (t[:, None] // _BLOCK) == (t[None, :] // _BLOCK)
    blocks = tl.sum(tl.reshape(tl.where(same, a, 0.0), [C, BLOCKS, _BLOCK]), 1)
    blocks = tl.reshape(blocks, [BLOCKS, _BLOCK, _BLOCK])
    unit = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    solved = tl.broadcast_to(unit[None, :, :], [BLOCKS, _BLOCK, _BLOCK])
    for step in range(_BLOCK - 1):  # row ``step`` is final: take it into those below
        column = tl.sum(tl.where(i[None, None, :] == step, blocks, 0.0), 2)
        row = tl.sum(tl.where(i[None, :, None] == step, solved, 0.0), 1)
        solved += column[:, :, None] * row[:, None, :]
    spread = tl.broadcast_to(tl.reshape(solved, [C, 1, _BLOCK]), [C, BLOCKS, _BLOCK])
    inverse = tl.where(same, tl.reshape(spread, [C, C]), 0.0)
    nothing = tl.zeros([C, C], tl.float32)
    for merge in tl.static_range(MERGES):
        block = t // (_BLOCK << merge)
        neighbours = ((block[:, None] ^ block[None, :]) == 1) & (block[:, None] > block[None, :])
        between = tl.where(neighbours, a, 0.0)
        inverse += _dot(inverse, _dot(between, inverse, nothing, PRECISION), nothing, PRECISION)
    return inverse
