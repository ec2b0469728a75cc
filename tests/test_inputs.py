"""Given states: whatever is computed, those that are no state of such a model are refused alike, by name."""

import copy
import pickle
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


ALIKE = {
    "coupled": "reversible-gru",
    "reversible-gru": "coupled",
    "6": "7",
    "7": "5.2",
    "5.2": "6",
    "5.1": "5.2",
}
"""Whose states have the same kind and shapes."""


@pytest.mark.parametrize("version", ALIKE)
def test_the_state_of_another_architecture(version: str) -> None:
    """Whatever was done with it since; one that was made by hand is of nobody, and so is what comes of it."""
    model, other, ids = model_of(version), model_of(ALIKE[version]), random_tokens(LENGTH, batch=2)
    words = f"the state was made by a model of rwkv_version '{ALIKE[version]}', and this one's is '{version}'"
    read = other(ids, labels=ids).state.detach()
    assert type(read).__name__ == type(read).__qualname__ == other.config.architecture.state_kind.__name__
    kinds = {
        "initial": other.initial_state(2),
        "read": other(ids).state,
        "trained": read,
        "rows": read.rows(torch.tensor([1, 0])),
        "wide": read.each(torch.Tensor.double),
        "replaced": replace(read, **{read.names()[-1]: read.tensors()[-1] + 1}),
        "copied": copy.deepcopy(read),
        "pickled": pickle.loads(pickle.dumps(read)),
    }
    for state in kinds.values():
        refused(model, state, words)
        other(ids, state=state)
    by_hand = other.config.architecture.state_kind(*read.tensors())
    assert by_hand.made_by is copy.deepcopy(by_hand).made_by is None
    own = type(model.initial_state(2))(*read.tensors())
    torch.testing.assert_close(model(ids, state=by_hand).logits, model(ids, state=own).logits)


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


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1, 2]], "input_ids are a list: give a tensor"),
        (torch.tensor([1, 2]), r"input_ids have shape \[2\]: give \[B, T\]: one row is ids\[None\]"),
        (torch.tensor([[1.0, 2.0]]), "input_ids are torch.float32: give token ids, int64"),
        (torch.tensor([[1, 2]], dtype=torch.uint8), "input_ids are torch.uint8: give token ids, int64"),
        (torch.tensor([[1, 300]]), "input_ids has 300, and the vocabulary ids from 0 to 31"),
        (torch.tensor([[-100, 2]]), "input_ids has -100, and the vocabulary .* a masked position needs one"),
        (torch.tensor([[2**40, 2]]), "input_ids has 1099511627776, and the vocabulary ids from 0 to 31"),
    ],
    ids=str,
)
def test_what_are_no_ids(ids: Any, words: str, labelled: bool) -> None:
    model = model_of("5.2")
    given = {"attention_mask": torch.tensor([[0, 1]])} if torch.is_tensor(ids) and ids.dim() == 2 else {}
    if labelled:
        given["labels"] = torch.tensor([[1, 2]])
    for strategy in ("full", "reversible"):
        with model.set_bptt(strategy, chunk_length=1), pytest.raises(ValueError, match=words):
            model(ids, **given)
    if not labelled:
        with pytest.raises(ValueError, match=words):
            model.eval().generate(ids, max_new_tokens=2, **given)


def test_embeddings_of_one_row_alone() -> None:
    with pytest.raises(ValueError, match=r"inputs_embeds have shape \[4, 16\]: give \[B, T, D\]"):
        model_of("5.2")(inputs_embeds=torch.rand(4, 16))
