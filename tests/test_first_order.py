"""Second derivatives and functional transforms: refused by name, never half done."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from torch import Tensor
from torch.func import functional_call

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.errors import StrategyError
from rwkv_rev.wkv import use_kernel

CHUNK = 8
STRATEGIES = ("auto", "full", "checkpoint", "reversible", "truncated")
IDS = random_tokens(20)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_double_backward_is_refused(version: str, strategy: str) -> None:
    model = tiny_model(version)
    factor = torch.tensor(2.0, requires_grad=True)
    for scale in (1.0, factor):
        with model.set_bptt(strategy, chunk_length=CHUNK):
            loss = model(IDS, labels=IDS).loss
        with pytest.raises(StrategyError, match=r"second derivatives \(create_graph=True\).*naive"):
            torch.autograd.grad(scale * loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("trainable", ["time_mix.key", "time_mix.value", "channel_mix.key", "embeddings"])
@pytest.mark.parametrize("version", ["4", "5.0", "5.2"])
def test_double_backward_through_logits_is_refused(version: str, trainable: str) -> None:
    """Whatever is frozen: where the incoming gradient has no graph, PyTorch itself would not notice."""
    model = tiny_model(version)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(StrategyError, match="second derivatives"):
        torch.autograd.grad(model(IDS).logits.logsumexp(-1).sum(), wanted, create_graph=True)


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_the_advice_works(version: str) -> None:
    """The naive kernel, ``full`` and a loss on logits: a Hessian-vector product, against differences of gradients."""
    model = tiny_model(version, dtype=torch.float64)
    weight = model.blocks[0].time_mix.key.weight
    toward = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(create_graph: bool = False) -> Tensor:
        logits = model(IDS).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, IDS[0, 1:])
        return torch.autograd.grad(loss, weight, create_graph=create_graph)[0]

    with use_kernel("naive"), model.set_bptt("full", chunk_length=CHUNK):
        (product,) = torch.autograd.grad((gradient(create_graph=True) * toward).sum(), weight)
        step, kept = 1e-5, weight.detach().clone()
        with torch.no_grad():
            weight.copy_(kept + step * toward)
        above = gradient()
        with torch.no_grad():
            weight.copy_(kept - step * toward)
        below = gradient()
    torch.testing.assert_close(product, (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


def functional(model: RwkvRevForCausalLM) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: functional_call(model, parameters, (IDS,), {"labels": IDS}).loss


TRANSFORMS: dict[str, Callable[[Callable, dict[str, Tensor]], Any]] = {
    "grad": lambda f, p: torch.func.grad(f)(p),
    "vjp": lambda f, p: torch.func.vjp(f, p),
    "jvp": lambda f, p: torch.func.jvp(f, (p,), (p,)),
    "jacrev": lambda f, p: torch.func.jacrev(f)(p),
    "jacfwd": lambda f, p: torch.func.jacfwd(f)(p),
    "vmap": lambda f, p: torch.func.vmap(f)({name: torch.stack([t, t]) for name, t in p.items()}),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_transforms_are_refused(name: str, strategy: str) -> None:
    model = tiny_model("5.2")
    parameters = {key: tensor.detach() for key, tensor in model.named_parameters()}
    with model.set_bptt(strategy, chunk_length=CHUNK), pytest.raises(StrategyError, match=r"torch\.func"):
        TRANSFORMS[name](functional(model), parameters)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_mode_is_refused(strategy: str) -> None:
    model = tiny_model("5.2")
    with torch.autograd.forward_ad.dual_level(), model.set_bptt(strategy, chunk_length=CHUNK):
        tangents = {
            name: torch.autograd.forward_ad.make_dual(tensor.detach(), torch.ones_like(tensor))
            for name, tensor in model.named_parameters()
        }
        with pytest.raises(StrategyError, match="forward-mode"):
            functional(model)(tangents)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_functional_call_alone_is_ordinary(strategy: str) -> None:
    """Other parameters for one call: they get the gradient."""
    model = tiny_model("5.2", dtype=torch.float64)
    given = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    with model.set_bptt(strategy, chunk_length=32):
        found = torch.autograd.grad(functional(model)(given), list(given.values()))
        expected = torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["auto", "full", "checkpoint", "reversible"])
def test_computed_parameters_get_their_gradient(strategy: str) -> None:
    """Parameters that are no leaves: one step of an inner loop, differentiated by its learning rate."""
    model = tiny_model("5.2", dtype=torch.float64)
    with model.set_bptt(strategy, chunk_length=8):
        parameters = dict(model.named_parameters())
        inner = torch.autograd.grad(model(IDS, labels=IDS).loss, list(parameters.values()))

        def after_a_step(rate: Tensor) -> Tensor:
            stepped = {n: p.detach() - rate * g for (n, p), g in zip(parameters.items(), inner, strict=True)}
            return functional(model)(stepped)

        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(after_a_step(rate), rate)
        with torch.no_grad():
            expected = (after_a_step(rate + 1e-5) - after_a_step(rate - 1e-5)) / 2e-5
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", ["inputs_embeds", "state"])
def test_forward_mode_over_inputs_is_refused(place: str, strategy: str) -> None:
    model = tiny_model("5.2")
    inputs = {"inputs_embeds": model.get_input_embeddings()(IDS).detach(), "state": model.initial_state(1)}
    with torch.autograd.forward_ad.dual_level(), model.set_bptt(strategy, chunk_length=CHUNK):
        if place == "state":
            wkv = torch.autograd.forward_ad.make_dual(
                inputs["state"].wkv, torch.ones_like(inputs["state"].wkv)
            )
            inputs["state"] = replace(inputs["state"], wkv=wkv)
        else:
            inputs[place] = torch.autograd.forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
        with pytest.raises(StrategyError, match="forward-mode"):
            model(**inputs, labels=IDS)


@pytest.mark.parametrize("of", ["loss", "hidden states", "logits"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_several_gradients_at_once_are_refused(version: str, strategy: str, of: str) -> None:
    """In one line, wherever they arrive first; one after another are what a loop gives."""
    model = tiny_model(version)
    with model.set_bptt(strategy, chunk_length=CHUNK):
        if of == "loss":
            output = model(IDS, labels=IDS).loss
        else:
            output = model.model(IDS).last_hidden_state if of == "hidden states" else model(IDS).logits
    with pytest.raises(StrategyError, match=r"is_grads_batched=True\) are not available") as error:
        wanted = list(model.model.parameters())
        torch.autograd.grad(output, wanted, torch.ones(3, *output.shape), is_grads_batched=True)
    assert "\n" not in str(error.value)
