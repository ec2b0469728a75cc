"""Hooks that change an output, in both sweeps of a loss of one's own: heard in every chunk, wherever they are."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from pairwise import every_two
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise

IDS = random_tokens(20)
CHUNK = 8
AGREE = 1e-10
"""Of a gradient in float64 through states on RWKV-5's grid."""

PLACES: dict[str, Callable[[RwkvRevForCausalLM], nn.Module]] = {
    "embeddings": lambda model: model.model.embeddings,
    "first norm": lambda model: model.model.ln0,
    "lowest block": lambda model: model.blocks[0],
    "top block": lambda model: model.blocks[-1],
    "a map": lambda model: model.blocks[-1].time_mix.key,
    "final norm": lambda model: model.model.ln_out,
    "head": lambda model: model.head,
}


def changed(value: Any, gain: Tensor) -> Any:
    """The first tensor of what a module is given, or gives, times ``gain`` where it is as wide."""
    if isinstance(value, tuple):
        return (changed(value[0], gain), *value[1:])
    if value is None or not value.is_floating_point():
        return value
    return value * gain + 0.1 if value.shape[-1] == len(gain) else value * gain.mean()


def hooked(version: str, place: str, kind: str, trained: bool) -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64)
    gain = nn.Parameter(torch.linspace(0.5, 1.5, 16, dtype=torch.float64), requires_grad=trained)
    model.model.register_parameter("gain", gain)
    module = PLACES[place](model)
    if kind == "output":
        module.register_forward_hook(position_wise(lambda module, given, output: changed(output, gain)))
    else:
        module.register_forward_pre_hook(position_wise(lambda module, given: changed(given, gain)))
    return model


def outcome(model: RwkvRevForCausalLM, strategy: str) -> dict[str, Tensor]:
    """Logits, with a gradient and without, the loss of evaluation, and gradients of a loss on logits and state."""
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=CHUNK):
        output = model(IDS)
        (output.logits.log_softmax(-1)[..., 3].square().mean() + output.state.wkv.square().mean()).backward()
        with torch.no_grad():
            found = {"read": model(IDS).logits, "loss": model(IDS, labels=IDS).loss}
    found |= {"logits": output.logits.detach()}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("place", "hook", "version"),
    every_two(PLACES, product(("output", "input"), ("constant", "trained")), ("4", "5.2")),
    ids=str,
)
def test_heard_in_every_chunk(place: str, hook: tuple[str, str], version: str) -> None:
    """Every two of a place, a kind of hook and a version meet."""
    kind, trained = hook[0], hook[1] == "trained"
    model = hooked(version, place, kind, trained)
    expected = outcome(model, "full")
    assert ("model.gain" in expected) == (trained and (kind, place) != ("input", "embeddings"))
    for strategy in ("reversible", "checkpoint"):
        found = outcome(model, strategy)
        assert found.keys() == expected.keys()
        for name, truth in expected.items():
            assert relative_error(found[name], truth) <= AGREE, (strategy, name)
    assert relative_error(expected["read"], expected["logits"]) <= 1e-12


def detached(value: Any) -> Any:
    return (value[0].detach(), *value[1:]) if isinstance(value, tuple) else value.detach()


@pytest.mark.parametrize(
    ("place", "strategy", "own"),
    every_two([place for place in PLACES if place != "head"], ["reversible", "checkpoint"], [True, False]),
)
def test_what_a_hook_detaches_gets_no_gradient(place: str, strategy: str, own: bool) -> None:
    """With the model's own loss, or another: every two of a place, a strategy and a loss meet."""
    model = tiny_model("5.2", dtype=torch.float64)
    hook = position_wise(lambda module, given, output: detached(output))
    PLACES[place](model).register_forward_hook(hook)
    found = []
    for name in ("full", strategy):
        model.zero_grad()
        with model.set_bptt(name, chunk_length=CHUNK):
            loss = model(IDS, labels=IDS).loss if own else model(IDS).logits.log_softmax(-1)[..., 3].mean()
        loss.backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    assert any(gradient.any() for gradient in found[0])
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) <= AGREE
