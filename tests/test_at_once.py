"""What all layers compute of themselves at once has the bits of what each computes by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.cells.at_once import of_all
from rwkv_rev.cells.block import Block
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.reversal import fixed_point
from rwkv_rev.reversal.fixed_point import FixedPoint

VERSIONS = ["4", "5.2", "6", "7"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_of_trained_layers(bundled: dict[str, Path], version: str, dtype: torch.dtype) -> None:
    model = RwkvRevForCausalLM.from_pretrained(bundled[version]).to(dtype)
    for length in (1, 100, 4096):
        together = of_all(model.blocks, "plan", length)
        for plans, block in zip(together, model.blocks, strict=True):
            for plan, alone in zip(plans, block.plan(length), strict=True):
                assert plan.sources == alone.sources
                assert_same(plan.tensors(), alone.tensors())
                if hasattr(plan.memory, "reversal"):
                    assert torch.equal(plan.memory.reversal.widths(), alone.memory.reversal.widths())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("lifts", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-30, 3.0, float("nan")])
def test_exact_states(bundled: dict[str, Path], version: str, lifts: bool, size: float) -> None:
    model = RwkvRevForCausalLM.from_pretrained(bundled[version])
    generator = torch.Generator().manual_seed(0)
    state = model.initial_state(3).each(
        lambda t: size * torch.randn(t.shape, generator=generator).to(t.dtype)
    )
    values = [state.layer(index) for index in range(len(model.blocks))]
    for block in model.blocks:
        block.lift(lifts)
    together = of_all(model.blocks, "exact", own=values)
    for states, block, own in zip(together, model.blocks, values, strict=True):
        for exact, alone in zip(states, block.exact(own), strict=True):
            assert type(exact.memory) is type(alone.memory)
            assert_same(exact.tensors(), alone.tensors())
            assert_same(exact.computed(), alone.computed())


def test_states_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(2, 3, 8, 8) for _ in range(5)]
    monkeypatch.setattr(fixed_point, "AT_ONCE", 2 * values[0].numel())
    for found, value in zip(FixedPoint.of_each(values), values, strict=True):
        assert_same(found.computed(), FixedPoint.of(value).computed())


class Own(TimeMixRwkv5):
    """A cell of somebody else's with one method for a single layer."""

    def log_decay(self) -> Tensor:
        return super().log_decay() / 2


class OwnPlan(TimeMixRwkv5):
    def memory_plan(self, length: int, piece: int | None = None) -> Any:
        return super().memory_plan(2 * length, piece)


@pytest.mark.parametrize("kind", [Own, OwnPlan])
def test_methods_of_others_are_heard(bundled: dict[str, Path], kind: type) -> None:
    model = RwkvRevForCausalLM.from_pretrained(bundled["5.2"])
    for block in model.blocks:
        block.time_mix.__class__ = kind
    together = of_all(model.blocks, "plan", 64)
    for plans, block in zip(together, model.blocks, strict=True):
        assert_same(plans[0].tensors(), block.plan(64)[0].tensors())


def test_a_method_on_one_layer_is_heard(bundled: dict[str, Path]) -> None:
    model = RwkvRevForCausalLM.from_pretrained(bundled["5.2"])
    cell = model.blocks[1].time_mix
    cell.log_decay = lambda: torch.full((cell.num_heads, cell.head_size), -0.25)
    together = of_all(model.blocks, "plan", 64)
    assert (together[1][0].memory.reversal.log_decay == -0.25).all()
    block: Block = model.blocks[0]
    block.plan = lambda length: ("mine", length)
    assert of_all(model.blocks, "plan", 64)[0] == ("mine", 64)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
