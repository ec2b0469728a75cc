"""Parameters that a loss does not depend on: None for a gradient in every strategy, as in one graph."""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from test_between_layers import assert_same, first, outcome, with_first
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise

LENGTH = 24
IDS = random_tokens(LENGTH)
STRATEGIES = ("checkpoint", "reversible")
BLOCK = "model.blocks.1"


def three_layers(version: str = "5.2") -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64, num_hidden_layers=3)


# --- a layer's output is left out ---------------------------------------------------------------------------------


@position_wise
def zeros(module: nn.Module, given: Any, output: Any) -> Any:
    return with_first(output, torch.zeros_like(first(output)))


@position_wise
def detached(module: nn.Module, given: Any, output: Any) -> Any:
    return with_first(output, first(output).detach())


def without(hook: Any, version: str = "5.2") -> RwkvRevForCausalLM:
    model = three_layers(version)
    model.get_submodule(BLOCK).register_forward_hook(hook)
    return model


@pytest.mark.parametrize(("chunks", "version"), [(1, "6"), (2, "4"), (3, "5.2"), (4, "7")])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("hook", [zeros, detached])
def test_below_an_output_that_is_left_out(hook: Any, own: bool, chunks: int, version: str) -> None:
    expected = outcome(without(hook, version), "full", own, LENGTH)
    names = [name for name, gradient in expected.items() if gradient is None]
    assert version == "7" or {name.split(".")[1] for name in names} == {"embeddings", "ln0", "blocks"}
    for strategy in STRATEGIES:
        assert_same(outcome(without(hook, version), strategy, own, LENGTH // chunks), expected)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("hook", [zeros, None])
@pytest.mark.parametrize("strategy", ["full", *STRATEGIES])
def test_embeddings_that_are_handed_over(strategy: str, hook: Any, own: bool) -> None:
    embeds = torch.randn(1, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    outcome(three_layers() if hook is None else without(hook), strategy, own, 8, embeds)
    assert (embeds.grad is None) == (hook is zeros)


@pytest.mark.parametrize("hook", [zeros, None])
@pytest.mark.parametrize("strategy", ["full", *STRATEGIES])
def test_embeddings_of_documents(strategy: str, hook: Any) -> None:
    """Packed into one row; some are computed at once."""
    embeds = torch.randn(1, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    model = three_layers() if hook is None else without(hook)
    positions = torch.cat([torch.arange(length) for length in (5, 9, 6, 4)])[None]
    with model.set_bptt(strategy, chunk_length=10):
        model(inputs_embeds=embeds, labels=IDS, position_ids=positions).loss.backward()
    assert (embeds.grad is None) == (hook is zeros)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_half_precision(strategy: str) -> None:
    """Where gradients are taken with a loss scale."""
    expected = outcome(without(zeros).half(), "full", True, LENGTH)
    found = outcome(without(zeros).half(), strategy, True, 8)
    unused = {name for name, gradient in expected.items() if gradient is None}
    assert unused and {name for name, gradient in found.items() if gradient is None} == unused


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weight_decay_leaves_them_alone(strategy: str) -> None:
    """AdamW moves by its decay what has a gradient of zero."""
    model = without(zeros)
    before = model.model.ln0.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    outcome(model, strategy, True, 8)
    optimizer.step()
    assert torch.equal(model.model.ln0.weight, before)


# --- gradients are turned off for a part --------------------------------------------------------------------------


def turned_off(way: str, start: str, stop: str, version: str = "5.2") -> RwkvRevForCausalLM:
    """By hooks, before one module until behind another."""
    model = three_layers(version)
    entered: list[Any] = []

    @position_wise
    def off(module: nn.Module, given: Any) -> None:
        if way == "no_grad":
            entered.append(torch.no_grad())
            entered[-1].__enter__()
        else:
            torch.set_grad_enabled(False)

    @position_wise
    def on(module: nn.Module, given: Any, output: Any) -> None:
        if way == "no_grad":
            entered.pop().__exit__(None, None, None)
        else:
            torch.set_grad_enabled(True)

    model.get_submodule(start).register_forward_pre_hook(off)
    model.get_submodule(stop).register_forward_hook(on)
    return model


OFF = [
    (f"{BLOCK}.channel_mix.value", f"{BLOCK}.channel_mix.value"),
    (f"{BLOCK}.ln1", f"{BLOCK}.time_mix"),
    (BLOCK, BLOCK),
    ("model.ln_out", "model.ln_out"),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("chunks", "version", "way"),
    [(1, "5.2", "no_grad"), (2, "4", "no_grad"), (3, "6", "set_grad_enabled"), (2, "7", "no_grad")],
)
@pytest.mark.parametrize(("start", "stop"), OFF)
def test_of_a_part_that_is_turned_off(
    start: str, stop: str, way: str, chunks: int, version: str, own: bool
) -> None:
    expected = outcome(turned_off(way, start, stop, version), "full", own, LENGTH)
    assert any(gradient is None for gradient in expected.values())
    assert any(gradient is not None for gradient in expected.values())
    for strategy in STRATEGIES:
        model = turned_off(way, start, stop, version)
        assert_same(outcome(model, strategy, own, LENGTH // chunks), expected)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_kept_of_such_a_part_has_no_gradient(strategy: str, own: bool) -> None:
    """A tensor of weights that is made once there, and read where gradients are on."""

    def made() -> RwkvRevForCausalLM:
        model = turned_off("no_grad", f"{BLOCK}.ln1", f"{BLOCK}.time_mix")
        model.model.gain = nn.Parameter(torch.full((16,), 0.3, dtype=torch.float64))
        kept: list[Tensor] = []

        @position_wise
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            if not kept:
                kept.append(model.model.gain.tanh())

        @position_wise
        def scale(module: nn.Module, given: Any, output: Any) -> Any:
            return output * kept[0]

        model.get_submodule(f"{BLOCK}.time_mix.key").register_forward_hook(keep)
        model.get_submodule(f"{BLOCK}.channel_mix.value").register_forward_hook(scale)
        return model

    expected = outcome(made(), "full", own, LENGTH)
    assert expected["model.gain"] is None
    assert_same(outcome(made(), strategy, own, 8), expected)
