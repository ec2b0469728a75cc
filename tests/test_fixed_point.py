"""Exact reversal in fixed point: every state back to the bit, remnants within their widths, grids that only rise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decay_arithmetic import BOTH, ULP, ladder, mantissas
from torch import Tensor

from rwkv_rev.reversal.decay_arithmetic import (
    LARGEST,
    NON_FINITE,
    TARGET_BITS,
    WIDE_LARGEST,
    WIDE_TARGET_BITS,
    arithmetic_of,
)
from rwkv_rev.reversal.fixed_point import DecayPlan, FixedPoint, MemoryRemnant, decay_plan


def plan_of(decay: Tensor, *, wide: bool) -> DecayPlan:
    """A plan whose Lambdas are exactly ``decay`` [H, N]."""
    own = arithmetic_of(wide=wide)
    widths = own.bits(decay).flatten()
    return DecayPlan(torch.log(decay), decay[None, :, :, None], lambda: widths, dtype=own.dtype)


def stored(remnant: MemoryRemnant, after: FixedPoint) -> MemoryRemnant:
    """As a tape gives it back."""
    return MemoryRemnant.restore([tensor.clone() for tensor in remnant.tensors(remnant.raised)], after)


def assert_same(found: FixedPoint, expected: FixedPoint) -> None:
    assert torch.equal(found.mantissa, expected.mantissa)
    assert torch.equal(found.exponent, expected.exponent)


@BOTH
@pytest.mark.parametrize("whole_tape", [False, True], ids=["direct", "stored"])
@pytest.mark.parametrize("seed", range(2))
def test_one_chunk_is_exact(seed: int, whole_tape: bool, wide: bool) -> None:
    """Half a million states; contributions on the grid, between its points and exactly half way."""
    generator = torch.Generator().manual_seed(seed)
    decay = ladder(600, generator, wide=wide)
    plan = plan_of(decay[None], wide=wide)
    mantissa = mantissas(decay, 50, generator, wide=wide)[None, None]
    largest = WIDE_LARGEST - 2**9 if wide else LARGEST  # beyond which float64 is not sure
    # even rows to the ends of a mantissa, which raise the grid of the one head unless kept out of it
    for keep_grid in (True, False):
        before = FixedPoint(mantissa, torch.tensor([[-20]], dtype=torch.int32))
        unit = torch.randint(-64, 65, mantissa.shape, generator=generator).double() / 2
        if keep_grid:
            moved = torch.round(plan.decay * mantissa.double()) + torch.round(unit)
            unit = torch.where(moved.abs() > largest - 2, 0.0, unit)
            before = FixedPoint(mantissa.clamp(-largest, largest), before.exponent)
        else:
            unit[..., 0, 0] = 2.0**62
        contribution = torch.ldexp(unit, torch.tensor(-20))
        after, remnant = before.advance(contribution, None, plan)
        assert bool(remnant.raised.any()) is not keep_grid
        back = after.retreat(contribution, None, stored(remnant, after) if whole_tape else remnant, plan)
        assert_same(back, before)


@BOTH
def test_values_half_way_between_grid_points(wide: bool) -> None:
    """Round-half-even sends three states to D = 0 at Lambda = 1/2 and one to D = 1: all come back."""
    plan = plan_of(torch.tensor([[0.5]], dtype=torch.float64), wide=wide)
    mantissa = torch.arange(-100, 101, dtype=plan.dtype).view(1, 1, 1, -1)
    before = FixedPoint(mantissa, torch.zeros(1, 1, dtype=torch.int32))
    for half in (-1.5, -0.5, 0.0, 0.5, 1.5):
        contribution = torch.full(mantissa.shape, half)
        after, remnant = before.advance(contribution, None, plan)
        assert_same(after.retreat(contribution, None, stored(remnant, after), plan), before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.integers(1, 5),
    chunks=st.integers(1, 12),
    growth=st.sampled_from([1.0, 3.0, 1e3, 1e-3]),
    start=st.sampled_from([0.0, 1e-30, 1.0, 1e10]),
    masked=st.booleans(),
    wide=st.booleans(),
)
def test_chains_forwards_then_backwards(
    seed: int,
    batch: int,
    heads: int,
    size: int,
    chunks: int,
    growth: float,
    start: float,
    masked: bool,
    wide: bool,
) -> None:
    """Rising and resting grids, decays 0 to 1 and rows with other counts, none at all among them."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([0.0, 1e-9, 0.3, 0.9, 0.999, 1 - ULP, 1.0], dtype=torch.float64)
    log_decay = table[torch.randint(len(table), (heads, size), generator=generator)].log().clamp(min=-1e30)
    length = int(torch.randint(1, 40, (), generator=generator))
    plan = decay_plan(log_decay, length, wide=wide)
    state = FixedPoint.of(start * torch.randn(batch, heads, size, size, generator=generator), wide=wide)
    history = []
    for chunk in range(chunks):
        contribution = growth**chunk * torch.randn(batch, heads, size, size, generator=generator)
        count = torch.randint(0, length + 1, (batch,), generator=generator) if masked else None
        if count is not None:
            contribution[count == 0] = 0
        after, remnant = state.advance(contribution, count, plan)
        if count is not None:
            resting = count == 0
            assert torch.equal(after.mantissa[resting], state.mantissa[resting])
            assert torch.equal(after.exponent[resting], state.exponent[resting])
        assert bool((after.exponent >= state.exponent).all())
        assert torch.equal(after.exponent > state.exponent, remnant.raised)
        history.append((state, contribution, count, remnant.tensors(remnant.raised)))
        state = after
    for before, contribution, count, kept in reversed(history):
        state = state.retreat(contribution, count, MemoryRemnant.restore(kept, state), plan)
        assert_same(state, before)


