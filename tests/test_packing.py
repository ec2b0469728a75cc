"""Packing rows at their own widths: exact, as small as the widths, whatever the shapes."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import failing
from torch import Tensor

from rwkv_rev.reversal.packing import BitPacking


def values_of(
    bits: list[int], batch: int, columns: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values with every bit of their widths in play (0, the largest, random), and a tensor for whole rows."""
    rows = []
    for width in bits:
        highest = 2 ** min(width, 31 if dtype == torch.int32 else 62) - 1
        row = torch.randint(0, highest + 1, (batch, columns), generator=generator)
        ends = torch.randint(0, 3, (batch, columns), generator=generator)
        row = torch.where(ends == 0, highest, torch.where(ends == 1, 0, row))
        rows.append(row)
    values = torch.stack(rows, dim=1).to(dtype)
    whole = torch.randint(-(2**31), 2**31, values.shape, generator=generator).to(dtype)
    return values, whole


def assert_round_trip(
    bits: list[int], batch: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.int32
) -> None:
    packing = BitPacking(bits, dtype=dtype)
    values, whole = values_of(bits, batch, columns, torch.Generator().manual_seed(seed), dtype)
    packed = packing.pack(values, whole)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert packed.numel() == packing.nbytes(batch, columns)
    expected = torch.where(packing.whole[None, :, None], whole, values)
    found = packing.unpack(packed, values.shape)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_every_width() -> None:
    def check(width: int, columns: int) -> None:
        assert_round_trip([width], 1, columns)
        assert_round_trip([width] * 3, 2, columns)

    assert failing(check, product(range(33), [1, 3, 8, 64])) == {}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 32), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_mixed_widths(bits: list[int], batch: int, columns: int, seed: int) -> None:
    assert_round_trip(bits, batch, columns, seed)


def test_every_wide_width() -> None:
    """Of int64; none of its rows is whole."""

    def check(width: int, columns: int) -> None:
        assert_round_trip([width] * 3, 2, columns, dtype=torch.int64)

    assert failing(check, product(range(64), [1, 3, 64])) == {}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 63), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_mixed_wide_widths(bits: list[int], batch: int, columns: int, seed: int) -> None:
    assert_round_trip(bits, batch, columns, seed, torch.int64)


def test_size_is_the_sum_of_the_widths() -> None:
    bits = list(range(33))
    assert BitPacking(bits).nbytes(2, 64) == sum(bits) * 2 * 64 // 8
    odd = BitPacking([3, 5, 1]).nbytes(1, 3)
    assert math.ceil(9 * 3 / 8) <= odd <= math.ceil(9 * 3 / 8) + 3  # a part of a byte per field size
    assert BitPacking([0, 0]).nbytes(3, 5) == 0


def test_values_beyond_their_width_do_not_reach_their_neighbours() -> None:
    """What stands in the rows of a raised grid is never read, and must not spoil others."""
    packing = BitPacking([3, 5])
    values = torch.tensor([[[1, -1], [4, 2**30 + 9]]], dtype=torch.int32)
    found = packing.unpack(packing.pack(values, values), values.shape)
    assert found[0, 0, 0] == 1 and found[0, 1, 0] == 4


def test_input_is_left_alone_and_need_not_be_contiguous() -> None:
    packing = BitPacking([32, 7, 16])
    base = torch.randint(0, 100, (5, 3, 2), dtype=torch.int32).transpose(0, 2)
    copy = base.clone()
    packed = packing.pack(base, base)
    assert torch.equal(base, copy)
    kept = packed.clone()
    found = packing.unpack(packed, base.shape)
    found.zero_()
    assert torch.equal(packed, kept)


@pytest.mark.parametrize("bits", [[-1], [33], [4, 40]])
def test_impossible_widths_are_refused(bits: list[int]) -> None:
    with pytest.raises(ValueError, match="between 0 and 32"):
        BitPacking(bits)
    with pytest.raises(ValueError, match="between 0 and 63"):
        BitPacking([2 * width for width in bits], dtype=torch.int64)
