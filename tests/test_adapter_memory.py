"""What peft's adapters keep of a chunk's graph is no more than is forecast."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from torch import Tensor, nn

peft = pytest.importorskip("peft")

from peft_cases import METHODS, Method, made  # noqa: E402

from rwkv_rev.adapter_memory import kept_numbers  # noqa: E402
from rwkv_rev.foreign.search import strangers  # noqa: E402

LENGTHS = (32, 64)
ROWS = 2
# prompts are no layers; sparse matrices have no storage to be counted; growing ones are not forecast
KNOWN = [m for m in METHODS if m.training == "exact" and m.name not in ("FRoD", "SHiRA", "HRA")]


def kept(model: nn.Module, base: Any, length: int, **inputs: Any) -> int:
    """Numbers that the graph of logits keeps, float64, beside what the model holds."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with base.set_bptt("full"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=random_tokens(length, ROWS), **inputs).logits.square().mean()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) // 8


@pytest.fixture(scope="module")
def whole() -> list[int]:
    """Of a model whose every weight is trained."""
    model = tiny_model("5.2", dtype=torch.float64)
    return [kept(model, model, length) for length in LENGTHS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "draws"),
    [(method, draws) for method in KNOWN for draws in (False, True) if not draws or method.draws != "never"],
    ids=str,
)
def test_no_more_than_is_forecast(method: Method, draws: bool, whole: list[int], tmp_path: Path) -> None:
    base, model = made(method, tmp_path, draws=draws)
    numbers = kept_numbers(strangers(base).adapters)
    assert numbers is not None
    # prompts are tokens of their own, in front
    prompts = 4000 if getattr(model, "prompt_encoder", None) else 0
    for length, all_trained in zip(LENGTHS, whole, strict=True):
        most = all_trained + ROWS * length * numbers[0] + numbers[1] + prompts
        assert kept(model, base, length, **method.inputs) <= most


@pytest.mark.filterwarnings("ignore")
def test_the_rank_of_householder_maps_is_not_forecast(tmp_path: Path) -> None:
    (method,) = (method for method in METHODS if method.name == "HRA")
    base, _ = made(method, tmp_path)
    assert kept_numbers(strangers(base).adapters) is None
