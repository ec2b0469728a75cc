"""Given states: whatever is computed, those that are no state of such a model are refused alike, by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens
from test_linear_attention import filled

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from rwkv_rev.architectures.registry import ARCHITECTURES, architecture
from rwkv_rev.cache import RwkvRevCache

WIDTH, LENGTH = 16, 12


def model_of(version: str, **config: Any) -> RwkvRevForCausalLM:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 32} | config
    known = architecture(version)
    return filled(
        RwkvRevForCausalLM(RwkvRevConfig(rwkv_version=version, **(known.sizes(sizes["hidden_size"]) | sizes)))
    )


def refused(model: RwkvRevForCausalLM, state: Any, message: str) -> None:
    """Whether read, differentiated or generated from."""
    ids = random_tokens(LENGTH, batch=2)
    for given in (
        {"state": state},
        {"labels": ids, "state": state},
        {"past_key_values": RwkvRevCache(state)},
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **given)
    with pytest.raises(ValueError, match=message):
        model.model(ids, state=state)
    with pytest.raises(ValueError, match=message.replace("the state", "final_state_gradient")):
        model(ids, labels=ids, final_state_gradient=state)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, state=state, max_new_tokens=2)


@pytest.mark.parametrize("version", ARCHITECTURES)
def test_other_shapes(version: str) -> None:
    model = model_of(version)
    state = model.initial_state(2)
    for name, tensor in zip(state.names(), state.tensors(), strict=True):
        for dim in range(2, tensor.dim()):  # what broadcasts, too
            if tensor.shape[dim] > 1:
                given = replace(state, **{name: tensor.narrow(dim, 0, 1)})
                refused(model, given, rf"{name} of the state has shape .* it is of a model of other sizes")
        refused(model, replace(state, **{name: tensor[..., None]}), f"{name} of the state has shape .* sizes")
        refused(model, replace(state, **{name: tensor[:1]}), "it is of 1 layers, the model has 2")
        refused(model, replace(state, **{name: tensor[:, :1]}), "it is of 1 rows, the input has 2")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("version", ARCHITECTURES)
def test_what_is_no_floating_point_number(version: str, dtype: torch.dtype) -> None:
    model = model_of(version)
    state = model.initial_state(2)
    for name, tensor in zip(state.names(), state.tensors(), strict=True):
        given = replace(state, **{name: tensor.to(dtype)})
        refused(model, given, f"{name} of the state is {dtype}: give floating-point numbers")
    given = replace(state, **{state.names()[0]: None})
    refused(model, given, f"{state.names()[0]} of the state is a NoneType: give floating-point numbers")


@pytest.mark.parametrize("version", ARCHITECTURES)
def test_the_state_of_another_kind(version: str) -> None:
    model = model_of(version)
    kind = model.config.architecture.state_kind
    for other in ("4", "linear-attention", "coupled", "coupled-4"):
        if architecture(other).state_kind is not kind:
            state = model_of(other).initial_state(2)
            words = (
                f"the state is a {type(state).__name__}; this model's states are of the kind {kind.__name__}"
            )
            refused(model, state, words)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", ARCHITECTURES)
def test_states_of_models_of_another_precision(version: str, dtype: torch.dtype) -> None:
    """They are taken, by every strategy and without labels, and a gradient comes back to them."""
    model, ids = model_of(version), random_tokens(LENGTH, batch=2)
    state = model(random_tokens(LENGTH, batch=2, seed=3)).state.detach().each(lambda tensor: tensor.to(dtype))
    expected = model(ids, state=state.each(torch.Tensor.float)).logits
    torch.testing.assert_close(model(ids, state=state).logits, expected, rtol=1e-4, atol=1e-4)
    for strategy in ("full", "checkpoint", "reversible"):
        leaf = state.each(lambda tensor: tensor.clone().requires_grad_())
        with model.set_bptt(strategy, chunk_length=4):
            model(ids, labels=ids, state=leaf).loss.backward()
        memory = getattr(leaf, model.config.architecture.memory)
        assert memory.grad.dtype == dtype and memory.grad.isfinite().all() and memory.grad.any()
