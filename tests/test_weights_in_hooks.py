"""Code of others at PyTorch's own parametrizations that keeps a weight: refused by name; what keeps none is trained."""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.errors import StrategyError

CHUNK = 4
STRATEGIES = ("checkpoint", "reversible")


def hook_on_the_list(holder: nn.Module, kept: dict[str, Any], keeps: bool) -> None:
    holder.register_forward_hook(lambda module, given, out: kept.setdefault("w", out) if keeps else out * 1)


def hook_on_a_part(holder: nn.Module, kept: dict[str, Any], keeps: bool) -> None:
    hook_on_the_list(holder[0], kept, keeps)  # type: ignore[index]


def pre_hook_on_a_part(holder: nn.Module, kept: dict[str, Any], keeps: bool) -> None:
    part = holder[0]  # type: ignore[index]
    part.register_forward_pre_hook(
        lambda module, given: kept.setdefault("w", tuple(x * 1 for x in given)) if keeps else given
    )


def backward_hook(holder: nn.Module, kept: dict[str, Any], keeps: bool) -> None:
    """Beside one that keeps."""
    if keeps:
        hook_on_the_list(holder, kept, keeps)
    holder[0].register_full_backward_hook(lambda module, given, arriving: None)  # type: ignore[index]


def replaced_forward(holder: nn.Module, kept: dict[str, Any], keeps: bool) -> None:
    forward = holder.forward

    def instead() -> Tensor:
        if not keeps or "w" not in kept:
            kept["w"] = forward()
        return kept["w"]

    holder.forward = instead  # type: ignore[method-assign]


def replaced_forward_of_a_part(holder: nn.Module, kept: dict[str, Any], keeps: bool) -> None:
    part = holder[0]  # type: ignore[index]
    forward = part.forward

    def instead(*given: Tensor) -> Tensor:
        if not keeps or "w" not in kept:
            kept["w"] = forward(*given)
        return kept["w"]

    part.forward = instead


WAYS = [
    hook_on_the_list,
    hook_on_a_part,
    pre_hook_on_a_part,
    backward_hook,
    replaced_forward,
    replaced_forward_of_a_part,
]


def model_with(way: Any, keeps: bool, version: str = "5.2") -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64)
    layer = model.blocks[1].time_mix.key
    parametrizations.weight_norm(layer, "weight")
    way(layer.parametrizations.weight, {}, keeps)
    return model


def gradients(model: RwkvRevForCausalLM, strategy: str, ids: Tensor, labels: bool) -> list[Tensor]:
    with model.set_bptt(strategy, chunk_length=CHUNK):
        loss = model(ids, labels=ids).loss if labels else model(ids).logits.square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("length", [2 * CHUNK, 10])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "logits"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_kept(way: Any, labels: bool, length: int) -> None:
    ids = random_tokens(length)
    gradients(model_with(way, True), "full", ids, labels)
    for strategy in STRATEGIES:
        with pytest.raises(StrategyError, match=r"time_mix\.key\.parametrizations\.weight\.original"):
            gradients(model_with(way, True), strategy, ids, labels)


@pytest.mark.parametrize(("version", "labels"), [("4", True), ("5.2", False), ("7", True)])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_made_anew(way: Any, version: str, labels: bool) -> None:
    ids = random_tokens(10)
    model = model_with(way, False, version)
    holder = model.blocks[1].time_mix.key.parametrizations.weight
    expected = gradients(model, "full", ids, labels)
    for strategy in STRATEGIES:
        for found, truth in zip(gradients(model, strategy, ids, labels), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-12)
    assert "_compiled_call_impl" not in vars(holder)


def test_a_function_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, kept = random_tokens(10), {}
    model = model_with(lambda *_: None, False)
    forward = parametrize.ParametrizationList.forward
    monkeypatch.setattr(
        parametrize.ParametrizationList, "forward", lambda self: kept.setdefault("w", forward(self))
    )
    for strategy in STRATEGIES:
        kept.clear()
        with pytest.raises(StrategyError, match=r"parametrizations\.weight\.original"):
            gradients(model, strategy, ids, True)
