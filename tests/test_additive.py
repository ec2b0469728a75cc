"""Sums in a format of one's choice: back to the bit, full by name, as many updates as is said."""

import math

import pytest
import torch

from rwkv_rev.errors import ConfigError
from rwkv_rev.numerics import nuhmc
from rwkv_rev.reversal.additive import FORMATS, Additive, capacity
from rwkv_rev.reversal.stepped import GridOverflowError

EXPONENTS = {"int16": -9, "int32": -20, "int64": -40, "float32": -16, "float64": -40}


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_added_is_taken_away_to_the_bit(format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(300, 2, 3, 4, generator=generator) / 4
    memory = Additive.of(torch.randn(2, 3, 4, generator=generator), format=format, exponent=EXPONENTS[format])
    states = [memory]
    for change in changes:
        states.append(states[-1].advance(change)[0])
    back = states[-1]
    for change, before in zip(changes.flip(0), states[-2::-1], strict=True):
        back = back.retreat(change)
        assert torch.equal(back.units, before.units) and back.units.dtype == FORMATS[format][0]
    total = memory.value(torch.float64) + changes.double().sum(0)
    unit = 2.0 ** EXPONENTS[format]
    assert float((states[-1].value(torch.float64) - total).abs().max()) <= 300 * unit / 2


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_sum_is_named(format: str) -> None:
    """The largest number is held, on both sides, and one more is refused: by any way of passing it."""
    bits = FORMATS[format][1]
    for sign in (1, -1):
        half = torch.tensor([[0.0, sign * 2.0 ** (bits - 1)]], dtype=torch.float64)
        memory = Additive.of(half, format=format, exponent=0)
        memory, _ = memory.advance(
            half - sign * torch.tensor([[0.0, 2.0 ** max(0, bits - 53)]], dtype=torch.float64)
        )
        for more in (2.0 ** max(0, bits - 53), 2.0**bits, 2.0 ** (bits + 1), 1e300):
            with pytest.raises(
                GridOverflowError, match=f"row 0 has left its grid: .*{format} holds {bits} bits"
            ):
                memory.advance(torch.tensor([[0.0, sign * more]], dtype=torch.float64))


def test_a_sum_that_would_wrap_is_refused() -> None:
    memory = Additive.of(torch.full((3, 2), 30000.0), format="int16", exponent=0)
    memory, _ = memory.advance(torch.tensor([[0.0, 0], [2767, 2767], [0, 0]]))
    with pytest.raises(
        GridOverflowError, match=r"row 1 .* beyond 32767; int16 holds 15 bits and a sign, in steps of 2\*\*0"
    ):
        memory.advance(torch.tensor([[0.0, 0], [1, 0], [0, 0]]))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_so(format: str, bad: float) -> None:
    memory = Additive.of(torch.tensor([[0.0, bad, 1.0]]), format=format, exponent=-4)
    memory, _ = memory.advance(torch.ones(1, 3))
    for there, last in ((memory, 2), (memory.retreat(torch.ones(1, 3)), 1)):
        assert there.value().isfinite().tolist() == [[True, False, True]] and there.value()[0, 2] == last


@pytest.mark.parametrize("format", ["int16", "int32", "float32"])
def test_capacity_is_what_is_counted(format: str) -> None:
    """Equal updates of half the bits, added one by one until the memory says that it is full."""
    bits = FORMATS[format][1] // 2
    largest, held = 2.0**bits - 1, capacity(format, bits)
    memory = Additive.of(torch.zeros(1, 1), format=format, exponent=0)
    for _ in range(min(held, 300)):
        memory, _ = memory.advance(torch.full((1, 1), largest))
    rest = torch.full((1, 1), largest * (held - min(held, 300)), dtype=torch.float64)
    memory, _ = memory.advance(rest)
    with pytest.raises(GridOverflowError):
        memory.advance(torch.full((1, 1), largest))


def test_a_restricted_mantissa_loses_nothing_where_a_free_one_loses_half() -> None:
    """Over NUHMC updates and back a float32 sum is off; with a mantissa of 13 bits it is the same to the bit."""
    count, number = nuhmc(torch.float32), torch.tensor([[4 / 3]])
    free = torch.zeros(1, 1)
    memory = Additive.of(free, format="float32", exponent=-12)
    on_grid = torch.tensor([[1 + 2.0**-12]])
    start = memory
    for _ in range(count):
        free = free + number
        memory, _ = memory.advance(on_grid)
    assert float(memory.value(torch.float64)) == count * float(on_grid.double())
    assert capacity("float32", 13) >= count  # 1 + 2**-12 has 13 bits
    for _ in range(count):
        free = free - number
        memory = memory.retreat(on_grid)
    assert float(free) != 0
    assert torch.equal(memory.units, start.units)


def test_a_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="the format 'int8' of a state does not exist; use int16, int32"):
        Additive.of(torch.zeros(1, 1), format="int8")


def test_capacities_by_half_of_the_bits() -> None:
    halves = {format: capacity(format, bits // 2) for format, (_, bits) in FORMATS.items()}
    assert halves == {
        "int16": 258,
        "int32": 65538,
        "int64": 4294967298,
        "float32": 4097,
        "float64": 134217730,
    }
