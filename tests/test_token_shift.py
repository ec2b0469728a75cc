"""The carried y: error of every mix after inversion, and the channels whose x_{a-1} it carries unchanged."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.token_shift import (
    SMALLEST_COEFFICIENT,
    Border,
    carried_mix,
    last_token,
    mix,
    token_shift,
)

MOST_ULP = 2.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXES = {  # a range for each of the cell's mixes
    "inside": [(0.0, 1.0), (0.0, 1.0), (0.0, 1.0)],
    "trained": [(-0.34, 1.61), (-0.34, 1.61), (-0.34, 1.61), (-0.34, 1.61)],
    "near one": [(0.999, 1.001), (0.999, 1.001)],
    "one of them near one": [(0.0, 1.0), (0.999, 1.001)],
    "wild": [(-50.0, 50.0), (-50.0, 50.0), (0.0, 1.0)],
    "near zero and negative": [(-1e-3, 1e-3), (-2.0, 0.0)],
    "above one": [(1.0, 3.0), (0.0, 1.0)],
}


def round_trip(x: Tensor, shift: Tensor, mixes: list[Tensor]) -> Tensor:
    mu = carried_mix(mixes)
    border = Border.of(x[:, None], mu, None)
    return border.uncarry(border.carry(shift))


def errors_in_ulp(x: Tensor, shift: Tensor, mixes: list[Tensor]) -> Tensor:
    """Error of every exact mix [mixes, B, D] after the round trip, in ulps of its operands' magnitude.

    The operands of ``mu x + (1 - mu) x'`` are its two products; their magnitude is the sum of their absolute values.
    """
    back = round_trip(x, shift, mixes).double()
    found = []
    for mu in (mu.double() for mu in mixes):
        error = ((1 - mu) * (back - shift.double())).abs()
        operands = (mu * x.double()).abs() + ((1 - mu) * shift.double()).abs()
        kind = torch.finfo(x.dtype)
        ulp = kind.eps * 2.0 ** torch.floor(torch.log2(operands.clamp(min=kind.smallest_normal)))
        found.append(torch.where(error == 0, 0.0, error / ulp))
    return torch.stack(found)


def operands(generator: torch.Generator, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and x_{a-1} whose sizes differ by up to 2**20 either way, and some that are equal or opposite."""
    x, shift = torch.randn(2, rows, width, generator=generator)
    spread = torch.randint(-20, 21, (2, rows, width), generator=generator)
    x, shift = torch.ldexp(x, spread[0]), torch.ldexp(shift, spread[1])
    kind = torch.randint(0, 6, (rows, width), generator=generator)
    shift = torch.where(kind == 0, x, torch.where(kind == 1, -x, shift))
    return x.to(dtype), shift.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MIXES)