@BOTH
def test_a_state_follows_the_recurrence_to_grid_precision(wide: bool) -> None:
    """Of float64, which itself is added up 200 times, the wide grid is no worse than ten more roundings."""
    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.logspace(-4, 0, 8, dtype=torch.float64).view(2, 4)
    plan = decay_plan(log_decay, 16, wide=wide)
    exact = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    state = FixedPoint.of(exact, wide=wide)
    for chunk in range(200):
        contribution = torch.randn(exact.shape, generator=generator, dtype=torch.float64) * (1 + chunk)
        exact = plan.decay * exact + contribution
        state, _ = state.advance(contribution, None, plan)
    largest = exact.abs().amax(dim=(2, 3), keepdim=True)
    allowed = 10 * 2.0**-52 if wide else 400 * 2.0**-TARGET_BITS
    assert bool(((state.value(torch.float64) - exact).abs() <= allowed * largest).all())


@BOTH
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, -3.5, 1e30])
def test_conversion_keeps_more_than_the_format(value: float, wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    state = torch.full((1, 1, 2, 2), value, dtype=dtype)
    fixed = FixedPoint.of(state, wide=wide)
    assert torch.equal(fixed.value(dtype), state)
    assert int(fixed.mantissa.abs().max()) <= 2 ** (WIDE_TARGET_BITS if wide else TARGET_BITS)
    assert_same(FixedPoint.of(fixed.value(torch.float64), wide=wide), fixed)


def test_rows_and_heads_have_their_own_grids() -> None:
    scale = torch.tensor([[1.0, 1e6], [1e-6, 0.0]])[:, :, None, None]
    state = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * scale
    fixed = FixedPoint.of(state)
    assert len(fixed.exponent.unique()) == 4
    for row in range(2):
        assert_same(
            FixedPoint.of(state[row : row + 1]),
            FixedPoint(fixed.mantissa[row : row + 1], fixed.exponent[row : row + 1]),
        )
    plan = decay_plan(torch.full((2, 3), -0.1), 4)
    after, remnant = fixed.advance(torch.full(state.shape, 1e3), None, plan)
    assert remnant.raised.tolist() == [[True, False], [True, True]]
    assert int(after.exponent[0, 1]) == int(fixed.exponent[0, 1])
    assert len(remnant.tensors(remnant.raised)) == 4
    assert len(remnant.tensors(torch.zeros_like(remnant.raised))) == 1


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_state_stays_so_and_what_was_before_comes_back(bad: float, wide: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = decay_plan(torch.full((2, 3), -0.1), 4, wide=wide)
    before = FixedPoint.of(torch.randn(1, 2, 3, 3, generator=generator), wide=wide)
    contribution = torch.randn(1, 2, 3, 3, generator=generator)
    contribution[0, 1, 2, 0] = bad
    after, remnant = before.advance(contribution, None, plan)
    assert after.value().isfinite().all(dim=(2, 3)).tolist() == [[True, False]]
    assert int(after.exponent[0, 1]) == NON_FINITE
    fine = torch.randn(1, 2, 3, 3, generator=generator)
    later, next_remnant = after.advance(fine, None, plan)
    assert later.value().isfinite().all(dim=(2, 3)).tolist() == [[True, False]]
    back = later.retreat(fine, None, stored(next_remnant, later), plan)
    assert_same(back, after)
    assert_same(back.retreat(contribution, None, stored(remnant, back), plan), before)
    broken = FixedPoint.of(contribution, wide=wide)
    assert broken.value().isfinite().all(dim=(2, 3)).tolist() == [[True, False]]


def test_remnants_are_packed_only_when_asked_for() -> None:
    plan = decay_plan(torch.full((1, 2), -0.5), 2)
    before = FixedPoint.of(torch.ones(1, 1, 2, 2))
    _, remnant = before.advance(torch.ones(1, 1, 2, 2), None, plan)
    assert "packed" not in vars(remnant)
    assert remnant.packed.numel() == plan.packing.nbytes(1, 2)
    assert remnant.packed is remnant.packed


@BOTH
def test_a_wrong_contribution_shows_in_the_fingerprint(wide: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = decay_plan(torch.full((2, 4), -0.3), 3, wide=wide)
    before = FixedPoint.of(torch.randn(1, 2, 4, 4, generator=generator), wide=wide)
    contribution = torch.randn(1, 2, 4, 4, generator=generator)
    after, remnant = before.advance(contribution, None, plan)
    assert torch.equal(after.retreat(contribution, None, remnant, plan).fingerprint(), before.fingerprint())
    contribution[0, 1, 2, 3] += 1e-4
    assert not torch.equal(
        after.retreat(contribution, None, remnant, plan).fingerprint(), before.fingerprint()
    )


def test_a_wide_grid_rises() -> None:
    """What a rise cuts off is rounded, and a spike leaves the precision that its size allows."""
    plan = decay_plan(torch.full((1, 4), -0.1), 4, wide=True)
    state = FixedPoint.of(torch.ones(1, 1, 4, 4, dtype=torch.float64) / 3, wide=True)
    spike = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    spike[0, 0, 0, 0] = 1e4
    after, remnant = state.advance(spike, None, plan)
    assert bool(remnant.raised.all()) and not bool(after.coarse().any())
    expected = plan.decay / 3 + spike
    assert bool(((after.value(torch.float64) - expected).abs() <= 1e4 * 2.0**-57).all())
    far, _ = after.advance(1e11 * spike, None, plan)
    small, _ = far.advance(-plan.decay * far.value(torch.float64), None, plan)
    assert bool(small.coarse().all())
