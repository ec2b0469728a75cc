"""RWKV-6's time mix through the laws of tests/cell_laws.py, and what is particular to it."""

import math
from functools import partial

import pytest
import torch
from cell_laws import LAWS, Trial, trials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_rev.cells import ChunkMask, ReversibleCell, TimeMixRwkv6
from rwkv_rev.cells.channel_mix_rwkv6 import ChannelMixRwkv6
from rwkv_rev.cells.shifted_cell import ShiftedState
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.cells.time_mix_rwkv6 import MIXED, Ranks
from rwkv_rev.wkv import wkv6

SHARES = (-0.61, -0.3, 0.0, 1e-6, 0.03, 0.1, 0.5, 0.7, 1.0, 1.34)
BASES = (-30.0, -8.0, -3.0, 0.0, math.log(-math.log(1e-9)), 80.0)
"""Decays of 1, a slow one, 1/e, 1e-9 and 0 a step."""
PROPERTIES = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


@torch.no_grad()
def fill(cell: TimeMixRwkv6, generator: torch.Generator, dtype: torch.dtype) -> TimeMixRwkv6:
    def choice(values: tuple[float, ...], shape: torch.Size) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64)
        return table[torch.randint(len(values), shape, generator=generator)]

    for name, parameter in cell.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if name.startswith("mix_"):
            parameter.copy_(choice(SHARES, parameter.shape))
        elif name == "decay_base":
            parameter.copy_(choice(BASES, parameter.shape))
        elif name == "ln_x.weight":
            parameter.copy_(1 + 0.3 * random)
        elif name.endswith("weight") and parameter.dim() == 2:
            parameter.copy_(random / math.sqrt(parameter.shape[1]))
        else:
            parameter.copy_(0.3 * random)
    return cell.to(dtype)


@st.composite
def cells(draw: st.DrawFn) -> tuple[ReversibleCell, int]:
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 8]))
    cell = TimeMixRwkv6(heads, size, Ranks(3, 2), group_norm_epsilon=64e-5)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return fill(cell, generator, draw(DTYPES)), heads * size


def state(cell: ReversibleCell, batch: int, width: int, generator: torch.Generator) -> ShiftedState:
    assert isinstance(cell, TimeMixRwkv6)
    dtype = cell.key.weight.dtype
    shape = (batch, cell.num_heads, cell.head_size, cell.head_size)
    scales = torch.tensor([0.0, 1.0, 30.0])[
        torch.randint(3, (batch, cell.num_heads, 1, 1), generator=generator)
    ]
    memory = torch.randn(shape, generator=generator) * scales
    wide = torch.promote_types(dtype, torch.float32)
    return ShiftedState(torch.randn(batch, width, generator=generator).to(dtype), memory.to(wide))


@pytest.mark.parametrize("law", LAWS)
def test_laws(law: str) -> None:
    @PROPERTIES
    @given(trials(cells(), state))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


def some_cell(dtype: torch.dtype = torch.float32) -> TimeMixRwkv6:
    cell = TimeMixRwkv6(2, 8, Ranks(3, 2), group_norm_epsilon=64e-5)
    return fill(cell, torch.Generator().manual_seed(1), dtype)


def kept(remnant: object, after: object) -> object:
    return after.remnant([tensor.clone() for tensor in remnant.tensors(remnant.size)])  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [1, 16, 64, 100])
def test_every_state_comes_back_to_the_bit(chunk: int) -> None:
    """Over 230 tokens with an uneven tail, from a state that is not empty, one row padded on the left."""
    cell, generator = some_cell(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 230, 16, generator=generator)
    valid = torch.ones(2, 230, dtype=torch.bool)
    valid[1, :37] = False
    now, steps = cell.exact(state(cell, 2, 16, generator)), []
    for start in range(0, 230, chunk):
        piece, mask = x[:, start : start + chunk], ChunkMask.of(valid[:, start : start + chunk])
        before = cell.carried(now, piece, mask)
        now, _, remnant, _ = cell.advance(now, piece, mask)
        steps.append((before, piece, mask, remnant))
    for before, piece, mask, remnant in reversed(steps):
        with torch.no_grad():
            now = cell.retreat(now, piece, mask, kept(remnant, now)).state
        for found, expected in zip(now.tensors(), before.tensors(), strict=True):
            assert torch.equal(found, expected)


def test_the_token_before_is_carried_as_it_is() -> None:
    cell = some_cell()
    assert not cell.plan(4).mix.any()
    begin = state(cell, 2, 16, torch.Generator().manual_seed(0))
    carried = cell.carried(cell.exact(begin), torch.randn(2, 4, 16), None)
    assert torch.equal(carried.shift, begin.shift) and torch.equal(carried.carried, begin.shift)


