"""What the Triton kernels of the recurrences with matrix states share: places, masked tiles, and exact products.

A program handles one chunk of one head of one row, and a tile of its value or key channels. Where tokens are masked,
``index`` lists each row's tokens with the valid ones first and in order, and ``counts`` says how many those are: a
kernel sees rows of different lengths without holes.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

import torch
import triton
import triton.language as tl

PRECISIONS = {torch.float32: "tf32x3", torch.float16: "bf16x3", torch.bfloat16: "bf16x3"}
"""How :func:`dot` multiplies, by the dtype of the keys."""


@triton.jit
def launch_place(H, chunks, TILES: tl.constexpr, LAST_FIRST: tl.constexpr = False):
    """The launch's flat index as (head, value tile, chunk, row); heads are neighbours in memory. The last chunk comes
    first where what the launch before ended with is still in the cache."""
    program = tl.program_id(0)
    if LAST_FIRST:
        program = tl.num_programs(0) - 1 - program
    head = program % H
    program = program // H
    tile = program % TILES
    program = program // TILES
    return head, tile, program % chunks, program // chunks


@triton.jit
def chunk_tokens(index, counts, row, chunk, T, BT: tl.constexpr, MASKED: tl.constexpr):
    """Where a chunk's tokens are in [B * T], which of them exist, and how many of those are valid."""
    t = chunk * BT + tl.arange(0, BT)
    exists = t < T
    total = T
    position = t
    if MASKED:
        total = tl.load(counts + row)
        position = tl.load(index + row.to(tl.int64) * T + t, mask=exists, other=0)
    count = tl.minimum((chunk + 1) * BT, total) - tl.minimum(chunk * BT, total)
    return row.to(tl.int64) * T + position, exists, count


@triton.jit
def load_rows(x, token, valid, head, channel, H, N: tl.constexpr):
    """Rows of [B * T, H, N]; rows that are not valid and channels beyond N are zero."""
    at = x + (token[:, None] * H + head) * N + channel[None, :]
    return tl.load(at, mask=valid[:, None] & (channel[None, :] < N), other=0.0)


@triton.jit
def store_rows(x, value, token, exists, head, channel, H, N: tl.constexpr):
    at = x + (token[:, None] * H + head) * N + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=exists[:, None] & (channel[None, :] < N))


@triton.jit
def matrix_at(x, slot, i, c, N: tl.constexpr):
    """Pointers into the [N, N] matrix number ``slot`` and the mask of what exists there."""
    at = x + slot * N * N + i[:, None] * N + c[None, :]
    return at, (i[:, None] < N) & (c[None, :] < N)


@triton.jit
def upper_part(x):
    """float32 x rounded to bfloat16's eight bits; by integers, which is faster than to convert there and back."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x8000) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b. In "bf16x3" a float32 operand is the sum of two bfloat16; the lowest product is left out."""
    if PRECISION != "bf16x3":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    a_upper, b_upper = a, b
    if a.dtype != tl.bfloat16:
        a_upper = upper_part(a.to(tl.float32))
    if b.dtype != tl.bfloat16:
        b_upper = upper_part(b.to(tl.float32))
    a_high = a_upper.to(tl.bfloat16)
    b_high = b_upper.to(tl.bfloat16)
    if a.dtype != tl.bfloat16:
        total = tl.dot((a - a_upper).to(tl.bfloat16), b_high, total)
    if b.dtype != tl.bfloat16:
        total = tl.dot(a_high, (b - b_upper).to(tl.bfloat16), total)
    return tl.dot(a_high, b_high, total)
