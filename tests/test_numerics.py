"""How long floating-point formats last: formulas against counting."""

import json
import math

import pytest
import torch

from rwkv_rev.numerics import (
    FORMATS,
    LONGEST_MEASURED,
    bits_forgotten,
    bits_forgotten_per_step,
    counted_nuhmc,
    division_nuhmc,
    format_limits,
    mantissa_bits,
    measured_division_nuhmc,
    nuhmc,
)

LOG2 = math.log(2.0)


@pytest.mark.parametrize(
    ("dtype", "bits", "updates"),
    [
        (torch.float16, 10, 32),
        (torch.bfloat16, 7, 8),
        (torch.float32, 23, 2048),
        (torch.float64, 52, 67_108_864),
    ],
    ids=lambda value: str(value),
)
def test_nuhmc_is_what_counting_finds(dtype: torch.dtype, bits: int, updates: int) -> None:
    """The figures of the EBRT draft for float16, float32 and float64."""
    assert mantissa_bits(dtype) == bits
    assert nuhmc(dtype) == updates
    assert counted_nuhmc(dtype) == pytest.approx(updates, rel=0.01)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_division_loses_half_a_mantissa_when_the_formula_says(dtype: torch.dtype) -> None:
    log_decay = -LOG2 * torch.tensor([[0.03, 0.1], [0.3, 1.0]])
    formula, measured = division_nuhmc(log_decay, dtype), measured_division_nuhmc(log_decay, dtype)
    assert measured.shape == log_decay.shape
    assert (measured >= formula / 2 - 1).all()
    assert (measured <= formula * 2 + 1).all()


def test_channels_that_keep_everything_last() -> None:
    assert division_nuhmc(torch.zeros(1), torch.float32).isinf().all()
    assert measured_division_nuhmc(torch.zeros(1), torch.float64).isinf().all()


def test_bits_forgotten_by_a_chunk() -> None:
    log_decay = torch.tensor([0.0, -LOG2 / 8, -LOG2, -math.inf])
    torch.testing.assert_close(
        bits_forgotten(log_decay, 64), torch.tensor([0.0, 8.0, 32.0, 32.0], dtype=torch.float64)
    )
    assert bits_forgotten_per_step(log_decay).dtype == torch.float64


def test_limits_of_all_formats() -> None:
    limits = format_limits(-LOG2 * torch.linspace(0.001, 2, 50))
    assert [limit.format for limit in limits] == ["float16", "bfloat16", "float32", "float64"]
    for limit in limits:
        formulas = [formula for formula, _ in limit.division.values()]
        assert formulas == sorted(formulas, reverse=True)
        assert all(measured <= LONGEST_MEASURED for _, measured in limit.division.values())
    json.dumps([limit.to_dict() for limit in limits], allow_nan=False)