def test_every_mix_depends_on_the_data() -> None:
    """x_i for two values of the token before: no constant share gives both."""
    cell = some_cell(torch.float64)
    now = torch.randn(1, 1, 16, dtype=torch.float64)
    for name in MIXED:
        with torch.no_grad():
            found = [cell.project(now, now + change) for change in (1.0, 2.0)]
            getattr(cell, f"{name}_mix_up").weight.zero_()
            constant = [cell.project(now, now + change) for change in (1.0, 2.0)]
        part = "log_decay" if name == "decay" else name
        assert not torch.allclose(getattr(found[0], part), getattr(constant[0], part))
        assert not torch.allclose(getattr(found[1], part), getattr(constant[1], part))


def test_extreme_decays_have_finite_gradients() -> None:
    """Where w is 0 or 1e-9 or its exponent beyond float32's."""
    cell, x = some_cell(), torch.randn(1, 70, 16)
    with torch.no_grad():
        cell.decay_base.copy_(torch.tensor([1e4, 100.0, 88.0, math.log(20.7), -200.0, -1e4, 3.0, 4.0] * 2))
    begin = state(cell, 1, 16, torch.Generator().manual_seed(0))
    out, after = cell.step(begin, x)
    (out.sum() + after.memory.sum()).backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_row_of_nothing_but_padding_keeps_its_state() -> None:
    cell = some_cell()
    begin = cell.exact(state(cell, 2, 16, torch.Generator().manual_seed(0)))
    valid = torch.tensor([[False] * 4, [True] * 4])
    after = cell.advance(begin, torch.randn(2, 4, 16), ChunkMask.of(valid)).state
    for found, expected in zip(after.tensors(), begin.tensors(), strict=True):
        assert torch.equal(found[0], expected[0])
    assert not torch.equal(after.memory.grid.mantissa[1], begin.memory.grid.mantissa[1])


def test_decays_are_wide_in_half_precision() -> None:
    cell = some_cell(torch.bfloat16)
    with torch.no_grad():
        projection = cell.project(*[torch.randn(1, 50, 16).bfloat16() * 30] * 2)
    assert projection.log_decay.dtype == torch.float32
    assert float(projection.log_decay.max()) <= 0 and projection.log_decay.isfinite().all()


def _keep(kept: list[tuple[Tensor, Tensor]], module: object, given: object, out: Tensor) -> None:
    kept.append((out, out.clone()))


def _hooked_cells() -> dict[str, tuple[ReversibleCell, list[str]]]:
    six = fill(
        TimeMixRwkv6(2, 8, Ranks(3, 2), group_norm_epsilon=64e-5),
        torch.Generator().manual_seed(0),
        torch.float32,
    )
    five = TimeMixRwkv5(2, 8, (2, 8), gated=True, bonus_is_exponential=False, group_norm_epsilon=64e-5)
    channel_mix = ChannelMixRwkv6(16, 24)
    for parameter in (*five.parameters(), *channel_mix.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return {
        "rwkv6": (six, [*(f"{name}_mix_up" for name in MIXED), "decay_up", "gate"]),
        "rwkv5": (five, ["gate"]),
        "channel mix": (channel_mix, ["key", "receptance"]),
    }


@pytest.mark.parametrize("which", ["rwkv6", "rwkv5", "channel mix"])
def test_what_a_hook_keeps_of_a_linear_layer_is_not_worked_on(which: str) -> None:
    """Without gradients a cell works in the memory of what a layer returned, where nobody else has that."""
    cell, names = _hooked_cells()[which]
    x = torch.randn(1, 7, 16)
    memory = None if which == "channel mix" else torch.randn(1, 2, 8, 8)
    start = ShiftedState(torch.randn(1, 16), memory)
    with torch.no_grad():
        alone = cell.step(start, x)[0]
    kept: list[tuple[Tensor, Tensor]] = []
    for name in names:
        getattr(cell, name).register_forward_hook(partial(_keep, kept))
    with torch.no_grad():
        hooked = cell.step(start, x)[0]
    assert len(kept) == len(names) and all(torch.equal(*pair) for pair in kept)
    assert isinstance(alone, Tensor) and isinstance(hooked, Tensor) and torch.equal(alone, hooked)
    with torch.enable_grad():
        torch.testing.assert_close(cell.step(start, x)[0].detach(), alone)


@pytest.mark.parametrize("masked", [False, True])
def test_a_state_of_zeros_has_the_bits_of_a_small_one(masked: bool) -> None:
    """What is left out where the state is zero adds nothing."""
    r, k, v, z = torch.randn(4, 2, 70, 2, 8).unbind(0)
    log_decay, bonus = -torch.exp(z), torch.randn(2, 8)
    mask = torch.rand(2, 70) > 0.3 if masked else None
    empty = torch.zeros(2, 2, 8, 8)
    tiny = empty.clone()
    tiny[0, 0, 0, 0] = 1e-30  # less than any rounding, and not zero
    found = [wkv6(r, k, v, log_decay, bonus, state, mask, kernel="chunked") for state in (empty, tiny)]
    assert all(map(torch.equal, *found))
