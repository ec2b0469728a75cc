"""Steps on a fixed grid and back: preimages, bits, whole rows, overflow."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from tables import failing
from torch import Tensor

from rwkv_rev.reversal.step_arithmetic import Floats, Integers
from rwkv_rev.reversal.stepped import GridOverflowError, KeptSteps, Stepped, StepsRemnant, ideal_bits

DECAYS = (0.0, 5e-324, 1e-300, 1e-9, 0.1, 1 / 3, 0.5, 0.7, 0.9, 1 - 2**-24, 1 - 2**-53, 1.0)
DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("kind", "bits"), [(Floats, 3), (Floats, 31), (Floats, 50), (Integers, 3), (Integers, 50), (Integers, 61)]
)
def test_the_least_preimage_is_the_least(kind: type[Floats] | type[Integers], bits: int) -> None:
    assert failing(_least_of, ((decay, kind, bits) for decay in DECAYS)) == {}


def _least_of(decay: float, kind: type[Floats] | type[Integers], bits: int) -> None:
    largest, arithmetic = 2**bits - 2, kind()
    generator = torch.Generator().manual_seed(bits)
    states = arithmetic.units((torch.rand(4000, generator=generator, dtype=torch.float64) * 2 - 1) * largest)
    states[:6] = torch.tensor([0, largest, -largest, 1, -1, largest - 1], dtype=arithmetic.dtype)
    z = torch.full(states.shape, decay, dtype=torch.float64)
    kept = arithmetic.decayed(states, z)
    found = arithmetic.least(kept, z, largest)
    assert (found <= states).all() and (found >= -largest).all()
    assert (arithmetic.decayed(found, z) >= kept).all()
    below = found - 1
    assert ((below < -largest) | (arithmetic.decayed(below, z) < kept)).all()
    assert (arithmetic.least(kept + 1, z, largest) > states).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_integers_are_multiplied_exactly(decay: float) -> None:
    largest = 2**61 - 2
    states = [0, 1, -1, largest, -largest, 2**31, -(2**31), 3**38, -(3**38), 2**60 + 12345, -(2**53) - 1]
    found = Integers().decayed(torch.tensor(states), torch.full((len(states),), decay, dtype=torch.float64))
    z = max(1, round(Fraction(decay) * 2**62))
    assert found.tolist() == [math.floor(Fraction(z * s, 2**62) + Fraction(1, 2)) for s in states]


def walk(
    dtype: torch.dtype, decays: Tensor, seed: int = 0
) -> tuple[Stepped, Stepped, StepsRemnant, list[Tensor]]:
    """A memory [2, 1, M], the one after a step for each row of ``decays``, the remnant, and the contributions."""
    generator = torch.Generator().manual_seed(seed)
    size = decays.shape[1]
    before = Stepped.of(torch.randn(2, 1, size, generator=generator, dtype=dtype), magnitude=4)
    (units,), states, kept, changes = before.parts(), [], [], []
    for decay in decays.to(dtype):
        change = torch.randn(2, size, generator=generator, dtype=dtype) / 4
        states.append(units)
        kept.append(decay.expand_as(change))
        changes.append(change)
        units = before.step(units, kept[-1], change)
    return before, before.held([units]), StepsRemnant(before, states, kept), changes


def back(after: Stepped, kept: KeptSteps, decays: Tensor, changes: list[Tensor]) -> Stepped:
    """The memory before, from what a tape gave back."""
    rebuilt = None
    if not kept.all_whole:
        bits, (units,) = kept.bits(after), after.parts()
        for decay, change in zip(reversed(decays.to(after.dtype)), reversed(changes), strict=True):
            units = after.undo(units, decay.expand_as(change), change, bits)
        rebuilt = after.held([units])
    return kept.completed(rebuilt, after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_come_back_to_the_bit(dtype: torch.dtype) -> None:
    def check(decay: float, steps: int) -> None:
        decays = torch.full((steps, 16), decay, dtype=torch.float64)
        before, after, remnant, changes = walk(dtype, decays)
        kept = after.remnant(remnant.tensors(remnant.size))
        assert torch.equal(back(after, kept, decays, changes).mantissa, before.mantissa)

    assert failing(check, product(DECAYS, [1, 2, 40])) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_whole_and_one_in_bits(dtype: torch.dtype) -> None:
    steps = 20
    before, _, _, changes = walk(dtype, torch.ones(steps, 16))
    decays = torch.stack([torch.full((steps, 16), 0.01), torch.full((steps, 16), 0.99)], dim=1).to(dtype)
    (units,), states = before.parts(), []
    for decay, change in zip(decays, changes, strict=True):
        states.append(units)
        units = before.step(units, decay, change)
    remnant = StepsRemnant(before, states, list(decays))
    kept = before.remnant(remnant.tensors(remnant.size))
    assert kept.sizes is not None and kept.whole is not None and not kept.all_whole
    assert kept.sizes[0] == -1 and kept.sizes[1] > 0 and len(kept.whole) == 1
    bits = kept.bits(before)
    for decay, change in zip(reversed(decays), reversed(changes), strict=True):
        units = before.undo(units, decay, change, bits)
    rebuilt = kept.completed(before.held([units]), before)
    assert torch.equal(rebuilt.mantissa, before.mantissa)


def test_a_remnant_has_the_size_of_what_is_forgotten() -> None:
    """z = 1: nothing; z = 1/2: a bit; z = 0: all 32; more than the state: the state."""
    for decay, bits in ((1.0, 0), (0.5, 1), (0.25, 2), (0.0, 32)):
        *_, remnant, _ = walk(torch.float32, torch.full((1, 64), decay))
        assert remnant.size is not None
        assert remnant.size.tolist() == [64 * bits] * 2
        kept = remnant.tensors(remnant.size)
        assert len(kept) == (1 if bits == 32 else 3)
        if bits < 32:
            _, words, whole = kept
            assert words.nbytes == 2 * 64 * bits / 8 and len(whole) == 0
    before, *_, remnant, _ = walk(torch.float32, torch.full((40, 64), 0.5))
    for size in (remnant.size, None):  # None where nobody may wait for it
        (alone,) = remnant.tensors(size)
        assert torch.equal(alone, before.mantissa)


def test_a_remnant_is_never_larger_than_the_state() -> None:
    def check(steps: int) -> None:
        decays = torch.full((steps, 3), 0.4)
        before, after, remnant, changes = walk(torch.float32, decays)
        kept = remnant.tensors(remnant.size)
        assert sum(tensor.nbytes for tensor in kept) <= before.mantissa.nbytes
        assert torch.equal(back(after, after.remnant(kept), decays, changes).mantissa, before.mantissa)

    assert failing(check, ((steps,) for steps in range(1, 40))) == {}


def test_more_bits_than_32_can_count_are_a_whole_state() -> None:
    before, *_ = walk(torch.float32, torch.zeros(1, 64))
    mantissa, steps = before.mantissa[:, :, :1], 2**31 // 32 + 1
    few = StepsRemnant(before.like([mantissa]), [before.parts()[0][:, :1]], [torch.zeros(2, 1)])
    values, widths = few.forgotten
    vars(few)["forgotten"] = (values.expand(2, steps, 1), widths.expand(2, steps, 1))
    assert few.size is not None and int(few.size.min()) > 0
    (alone,) = few.tensors(few.size)
    assert torch.equal(alone, mantissa)


@pytest.mark.parametrize(
    ("decay", "ratio"), [(0.99, 1.379), (0.9, 1.316), (0.7, 1.166), (0.5, 1.0), (0.4, 1.211), (0.3, 1.145)]
)
def test_bits_against_the_ideal(decay: float, ratio: float) -> None:
    """``z <= 1``: D has k = floor(1/z) or k + 1 preimages, as often as makes 1/z on average."""
    *_, remnant, _ = walk(torch.float32, torch.full((1, 200_000), decay))
    assert remnant.size is not None
    used = float(remnant.size.sum()) / 400_000
    assert used / float(ideal_bits(torch.tensor(decay, dtype=torch.float64))) == pytest.approx(
        ratio, rel=0.03
    )
    few = math.floor(1 / decay)
    share = (few + 1 - 1 / decay) * few * decay  # of the integers whose D has the fewer preimages
    expected = share * (few - 1).bit_length() + (1 - share) * few.bit_length()
    assert used == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_beyond_the_grid_is_named(dtype: torch.dtype) -> None:
    value = torch.zeros(3, 2, 4, dtype=dtype)
    value[1, 1, 2] = 4.01
    with pytest.raises(GridOverflowError, match=r"beyond 4 in row 1"):
        Stepped.of(value, magnitude=2)
    assert Stepped.of(value.clamp(max=3.9), magnitude=2).value(dtype).max() == pytest.approx(3.9)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    value = torch.zeros(2, 1, 3)
    value[0, 0, 1] = bad
    memory = Stepped.of(value, magnitude=2)
    assert memory.value().isnan().tolist() == [[[False, True, False]], [[False] * 3]]
    (units,) = memory.parts()
    stepped = memory.step(units, torch.tensor(0.0), torch.zeros(2, 3))
    assert memory.after([stepped], stepped[None]).value()[0, 0, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_as_near_as_the_grid_is(dtype: torch.dtype) -> None:
    value = torch.randn(2, 2, 50, dtype=dtype)
    memory = Stepped.of(value, magnitude=3)
    unit = 2.0**memory.exponent
    assert float((memory.value(dtype).double() - value.double()).abs().max()) <= 0.51 * unit + 1e-7 * (
        dtype != torch.float64
    )
    assert unit == (2.0**-28 if dtype == torch.float32 else 2.0**-58)
