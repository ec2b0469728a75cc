"""Decays that depend on the data: states back to the bit, remnants within what the decays destroy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decay_arithmetic import BOTH
from torch import Tensor

from rwkv_rev.reversal.data_decay import DataRemnant, KeptRemnant, advance, retreat
from rwkv_rev.reversal.fixed_point import FixedPoint


def kept(remnant: DataRemnant, known: bool) -> KeptRemnant:
    """As a tape gives it back: sizes on the host, or none where they may not be waited for."""
    return KeptRemnant.of([tensor.clone() for tensor in remnant.tensors(remnant.size if known else None)])


def same(one: FixedPoint, other: FixedPoint) -> bool:
    return torch.equal(one.mantissa, other.mantissa) and torch.equal(one.exponent, other.exponent)


def decays(shape: tuple[int, ...], generator: torch.Generator, most: int) -> Tensor:
    """From ``2**-most`` to 1, with rows of exactly 0 and 1."""
    found = 2.0 ** (-most * torch.rand(shape, generator=generator, dtype=torch.float64) ** 3)
    kind = torch.randint(0, 8, shape, generator=generator)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, found))


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 4, 17]),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.booleans(),
)
def test_states_come_back(seed: int, batch: int, heads: int, size: int, scale: float, wide: bool) -> None:
    """Over five chunks, with a spike that lifts the grid of one head, and a row whose tokens are all masked."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, size, size)
    state = FixedPoint.of(torch.randn(shape, generator=generator), wide=wide)
    states, steps = [state], []
    for chunk in range(5):
        decay = decays(shape[:3], generator, 70 if wide else 40)
        contribution = scale * torch.randn(shape, generator=generator)
        if chunk == 2:
            contribution[0, 0] *= 1e6
        if chunk == 3:
            decay[0], contribution[0] = 1.0, 0.0
        state, remnant = advance(state, contribution, decay)
        states.append(state)
        steps.append((contribution, decay, remnant))
    for known in (True, False):
        back = states[-1]
        for before, (contribution, decay, remnant) in zip(states[-2::-1], steps[::-1], strict=True):
            back = retreat(back, contribution, decay, kept(remnant, known))
            assert same(back, before)


@BOTH
def test_values_are_those_of_a_float64_scan(wide: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    state = FixedPoint.of(exact, wide=wide)
    for _ in range(20):
        decay = 2.0 ** (-3 * torch.rand(2, 3, 8, generator=generator, dtype=torch.float64))
        contribution = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        exact = decay[..., None] * exact + contribution
        state, _ = advance(state, contribution, decay)
    assert float((state.value(torch.float64) - exact).abs().max() / exact.abs().max()) <= (
        2.0**-51 if wide else 2.0**-24
    )


@BOTH
def test_remnants_hold_what_the_decays_destroy(wide: bool) -> None:
    """Their log2(1/Lambda) bits per element, at most one more, and a byte for the width of each row."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, 4, 16, 16)
    most = 50 if wide else 20
    decay = 2.0 ** (-most * torch.rand(shape[:3], generator=generator, dtype=torch.float64))
    state = FixedPoint.of(torch.randn(shape, generator=generator), wide=wide)
    _, remnant = advance(state, torch.randn(shape, generator=generator), decay)
    packed, widths = remnant.tensors(remnant.size)
    theory = float(-torch.log2(decay).sum()) * shape[-1]
    elements = state.mantissa.numel()
    assert theory <= 8 * packed.numel() <= theory + elements + 64
    assert widths.numel() == decay.numel() and widths.dtype == torch.uint8


@BOTH
@pytest.mark.parametrize("changed", ["decay", "contribution", "remnant"])
def test_another_bit_gives_another_state(changed: str, wide: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 2, 4, 4)
    state = FixedPoint.of(torch.randn(shape, generator=generator), wide=wide)
    decay = torch.full(shape[:3], 2.0**-5, dtype=torch.float64)
    contribution = torch.randn(shape, generator=generator)
    after, remnant = advance(state, contribution, decay)
    parts = remnant.tensors(remnant.size)
    if changed == "remnant":
        parts[0] = parts[0].clone()
        parts[0][3] ^= 1
    elif changed == "decay":
        decay = decay * 0.99
    else:
        contribution = contribution * 1.01
    assert not same(retreat(after, contribution, decay, KeptRemnant.of(parts)), state)
