"""What stands on a module in the place of the call that every module has, or compiles it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import AGREE, assert_agree, differentiate, random_tokens, relative_error, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_rev import RwkvRevForCausalLM, StrategyError, position_wise

IDS, CHUNK = random_tokens(24), 8
STRATEGIES = ("checkpoint", "reversible")
dynamo_looks_at_gradients = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)
PLACES = (
    "model.blocks.0.time_mix.key",
    "model.blocks.1",
    "model.blocks.1.channel_mix",
    "model.ln_out",
    "head",
)


def model_of() -> RwkvRevForCausalLM:
    return tiny_model("5.2", dtype=torch.float64)


def replace_call(module: nn.Module, change: Callable[[Any], Any]) -> Callable[..., Any]:
    call = module._call_impl

    def changed(*given: Any, **named: Any) -> Any:
        found = call(*given, **named)
        return change(found) if isinstance(found, Tensor) else (change(found[0]), *found[1:])

    module._call_impl = changed
    return changed


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", PLACES)
def test_a_replaced_call_is_refused(place: str, strategy: str) -> None:
    model = model_of()
    replace_call(model.get_submodule(place), lambda x: x - x.mean(1, keepdim=True))
    with (
        model.set_bptt(strategy, chunk_length=CHUNK),
        pytest.raises(
            StrategyError, match=rf"the replaced _call_impl of {place}.* is not known to treat each"
        ),
    ):
        model(IDS, labels=IDS)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", ["model.blocks.0.time_mix.key", "model.ln_out", "head"])
def test_a_declared_one_is_called(place: str, strategy: str) -> None:
    model = model_of()
    position_wise(replace_call(model.get_submodule(place), lambda x: x * 1.5))
    full = differentiate(model, "full", input_ids=IDS)
    assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
    assert relative_error(full.loss, differentiate(model_of(), "full", input_ids=IDS).loss) > 1e-7


class Scaled(nn.Module):
    """By a mean over calls, as quantisers of one's own keep it."""

    scale: Tensor

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        mean = 0.5 * self.scale + 0.5 * weight.detach().abs().max()
        if self.in_place:
            self.scale.copy_(mean)
        else:
            self.scale = mean
        return weight * self.scale.clone()


@pytest.mark.parametrize("in_place", [False, True], ids=["another buffer", "in place"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", ["head", "model.ln_out", "model.ln0", "model.embeddings"])
def test_a_buffer_that_each_call_changes_is_refused(place: str, strategy: str, in_place: bool) -> None:
    model = model_of()
    parametrize.register_parametrization(
        model.get_submodule(place), "weight", Scaled(in_place=in_place), unsafe=True
    )
    with (
        model.set_bptt(strategy, chunk_length=CHUNK),
        pytest.raises(
            StrategyError, match=rf"^{place}\.parametrizations\.weight\.0\.scale was written to while"
        ),
    ):
        model(IDS, labels=IDS)


@dynamo_looks_at_gradients
@pytest.mark.parametrize("place", ["model.blocks.0.time_mix.key", "model.ln_out"])
def test_a_compiled_layer_may_be_declared(place: str) -> None:
    model = model_of()
    compiled = torch.compile(model.get_submodule(place), backend="eager")
    model.set_submodule(place, compiled)
    with model.set_bptt("reversible", chunk_length=CHUNK):
        with pytest.raises(StrategyError, match=rf"OptimizedModule at {place} is not known .*position_wise"):
            model(IDS, labels=IDS)
        position_wise(compiled)
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    full = differentiate(model_of(), "full", input_ids=IDS)
    assert relative_error(loss.detach(), full.loss) < AGREE
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, full.gradients[name.replace("_orig_mod.", "")]) < AGREE


@dynamo_looks_at_gradients
def test_a_module_compiled_in_place_is_told_what_works() -> None:
    model = model_of()
    layer = model.model.blocks[0].time_mix.key
    layer.compile(backend="eager")
    with model.set_bptt("reversible", chunk_length=CHUNK):
        with pytest.raises(
            StrategyError, match=r"module\.forward = rwkv_rev\.position_wise\(torch\.compile"
        ) as told:
            model(IDS, labels=IDS)
        assert "or declare it" not in str(told.value)
    layer._compiled_call_impl = None
    layer.forward = position_wise(torch.compile(layer.forward, backend="eager"))
    full = differentiate(model_of(), "full", input_ids=IDS)
    assert_agree(differentiate(model, "reversible", CHUNK, input_ids=IDS), full, AGREE)
