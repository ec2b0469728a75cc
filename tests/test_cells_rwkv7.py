"""RWKV-7's cells through the laws of tests/cell_laws.py, and what is particular to them."""

import math

import pytest
import torch
from cell_laws import LAWS, Trial, trials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_rev.cells import ChannelMixRwkv7, ChunkMask, ReversibleCell, TimeMixRwkv7
from rwkv_rev.cells.shifted_cell import ShiftedState
from rwkv_rev.cells.time_mix_rwkv7 import FASTEST_DECAY, Ranks, TimeProjection

SHARES = (-0.61, -0.3, 0.0, 1e-6, 0.03, 0.1, 0.5, 0.7, 1.0, 1.34)
EXTREMES = (-100.0, -8.0, -1.0, 0.0, 2.0, 100.0)
"""Of what a sigmoid is taken of: decays of nothing and of 0.545, rates of 0 and 1."""
PROPERTIES = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


class Alone(TimeMixRwkv7):
    """A time mix without a stream beside the residual: above layer 0 it reads ``v_first`` of its own input."""

    reads_beside = False

    def project(self, *mixed: Tensor) -> TimeProjection:
        return super().project(*mixed, *(() if self.makes_first else (mixed[0].tanh(),)))

    def handed_up(self, projection: TimeProjection) -> tuple[Tensor, ...]:
        return ()


@torch.no_grad()
def fill(cell: ReversibleCell, generator: torch.Generator, dtype: torch.dtype) -> ReversibleCell:
    def choice(values: tuple[float, ...], shape: torch.Size) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64)
        return table[torch.randint(len(values), shape, generator=generator)]

    for name, parameter in cell.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if name.startswith("mix_"):
            parameter.copy_(choice(SHARES, parameter.shape))
        elif name.endswith("_base"):
            parameter.copy_(choice(EXTREMES, parameter.shape))
        elif name in ("ln_x.weight", "rate_scale", "removal_scale"):
            parameter.copy_(1 + 0.3 * random)
        elif name.endswith("weight") and parameter.dim() == 2:
            parameter.copy_(random / math.sqrt(parameter.shape[1]))
        else:
            parameter.copy_(0.3 * random)
    return cell.to(dtype)


@st.composite
def time_mixes(draw: st.DrawFn, residual: int | None) -> tuple[ReversibleCell, int]:
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 8]))
    cell = Alone(heads, size, Ranks(3, 2, 4, residual), group_norm_epsilon=64e-5)
    cell.lift(draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return fill(cell, generator, draw(DTYPES)), heads * size


@st.composite
def channel_mixes(draw: st.DrawFn) -> tuple[ReversibleCell, int]:
    width = draw(st.sampled_from([1, 3, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cell = ChannelMixRwkv7(width, draw(st.sampled_from([4, 12])))
    return fill(cell, generator, draw(DTYPES)), width


def state(cell: ReversibleCell, batch: int, width: int, generator: torch.Generator) -> ShiftedState:
    dtype = next(cell.parameters()).dtype
    shifted = torch.randn(batch, width, generator=generator).to(dtype)
    if not isinstance(cell, TimeMixRwkv7):
        return ShiftedState(shifted, None)
    shape = (batch, cell.num_heads, cell.head_size, cell.head_size)
    scales = torch.tensor([0.0, 1.0, 30.0])[
        torch.randint(3, (batch, cell.num_heads, 1, 1), generator=generator)
    ]
    memory = torch.randn(shape, generator=generator) * scales
    return ShiftedState(shifted, memory.to(torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("residual", [None, 3], ids=["layer-0", "above"])
def test_time_mix(residual: int | None, law: str) -> None:
    @PROPERTIES
    @given(trials(time_mixes(residual), state))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


@pytest.mark.parametrize("law", LAWS)
def test_channel_mix(law: str) -> None:
    @PROPERTIES
    @given(trials(channel_mixes(), state))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


def some_cell(residual: int | None = None, dtype: torch.dtype = torch.float64) -> TimeMixRwkv7:
    cell = TimeMixRwkv7(2, 8, Ranks(3, 2, 4, residual), group_norm_epsilon=64e-5)
    fill(cell, torch.Generator().manual_seed(1), dtype)
    return cell


def test_layer_0_hands_its_values_up_and_the_others_read_them() -> None:
    first, above = some_cell(), some_cell(3)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    begin = state(first, 2, 16, torch.Generator().manual_seed(0))
    begin = ShiftedState(begin.shift.double(), begin.memory.double())
    (_, handed), _ = first.step(begin, x)
    before = torch.cat([begin.shift[:, None], x[:, :-1]], 1)
    values = first.value(x + (before - x) * first.mix_before_value)
    torch.testing.assert_close(handed, values, rtol=1e-12, atol=1e-12)
    out, _ = above.step(begin, (x, handed))
    other, _ = above.step(begin, (x, handed + 1))
    assert isinstance(out, Tensor) and not torch.allclose(out, other)
    with torch.no_grad():
        above.residual_base.fill_(-1e4)
        above.residual_up.weight.zero_()
    same = [above.step(begin, (x, given))[0] for given in (handed, handed + 1)]
    assert torch.equal(*same)


def test_a_mix_is_what_is_stored() -> None:
    """c is the share of the token before, and the parameter holds it as the file does."""
    cell = some_cell()
    for mix, share in zip(cell.mixes(), cell.shares_before(), strict=True):
        assert torch.equal(mix, 1 - share)
    cell.check_plan(cell.plan(4))  # which is made of parameters, not of what is computed at each look


def test_the_bounds_of_what_the_kernel_is_told() -> None:
    cell = some_cell(dtype=torch.bfloat16)
    with torch.no_grad():
        projection = cell.project(*[torch.randn(1, 50, 16).bfloat16() * 30] * 6)
    assert projection.log_decay.dtype == projection.removal.dtype == torch.float32
    assert (
        float(projection.log_decay.min()) >= -FASTEST_DECAY - 1e-7 and float(projection.log_decay.max()) <= 0
    )
    assert float(projection.rate.min()) >= 0 and float(projection.rate.max()) <= 1
    torch.testing.assert_close(projection.removal.norm(dim=-1), torch.ones(1, 50, 2))


def test_a_row_of_nothing_but_padding_keeps_its_state() -> None:
    cell = Alone(2, 8, Ranks(3, 2, 4), group_norm_epsilon=64e-5)
    fill(cell, torch.Generator().manual_seed(1), torch.float32)
    begin = state(cell, 2, 16, torch.Generator().manual_seed(0))
    begin = ShiftedState(begin.shift, begin.memory.masked_fill(begin.memory < 0, -0.0))
    valid = torch.tensor([[False] * 4, [True] * 4])
    after = cell.advance(cell.exact(begin), torch.randn(2, 4, 16), ChunkMask.of(valid)).state
    assert torch.equal(after.memory.state[0].view(torch.int32), begin.memory[0].view(torch.int32))
