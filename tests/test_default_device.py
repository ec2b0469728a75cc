"""A default device that is not the model's: ``with torch.device(...)`` around calls, and ``torch.set_default_device``.

Tensors on the meta device have no numbers: one that is made there without being told a device ends in an error.
"""

from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, assert_agree, default_device, differentiate, random_tokens, tiny_model
from torch import Tensor

import rwkv_rev.reversal.fingerprint
from rwkv_rev import RwkvRevForCausalLM

CHUNK = 8
IDS = random_tokens(20, batch=2)
EXACT = ("checkpoint", "reversible")
AGREE = 1e-10
"""In float64."""


def arguments(what: str, model: RwkvRevForCausalLM) -> dict[str, Any]:
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None].expand(2, 20)
    return {
        "alone": {},
        "mask": {"attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([3, 4]), 0)},
        "packed": {"position_ids": positions},
        "weights": {"loss_weights": torch.ones(2, 20)},
        "divisor": {"num_items_in_batch": 30},
        "state": {"state": model.initial_state(2)},
    }[what]


WHAT = ("alone", "mask", "packed", "weights", "divisor", "state")


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("version", VERSIONS)
def test_gradient(version: str, what: str) -> None:
    model = tiny_model(version, dtype=torch.float64)
    inputs = arguments(what, model)
    full = differentiate(model, "full", input_ids=IDS, **inputs)
    rwkv_rev.reversal.fingerprint._factors_on_cpu.cache_clear()
    for strategy in ("full", *EXACT):
        with torch.device("meta"):
            found = differentiate(model, strategy, CHUNK, input_ids=IDS, **inputs)
        assert_agree(found, full, AGREE)


@pytest.mark.parametrize("remnants", ["whole", "lifted"])
def test_remnants(remnants: str) -> None:
    model = tiny_model("7")
    model.set_bptt("reversible", remnants=remnants)
    expected = differentiate(model, "reversible", CHUNK, input_ids=IDS)
    with torch.device("meta"):
        found = differentiate(model, "reversible", CHUNK, input_ids=IDS)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("strategy", ["truncated", "reversible-lossy"])
def test_strategies_that_are_not_exact(strategy: str) -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    expected = differentiate(model, strategy, CHUNK, input_ids=IDS)
    with torch.device("meta"):
        found = differentiate(model, strategy, CHUNK, input_ids=IDS)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_loss_of_ones_own(version: str, strategy: str, where: str) -> None:
    def gradient() -> list[Tensor]:
        hidden = model.model(IDS).last_hidden_state
        return list(torch.autograd.grad(hidden.square().sum(), list(model.model.parameters())))

    model = tiny_model(version, dtype=torch.float64)
    model.set_bptt(strategy, chunk_length=CHUNK, hidden_states=where)
    expected = gradient()
    with torch.device("meta"):
        found = gradient()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("version", VERSIONS)
def test_reading(version: str) -> None:
    """Logits, a loss without gradient, text, a tuned initial state."""
    model = tiny_model(version, dtype=torch.float64).eval()
    model.set_bptt("auto", chunk_length=CHUNK)
    if version not in ("4",):
        model.add_initial_state()

    def read() -> list[Tensor]:
        with torch.no_grad():
            logits, evaluated = model(IDS).logits, model(IDS, labels=IDS)
            return [logits, evaluated.loss, evaluated.logits]

    expected = read()
    with default_device("meta"):
        found = read()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
