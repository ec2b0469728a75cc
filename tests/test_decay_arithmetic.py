"""Both ways to decay integers: the least that gives each D, remnants within their widths, D as near as a unit."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from rwkv_rev.reversal.decay_arithmetic import arithmetic_of

ULP = 2.0**-53
BOTH = pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
EXTREME = {False: 2**31 - 1, True: 2**61 - 2**11}
"""Of a mantissa."""


def ladder(count: int, generator: torch.Generator, *, wide: bool = False) -> Tensor:
    """Lambdas [R]: random over 2**-34 .. 1, fractions whose preimages tie, and the neighbours of them all; 0 and 1."""
    most = 66 if wide else 34
    random = 2.0 ** (-most * torch.rand(count, generator=generator, dtype=torch.float64))
    odd = torch.arange(1.0, 200.0, dtype=torch.float64)
    powers = 2.0 ** -torch.arange(0.0, most, dtype=torch.float64)
    near = torch.cat([1 / odd, 2 / (2 * odd + 1), powers, 1 - ULP * odd])
    exact = torch.cat([near, random]).clamp(max=1)
    below, above = (
        torch.nextafter(exact, torch.tensor(0.0).double()),
        torch.nextafter(exact, torch.tensor(2.0).double()),
    )
    special = torch.tensor([0.0, 1e-320, 1e-300, 1e-12, 0.5, 1 - ULP, 1.0], dtype=torch.float64)
    return torch.cat([special, exact, below, above.clamp(max=1)])


def mantissas(decay: Tensor, columns: int, generator: torch.Generator, *, wide: bool = False) -> Tensor:
    """States [R, M] that round badly: near the borders between two D, at the ends of a mantissa, small, and random."""
    rows, extreme, own = len(decay), EXTREME[wide], arithmetic_of(wide=wide)

    def drawn(least: int, most: int) -> Tensor:
        return torch.randint(least, most, (rows, columns), generator=generator)

    random = drawn(-extreme, extreme + 1).to(own.dtype)
    kept = _decayed(random, decay, wide=wide)
    border = own.base(kept, decay[:, None])
    whole = own.bits(decay) == 32 if not wide else torch.zeros_like(decay, dtype=torch.bool)
    border = torch.where(whole[:, None], random, border.to(torch.int64) + drawn(-1, 2))
    ends = (extreme - drawn(0, 4)) * (2 * drawn(0, 2) - 1)
    every = torch.cat([random, border, ends, drawn(-8, 9)], dim=1)
    return every.clamp(-extreme, extreme).to(own.dtype)


def _decayed(state: Tensor, decay: Tensor, *, wide: bool) -> Tensor:
    """D [R, M] of states without a contribution."""
    nothing = torch.zeros(1, 1, *state.shape)
    exponent = torch.zeros(1, 1, dtype=torch.int32)
    own = arithmetic_of(wide=wide)
    found = own.decayed(
        state.clamp(-EXTREME[wide] + 1, EXTREME[wide] - 1)[None, None], exponent, nothing, decay[:, None]
    )
    assert not found.raised.any()
    return found.kept[0, 0]


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_remnants_fit_their_widths(wide: bool, seed: int) -> None:
    generator, own = torch.Generator().manual_seed(seed), arithmetic_of(wide=wide)
    decay = ladder(2000, generator, wide=wide)
    bits, most = own.bits(decay), 62 if wide else 32
    assert int(bits.max()) == most
    state = mantissas(decay, 100, generator, wide=wide)
    state = state.clamp(-EXTREME[wide] + 1, EXTREME[wide] - 1)
    base = own.base(_decayed(state, decay, wide=wide), decay[:, None])
    partial = (bits < 32) | wide
    rho = (state - base)[partial]
    assert bool((rho >= 0).all())
    one = torch.ones((), dtype=torch.int64)
    assert bool((rho < (one << bits[partial])[:, None]).all())
    again = (base[partial] + rho).to(own.dtype)
    assert torch.equal(again, state[partial])


@BOTH
def test_widths_are_what_the_decay_destroys(wide: bool) -> None:
    own = arithmetic_of(wide=wide)
    decay = ladder(2000, torch.Generator().manual_seed(0), wide=wide)
    bits = own.bits(decay)
    inside = (decay > 2.0 ** (-60 if wide else -30)) & (decay < 1)
    assert bool((bits[inside] <= torch.ceil(-torch.log2(decay[inside])) + 1).all())
    assert bool((bits[decay == 1] == 0).all())
    assert bool((bits[decay < (2.0**-62 if wide else 2.0**-32)] == (62 if wide else 32)).all())
    assert own.bits(torch.tensor([0.5, 0.4, 0.3, 0.25, 2.0**-20]).double()).tolist() == [2, 2, 2, 3, 21]


def test_wide_integers_against_pythons() -> None:
    """D is within a unit of Lambda S, and its base the least integer that gives it, in exact arithmetic."""
    generator, own = torch.Generator().manual_seed(4), arithmetic_of(wide=True)
    decay = ladder(60, generator, wide=True)
    state = mantissas(decay, 3, generator, wide=True).clamp(-EXTREME[True] + 1, EXTREME[True] - 1)
    kept = _decayed(state, decay, wide=True)
    base = own.base(kept, decay[:, None])
    for row, factor in enumerate(decay.tolist()):
        whole = max(1, round(Fraction(factor) * 2**62))
        for s, d, least in zip(state[row].tolist(), kept[row].tolist(), base[row].tolist(), strict=True):
            assert abs(d - Fraction(factor) * s) < 1 + Fraction(abs(s), 2**63)
            assert (whole * least + 2**61) >> 62 >= d
            assert (whole * (least - 1) + 2**61) >> 62 < d or least <= -EXTREME[True]


def test_there_is_room_for_a_factor_whose_last_digit_is_another() -> None:
    """An exponential may differ by its last digit between two places of a vector."""
    own = arithmetic_of(wide=True)
    planned = torch.cat([2.0 ** -torch.arange(1.0, 61.0).double(), 1 / torch.arange(3.0, 99.0).double()])
    computed = torch.nextafter(planned, torch.tensor(0.0).double())
    state = mantissas(computed, 200, torch.Generator().manual_seed(5), wide=True)
    state = state.clamp(-EXTREME[True] + 1, EXTREME[True] - 1)
    rho = state - own.base(_decayed(state, computed, wide=True), computed[:, None])
    assert bool((rho < (torch.ones((), dtype=torch.int64) << own.bits(planned))[:, None]).all())
