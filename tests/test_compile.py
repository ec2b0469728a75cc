"""``torch.compile(model)``: the loss is computed as without it, whatever the backend and length."""

import shutil
from functools import cache
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from torch import nn

from rwkv_rev import RwkvRevForCausalLM

# of PyTorch's own making, inside its compiler
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")),
]
CHUNK = 8


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@cache
def of_the_model_itself(version: str, strategy: str, length: int) -> tuple[Any, Any]:
    model = tiny_model(version)
    return gradients(model, model, strategy, length)


def gradients(model: nn.Module, inner: RwkvRevForCausalLM, strategy: str, length: int) -> tuple[Any, Any]:
    ids = random_tokens(length, batch=2)
    with inner.set_bptt(strategy, chunk_length=CHUNK):
        loss = model(ids, labels=ids).loss
        loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in inner.named_parameters()}
    inner.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", ["5.2"])
def test_the_compiled_loss_is_the_loss(version: str, backend: str) -> None:
    model = tiny_model(version)
    compiled = torch.compile(model, backend=backend)
    for strategy in ("reversible", "checkpoint", "full", "truncated"):
        for length in (8, 20):
            expected = of_the_model_itself(version, strategy, length)
            found = gradients(compiled, model, strategy, length)
            assert torch.equal(found[0], expected[0])
            for name, gradient in expected[1].items():
                assert torch.equal(found[1][name], gradient), name


def test_compiled_logits() -> None:
    """Hidden states are compiled; inductor takes a minute for that, its loss is tested above."""
    model = tiny_model("5.2", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    ids = random_tokens(6, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5
            )
