"""Declared code while other losses of the same model are computed: inside of its own call, and in another thread."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.declared_code import StandIn

CHUNK = 8
IDS = random_tokens(20)


@position_wise
class Scaled(nn.Module):
    """A declared module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * self.inner(x)


def with_a_hook(model: RwkvRevForCausalLM, inside: Callable[[], Any]) -> None:
    @position_wise
    def steer(module: nn.Module, given: Any, output: Any) -> Any:
        inside()
        return (output[0] * 1.1, *output[1:])

    model.blocks[1].register_forward_hook(steer)


def with_a_module(model: RwkvRevForCausalLM, inside: Callable[[], Any]) -> None:
    mix = model.blocks[1].channel_mix
    mix.value = Scaled(mix.value)
    mix.value.register_forward_pre_hook(position_wise(lambda module, given: inside()))


def with_a_forward(model: RwkvRevForCausalLM, inside: Callable[[], Any]) -> None:
    norm = model.model.ln_out
    forward = norm.forward

    def instead(x: Tensor) -> Tensor:
        inside()
        return 1.1 * forward(x)

    norm.forward = position_wise(instead)  # type: ignore[method-assign]


WAYS = [with_a_hook, with_a_module, with_a_forward]
LABELS = pytest.mark.parametrize("labels", [True, False], ids=["labels", "logits"])


def gradients(model: RwkvRevForCausalLM, labels: bool) -> list[Tensor]:
    loss = model(IDS, labels=IDS).loss if labels else model(IDS).logits.square().mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def made(way: Any, strategy: str, inside: Callable[[RwkvRevForCausalLM], Any]) -> RwkvRevForCausalLM:
    model = tiny_model("5.2", dtype=torch.float64)
    model.set_bptt(strategy, chunk_length=CHUNK)
    way(model, lambda: inside(model))
    return model


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-7, atol=1e-12)


@LABELS
@pytest.mark.parametrize("way", WAYS)
def test_the_model_inside_of_its_own_declared_code(way: Any, labels: bool) -> None:
    calls: list[int] = []

    def inside(model: RwkvRevForCausalLM) -> None:
        calls.append(1)
        if calls == [1]:  # not within that call
            model(IDS, labels=IDS)

    expected = gradients(made(way, "full", lambda model: None), labels)
    for strategy in ("checkpoint", "reversible"):
        calls.clear()
        model = made(way, strategy, inside)
        assert_near(gradients(model, labels), expected)
        assert len(calls) > 3
        assert not any(isinstance(v, StandIn) for m in model.modules() for v in vars(m).values())


@LABELS
@pytest.mark.parametrize("way", WAYS)
def test_two_threads_and_one_model(way: Any, labels: bool) -> None:
    expected = gradients(made(way, "full", lambda model: None), labels)
    model = made(way, "reversible", lambda model: None)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: gradients(model, labels), range(4)):
            assert_near(found, expected)


def test_what_is_not_declared_has_its_own_name() -> None:
    """Also where the other hook is called in its place."""
    told: list[str] = []

    def inside(model: RwkvRevForCausalLM) -> None:
        if told:
            return
        told.append("")
        handle = model.blocks[0].register_forward_hook(strange)
        try:
            model(IDS, labels=IDS)
        except StrategyError as error:
            told.append(str(error))
        handle.remove()

    def strange(module: nn.Module, given: Any, output: Any) -> None:
        return None

    gradients(made(with_a_hook, "reversible", inside), True)
    assert "strange on model.blocks.0 is not known" in told[1]
