"""Every cell through the laws of tests/cell_laws.py, and what is particular to one cell."""

import math

import pytest
import torch
from cell_laws import LAWS, Trial, trials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_rev.cells import ChannelMix, ChunkMask, ReversibleCell, TimeMixRwkv4, TimeMixRwkv5
from rwkv_rev.cells.shifted_cell import ShiftedState
from rwkv_rev.wkv import EMPTY_EXPONENT

DECAYS = (0.0, 1e-9, 1e-4, 0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 2**-24, 1.0)
MIXES = (-3.0, -0.34, 0.0, 1e-6, 0.3, 0.5, 0.9, 15 / 16, 0.97, 0.9995, 1.0, 1.0005, 1.3, 1.61, 4.0)
GENERATIONS = {  # decay per channel, gated, bonus is an exponential
    "5.0 exponential": (False, False, True),
    "5.0": (False, False, False),
    "5.1": (False, True, False),
    "5.2": (True, True, False),
}
PROPERTIES = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
MORE = settings(PROPERTIES, max_examples=24)


@torch.no_grad()
def fill(cell: ReversibleCell, generator: torch.Generator, dtype: torch.dtype) -> ReversibleCell:
    """Random parameters with decays and mixes out of the tables; decays and bonus in float32 or wider."""

    def choice(values: tuple[float, ...], shape: torch.Size) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64)
        return table[torch.randint(len(values), shape, generator=generator)]

    for name, parameter in cell.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if name.startswith("mix_"):
            parameter.copy_(choice(MIXES, parameter.shape))
        elif name == "time_decay":  # w = 0 from a value whose exponential overflows float32
            decay = choice(DECAYS, parameter.shape)
            parameter.copy_(torch.where(decay == 0, 100.0, (-decay.log()).log()))
        elif name == "bonus":
            parameter.copy_(random)
        elif name == "ln_x.weight":
            parameter.copy_(1 + 0.1 * random)
        elif name.endswith("weight") and parameter.dim() == 2:
            parameter.copy_(random / math.sqrt(parameter.shape[1]))
        else:
            parameter.copy_(0.1 * random)
    cell.to(dtype)
    if dtype == torch.bfloat16:
        for name in ("time_decay", "bonus"):
            if hasattr(cell, name):
                getattr(cell, name).data = getattr(cell, name).float()
    return cell


DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


@st.composite
def rwkv5_cells(draw: st.DrawFn) -> tuple[ReversibleCell, int]:
    per_channel, gated, exponential = GENERATIONS[draw(st.sampled_from(tuple(GENERATIONS)))]
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 8]))
    cell = TimeMixRwkv5(
        heads,
        size,
        (heads, size) if per_channel else (heads,),
        gated=gated,
        bonus_is_exponential=exponential,
        group_norm_epsilon=64e-5,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return fill(cell, generator, draw(DTYPES)), heads * size


@st.composite
def other_cells(draw: st.DrawFn, kind: str) -> tuple[ReversibleCell, int]:
    width = draw(st.sampled_from([1, 3, 8]))
    cell = TimeMixRwkv4(width) if kind == "rwkv4" else ChannelMix(width, draw(st.sampled_from([4, 12])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return fill(cell, generator, draw(DTYPES)), width


def shift(cell: ReversibleCell, batch: int, width: int, generator: torch.Generator) -> Tensor:
    dtype = next(p for n, p in cell.named_parameters() if n.endswith("weight")).dtype
    return torch.randn(batch, width, generator=generator).to(dtype)


def rwkv5_state(cell: ReversibleCell, batch: int, width: int, generator: torch.Generator) -> ShiftedState:
    assert isinstance(cell, TimeMixRwkv5)
    shape = (batch, cell.num_heads, cell.head_size, cell.head_size)
    scales = torch.tensor([0.0, 1.0, 1e3])[
        torch.randint(3, (batch, cell.num_heads, 1, 1), generator=generator)
    ]
    wide = torch.float64 if cell.time_decay.dtype == torch.float64 else torch.float32
    shifted = shift(cell, batch, width, generator)
    return ShiftedState(shifted, (torch.randn(shape, generator=generator) * scales).to(wide))


def rwkv4_state(cell: ReversibleCell, batch: int, width: int, generator: torch.Generator) -> ShiftedState:
    assert isinstance(cell, TimeMixRwkv4)
    a, b, m = torch.randn(3, batch, width, generator=generator)
    memory = torch.stack([a, b.exp(), m], dim=1)
    memory[0] = torch.tensor([0.0, 0.0, EMPTY_EXPONENT])[:, None]  # one row has seen nothing
    wide = torch.float64 if cell.time_decay.dtype == torch.float64 else torch.float32
    return ShiftedState(shift(cell, batch, width, generator), memory.to(wide))


def shift_alone(cell: ReversibleCell, batch: int, width: int, generator: torch.Generator) -> ShiftedState:
    return ShiftedState(shift(cell, batch, width, generator), None)


@pytest.mark.parametrize("law", LAWS)
def test_time_mix_rwkv5(law: str) -> None:
    """Of all four generations."""

    @MORE
    @given(trials(rwkv5_cells(), rwkv5_state))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


@pytest.mark.parametrize("law", LAWS)
def test_time_mix_rwkv4(law: str) -> None:
    @PROPERTIES
    @given(trials(other_cells("rwkv4"), rwkv4_state))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


@pytest.mark.parametrize("law", LAWS)
def test_channel_mix(law: str) -> None:
    @PROPERTIES
    @given(trials(other_cells("channel"), shift_alone))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


@PROPERTIES
@given(trials(other_cells("channel"), shift_alone))
def test_the_shift_alone_is_that_of_the_whole_forward_pass(trial: Trial) -> None:
    state = trial.exact()
    for x, valid in trial.chunks:
        mask = None if valid is None else ChunkMask.of(valid)
        after, _, remnant, printed = trial.cell.advance(state, x, mask)
        alone, out, remnant_alone, printed_alone = trial.cell.advance(state, x, mask, output=False)
        assert torch.equal(alone.shift, after.shift)
        assert torch.equal(remnant_alone.carried, remnant.carried)
        assert out is None and torch.equal(printed_alone, printed)
        state = after