def test_every_mix_is_rebuilt_within_two_ulp(kind: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, shift = operands(generator, 500, 400, DTYPES[dtype])
    mixes = [
        (low + (high - low) * torch.rand(400, generator=generator)).to(DTYPES[dtype])
        for low, high in MIXES[kind]
    ]
    errors = errors_in_ulp(x, shift, mixes)
    assert float(errors.max()) <= MOST_ULP, float(errors.max())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=4),
    st.floats(-1e4, 1e4, width=32),
    st.floats(-1e4, 1e4, width=32),
)
@example(mus=[1.916201514488824e-24, 0.0], x=15.0, shift=0.0)
def test_every_mix_is_rebuilt_within_two_ulp_adversarial(mus: list[float], x: float, shift: float) -> None:
    errors = errors_in_ulp(torch.tensor([[x]]), torch.tensor([[shift]]), [torch.tensor([mu]) for mu in mus])
    assert float(errors.max()) <= MOST_ULP


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_vector_survives_a_large_one(dtype: str) -> None:
    """Best mixes below 0 and above 1: x_{a-1} = 1e-3 next to x_a = 1000 still reaches the other mix."""
    x, shift = torch.full((1, 2), 1000.0).to(DTYPES[dtype]), torch.full((1, 2), 1e-3).to(DTYPES[dtype])
    mixes = [torch.tensor([-0.5, 1.9]).to(DTYPES[dtype]), torch.tensor([1e-6, 0.2]).to(DTYPES[dtype])]
    assert torch.equal(round_trip(x, shift, mixes), shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_that_barely_see_it_carry_it_unchanged(dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mu = 1 + SMALLEST_COEFFICIENT * (2 * torch.rand(400, generator=generator) - 1) * 0.99
    x, shift = operands(generator, 50, 400, DTYPES[dtype])
    mixes = [mu.to(DTYPES[dtype]), torch.ones(400, dtype=DTYPES[dtype])]
    assert not carried_mix(mixes)[(1 - mixes[0].double()).abs() < SMALLEST_COEFFICIENT].any()
    assert torch.equal(Border.of(x[:, None], torch.zeros(400, dtype=torch.float64), None).carry(shift), shift)
    barely = (1 - mixes[0].double()).abs() < SMALLEST_COEFFICIENT
    assert torch.equal(round_trip(x, shift, mixes)[:, barely], shift[:, barely])


def test_the_best_conditioned_mix_is_carried() -> None:
    mixes = [torch.tensor([0.9, 0.3, 1.5, 0.99, -0.1]), torch.tensor([0.2, 0.4, 0.7, 1.01, 0.5])]
    assert carried_mix(mixes).tolist() == pytest.approx([0.2, 0.3, 0.0, 0.0, 0.0])


def test_the_vector_itself_comes_back_within_sixteen_ulp() -> None:
    generator = torch.Generator().manual_seed(2)
    x, shift = torch.randn(2, 1000, 64, generator=generator).double()
    x, shift = x.float(), shift.float()
    mu = torch.linspace(0, 1 - SMALLEST_COEFFICIENT, 64)
    error = (round_trip(x, shift, [mu]).double() - shift.double()).abs()
    scale = torch.maximum(x.abs(), shift.abs())
    assert float((error / (torch.finfo(torch.float32).eps * scale)).max()) <= 16


def test_a_second_round_trip_changes_nothing_in_a_row_without_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    x, shift = torch.randn(2, 3, 8, generator=generator)
    mask = ChunkMask.of(torch.tensor([[0], [1], [0]]))
    mu = torch.full((8,), 0.5, dtype=torch.float64)
    border = Border.of(x[:, None], mu, mask)
    y = border.carry(shift)
    back = border.uncarry(y)
    assert torch.equal(back[[0, 2]], shift[[0, 2]])
    assert torch.equal(y[[0, 2]], shift[[0, 2]]) and not torch.equal(y[1], shift[1])


def test_shift_looks_at_the_last_valid_token() -> None:
    x = torch.arange(1.0, 7.0).view(1, 6, 1).repeat(3, 1, 1)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    shift = torch.tensor([[-1.0], [-1.0], [-1.0]])
    mask = ChunkMask.of(valid)
    shifted = token_shift(x, shift, mask)[:, :, 0]
    assert shifted[0].tolist() == [-1, 1, 2, 3, 4, 5]
    assert shifted[1].tolist() == [-1, -1, 2, 2, 2, 5]
    assert shifted[2].tolist() == [-1] * 6
    assert last_token(x, shift, mask)[:, 0].tolist() == [6, 5, -1]
    assert torch.equal(token_shift(x[:1], shift[:1], None), token_shift(x, shift, mask)[:1])
    assert torch.equal(last_token(x[:1], shift[:1], None), last_token(x, shift, mask)[:1])
    assert mask.first.tolist() == [0, 1, 0] and mask.count.tolist() == [6, 2, 0]


def test_mix_of_equal_vectors_and_at_the_ends() -> None:
    x, shifted = torch.tensor([[3.0, -2.0]]), torch.tensor([[5.0, 7.0]])
    assert torch.equal(mix(x, shifted, torch.ones(2)), x)
    assert torch.equal(mix(x, shifted, torch.zeros(2)), shifted)
    assert torch.equal(mix(x, shifted, torch.full((2,), -1.0)), 2 * shifted - x)
