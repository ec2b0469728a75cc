"""Declared hooks that write to what a module is handed, or to what it gives."""

from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, checkpoint_blocks, differentiate, random_tokens, tiny_model
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import ReversalMismatchError

CHUNK = 8
IDS = random_tokens(20, batch=2)
EXACT = ("checkpoint", "reversible")
AGREE = 1e-10
"""In float64."""

PLACES = (
    "model.blocks.0",
    "model.blocks.1",
    "model.blocks.0.ln1",
    "model.blocks.1.ln1",
    "model.blocks.1.ln2",
    "model.blocks.1.time_mix",
    "model.blocks.1.channel_mix.value",
    "model.ln_out",
    "head",
)


@position_wise
def larger_input(module: nn.Module, given: Any) -> None:
    _first(given).mul_(1.1)


@position_wise
def larger_output(module: nn.Module, given: Any, output: Any) -> None:
    _first(output).mul_(1.1)


def _first(tensors: Any) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else _first(tensors[0])


def model_with_a_hook(place: str, at: str, version: str = "7") -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64)
    module = model.get_submodule(place)
    if at == "input":
        module.register_forward_pre_hook(larger_input)
    else:
        module.register_forward_hook(larger_output)
    return model


@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("place", PLACES)
def test_gradient(place: str, at: str) -> None:
    model = model_with_a_hook(place, at)
    full = differentiate(model, "full", input_ids=IDS)
    for strategy in EXACT:
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)


def assert_a_loss_of_ones_own_agrees(model: RwkvRevForCausalLM) -> None:
    found = []
    for strategy in ("full", *EXACT):
        model.set_bptt(strategy, chunk_length=CHUNK)
        found.append(torch.autograd.grad(model(IDS).logits.square().sum(), list(model.parameters())))
    for one in found[1:]:
        for gradient, expected in zip(one, found[0], strict=True):
            assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("place", PLACES)
def test_a_loss_of_ones_own(place: str, at: str) -> None:
    model = model_with_a_hook(place, at, version="5.2")
    assert_a_loss_of_ones_own_agrees(model)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("place", ["model.ln0", "model.blocks.0"])
def test_embeddings_that_are_handed_over_stay_as_they_are(place: str, trained: bool) -> None:
    """Both sweeps read them."""
    model = model_with_a_hook(place, "input")
    embeds = model.get_input_embeddings()(IDS).detach()
    outcomes = []
    for strategy in ("full", *EXACT):
        given = embeds.clone().requires_grad_(trained)
        handed_over = given * 1 if trained or strategy == "full" else given  # to a leaf no graph can write
        outcomes.append(differentiate(model, strategy, CHUNK, inputs_embeds=handed_over, labels=IDS))
        if trained:
            assert given.grad is not None
            outcomes[-1].gradients["embeds"] = given.grad
        assert torch.equal(given, embeds)
    for outcome in outcomes[1:]:
        assert_agree(outcome, outcomes[0], AGREE)


@pytest.mark.parametrize("strategy", EXACT)
def test_blocks_that_are_computed_again_are_refused(strategy: str) -> None:
    """PyTorch's checkpointing hands a layer the input that a hook has written to; the numbers differ."""
    model = model_with_a_hook("model.blocks.1.ln1", "input")
    checkpoint_blocks(model)
    with pytest.raises(ReversalMismatchError):
        differentiate(model, strategy, CHUNK, input_ids=IDS)


# --- known layers that write ------------------------------------------------------------------------------------------


def wrapped(model: RwkvRevForCausalLM, place: str, layer: nn.Module) -> None:
    holder, _, name = place.rpartition(".")
    setattr(model.get_submodule(holder), name, nn.Sequential(layer, model.get_submodule(place)))


@pytest.mark.parametrize("length", [2 * CHUNK, 20])
@pytest.mark.parametrize("place", ["model.ln0", "model.blocks.1.ln1", "model.ln_out", "head"])
def test_known_layers_that_write(place: str, length: int) -> None:
    model, ids = tiny_model("5.2", dtype=torch.float64), IDS[:, :length]
    wrapped(model, place, nn.ELU(inplace=True))
    full = differentiate(model, "full", input_ids=ids)
    for strategy in EXACT:
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=ids), full, AGREE)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        of_logits = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        for loss in (of_logits, model(ids, labels=ids).loss):
            torch.testing.assert_close(loss, full.loss, rtol=1e-7, atol=0)


@pytest.mark.parametrize("place", ["model.blocks.0.ln2", "model.ln_out", "head"])
def test_known_layers_that_write_and_a_loss_of_ones_own(place: str) -> None:
    model = tiny_model("4", dtype=torch.float64)
    wrapped(model, place, nn.ReLU(inplace=True))
    assert_a_loss_of_ones_own_agrees(model)


@pytest.mark.parametrize("strategy", EXACT)
def test_embeddings_before_a_layer_that_writes(strategy: str) -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    wrapped(model, "model.ln0", nn.ELU(inplace=True))
    embeds = model.get_input_embeddings()(IDS).detach()
    full = differentiate(model, "full", inputs_embeds=embeds.clone(), labels=IDS)
    given = embeds.clone()
    assert_agree(differentiate(model, strategy, CHUNK, inputs_embeds=given, labels=IDS), full, AGREE)
    assert torch.equal(given, embeds)


@pytest.mark.parametrize("version", ["4", "7"])
@pytest.mark.parametrize("name", ["ln0", "ln_out"])
def test_a_model_without_a_norm(name: str, version: str) -> None:
    model = tiny_model(version, dtype=torch.float64)
    setattr(model.model, name, nn.Identity())
    full = differentiate(model, "full", input_ids=IDS)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    for strategy in ("full", *EXACT):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
        given = differentiate(model, strategy, CHUNK, inputs_embeds=embeds, labels=IDS)
        assert abs(float(given.loss - full.loss)) < AGREE and embeds.grad is not None
    with torch.no_grad():
        assert abs(float(model(IDS, labels=IDS).loss - full.loss)) < 1e-8
