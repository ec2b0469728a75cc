"""What was read under ``torch.inference_mode()``, and is then trained from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM

CHUNK = 8
IDS = random_tokens(20, batch=2)
EXACT = ("checkpoint", "reversible")
AGREE = 1e-10
"""In float64."""


def inference(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


def given(model: RwkvRevForCausalLM, what: str) -> dict[str, Any]:
    """Arguments, as tensors of inference."""
    state = inference(lambda: model(IDS[:, :9]).state)
    assert all(tensor.is_inference() for tensor in state.tensors())
    if what == "state":
        return {"input_ids": IDS, "state": state}
    if what == "embeddings":
        return {"inputs_embeds": inference(lambda: model.get_input_embeddings()(IDS))}
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([3, 4]), 0)
    return {"input_ids": inference(IDS.clone), "attention_mask": inference(mask.clone)}


def ordinary(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value.each(lambda tensor: tensor.clone())
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("what", ["state", "embeddings", "ids and mask"])
@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("version", VERSIONS)
def test_gradient(version: str, strategy: str, what: str) -> None:
    model = tiny_model(version, dtype=torch.float64)
    inputs = given(model, what)
    full = differentiate(model, "full", labels=IDS, **ordinary(inputs))
    labels = inference(IDS.clone)
    assert_agree(differentiate(model, strategy, CHUNK, labels=labels, **inputs), full, AGREE)
    assert_agree(differentiate(model, "full", labels=labels, **inputs), full, AGREE)


@pytest.mark.parametrize("what", ["state", "embeddings", "ids and mask"])
@pytest.mark.parametrize("strategy", EXACT)
def test_a_loss_of_ones_own(strategy: str, what: str) -> None:
    model = tiny_model("7", dtype=torch.float64)
    inputs = given(model, what)
    found = []
    for name, handed_over in (("full", ordinary(inputs)), (strategy, inputs)):
        model.set_bptt(name, chunk_length=CHUNK)
        loss = model(**handed_over).logits.square().sum()
        trained = list(model.parameters())
        found.append(torch.autograd.grad(loss, trained, allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-10)
