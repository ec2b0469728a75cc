"""Parameters of one call that were computed of others of the same model: each source's gradient, counted once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.errors import StrategyError

IDS = random_tokens(20)
TIMES = "model.blocks.1.time_mix."
WAYS = [("checkpoint", 7, True), ("reversible", 12, True), ("reversible", 7, False)]
"""A strategy, the length of a chunk, and whether the model computes the loss: in two chunks, and in three."""

Make = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From a model's parameters to those of one call."""


def of_others(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """In one block, from block to block, below the blocks and above them; by operations that save tensors or do not."""
    key = own[f"{TIMES}value.weight"].t()
    return {
        f"{TIMES}key.weight": key,
        f"{TIMES}output.weight": torch.tanh(key) + own["model.blocks.0.time_mix.output.weight"],
        "model.ln_out.weight": own["model.ln0.weight"] + 0.1,
        "model.ln0.bias": 1.5 * own["model.ln_out.bias"],
        "head.weight": own["head.weight"] + own["model.delta"].tanh() * own["model.embeddings.weight"],
    }


def tied(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """One computed tensor at two places, of which another is made."""
    both = own["model.blocks.0.time_mix.value.weight"] * 0.9
    names = (f"{TIMES}key.weight", "model.blocks.0.time_mix.key.weight")
    return {**dict.fromkeys(names, both), f"{TIMES}value.weight": both.t()}


def model_of(version: str, **config: Any) -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64, **config)
    generator = torch.Generator().manual_seed(0)
    shape = model.model.embeddings.weight.shape
    delta = torch.randn(shape, generator=generator, dtype=torch.float64)
    model.model.delta = nn.Parameter(delta)
    return model


def cross_entropy(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(
    model: RwkvRevForCausalLM, make: Make, strategy: str, chunk: int, *, labels: bool, **named: Any
) -> dict[str, Tensor | None]:
    """By the model's parameters, and those that computed ones keep."""
    own = dict(model.named_parameters())
    for parameter in own.values():
        parameter.grad = None
    given = make(own)
    for tensor in given.values():
        tensor.retain_grad()
    named |= {"labels": IDS} if labels else {}
    with model.set_bptt(strategy, chunk_length=chunk):
        output = functional_call(model, given, (IDS,), named)
    (output.loss if labels else cross_entropy(output.logits)).backward()
    assert [*map(id, model.parameters())] == [*map(id, own.values())]
    kept = {f"computed {name}": tensor.grad for name, tensor in given.items()}
    return {name: tensor.grad for name, tensor in own.items()} | kept


def agree(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, gradient in expected.items():
        other = found[name]
        if gradient is None or other is None:  # a weight that was replaced and is no source of another
            assert all(g is None or not g.any() for g in (gradient, other)), name
        else:
            assert relative_error(other, gradient) <= 1e-10, name


@pytest.mark.parametrize("make", [of_others, tied])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_each_source_is_counted_once(version: str, make: Make) -> None:
    model = model_of(version)
    expected = gradients(model, make, "full", 32, labels=False)
    for strategy, chunk, labels in WAYS:
        agree(gradients(model, make, strategy, chunk, labels=labels), expected)


@pytest.mark.parametrize("strategy", ["full", "truncated"])
def test_in_one_chunk(strategy: str) -> None:
    """Whose loss makes the gradients of the output layer in the forward pass as well."""
    model = model_of("5.2")
    expected = gradients(model, of_others, "full", 32, labels=False)
    agree(gradients(model, of_others, strategy, 32, labels=True), expected)


@pytest.mark.parametrize("make", [of_others, tied])
def test_beside_declared_code(make: Make) -> None:
    """Which may bring any weight to any place: each block is differentiated by all of them."""
    model = model_of("5.2")
    model.model.blocks[0].register_forward_hook(rwkv_rev.position_wise(lambda module, given, out: out))
    expected = gradients(model, make, "full", 32, labels=False)
    for strategy, chunk, labels in WAYS:
        agree(gradients(model, make, strategy, chunk, labels=labels), expected)


def test_truncated_over_several_chunks() -> None:
    """The gradient by the weights of one call, led back to what they were computed of."""
    model = model_of("5.2")
    own = dict(model.named_parameters())
    made = of_others(own)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
    with model.set_bptt("truncated", chunk_length=8):
        functional_call(model, leaves, (IDS,), {"labels": IDS}).loss.backward()
    torch.autograd.backward([*made.values()], [tensor.grad for tensor in leaves.values()])
    expected = {name: parameter.grad for name, parameter in own.items()}
    agree(gradients(model, of_others, "truncated", 8, labels=True), expected)


@pytest.mark.parametrize("labels", [True, False])
def test_initial_states_of_documents(labels: bool) -> None:
    """What documents in a packed row begin with is a parameter, too."""
    model = model_of("5.2", has_initial_state=True)
    borders = torch.zeros_like(IDS, dtype=torch.bool)
    borders[0, [3, 13]] = True
    with torch.no_grad():
        for state in model.model.initial_wkv:
            state.normal_(generator=torch.Generator().manual_seed(1))

    def make(own: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.initial_wkv."
        return {f"{name}0": own[f"{name}1"] * 2, f"{name}1": own[f"{name}1"].tanh() + own[f"{name}0"]}

    expected = gradients(model, make, "full", 32, labels=labels, borders=borders)
    agree(gradients(model, make, "reversible", 7, labels=labels, borders=borders), expected)


def test_weights_that_a_parametrization_makes_of_others() -> None:
    """With what it makes them of computed, too."""
    model = model_of("5.2")
    mix = model.model.blocks[1].time_mix

    @rwkv_rev.position_wise
    class OfAnother(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.another = mix.value

        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.5 * self.another.weight.t()

    parametrize.register_parametrization(mix.key, "weight", OfAnother())

    def make(own: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{TIMES}key.parametrizations.weight.original": own["model.blocks.0.time_mix.value.weight"].tanh()
        }

    expected = gradients(model, make, "full", 32, labels=False)
    for strategy, chunk, labels in WAYS:
        agree(gradients(model, make, strategy, chunk, labels=labels), expected)


@pytest.mark.parametrize("operation", [Tensor.t, Tensor.tanh])
def test_a_computed_weight_that_code_of_others_holds_besides(operation: Callable[[Tensor], Tensor]) -> None:
    """It is used in every chunk: what it was made of has its gradient by both ways, or there is an error."""
    model, held = model_of("5.2"), []

    def make(own: dict[str, Tensor]) -> dict[str, Tensor]:
        held[:] = [operation(own[f"{TIMES}value.weight"])]
        return {f"{TIMES}key.weight": held[0]}

    @rwkv_rev.position_wise
    def scaled(module: Any, given: Any, out: Any) -> Any:
        return (out[0] * held[0].mean(), *out[1:])

    model.model.blocks[1].register_forward_hook(scaled)
    expected = gradients(model, make, "full", 32, labels=False)
    if operation is Tensor.tanh:  # whose graph is used up by the first gradient through it
        with pytest.raises(
            StrategyError, match=r"blocks\.1\.time_mix\.value\.weight is used in several chunks"
        ):
            gradients(model, make, "reversible", 8, labels=True)
        return
    found = gradients(model, make, "reversible", 8, labels=True)
    own = [name for name, _ in model.named_parameters()]
    agree({name: found[name] for name in own}, {name: expected[name] for name in own})
