"""Code that passes for ours or PyTorch's by what wrappers take over: refused in chunks."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import differentiate, random_tokens, tiny_model
from torch import Tensor, nn
from torch.nn.utils import prune

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.base_model import RwkvRevModel
from rwkv_rev.cells.block import Block
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.code_origin import defined_in, origin
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.search import strangers

IDS = random_tokens(27, batch=2)
CHUNK = 8


def centred(result: Any) -> Any:
    """Not position-wise."""
    if isinstance(result, Tensor):
        return result - result.mean(1, keepdim=True)
    if hasattr(result, "key"):
        return result._replace(key=centred(result.key))
    return (centred(result[0]), *result[1:]) if isinstance(result, tuple) else result


def around(function: Callable[..., Any]) -> Any:
    return functools.wraps(function)(lambda *given, **named: centred(function(*given, **named)))


def plainly_around(function: Callable[..., Any]) -> Any:
    return lambda *given, **named: centred(function(*given, **named))


def without_graph_around(function: Callable[..., Any]) -> Any:
    return torch.no_grad()(around(function))


WRAPPERS = [around, plainly_around, without_graph_around]
CHUNKED = ("checkpoint", "reversible", "truncated")


def assert_refused(model: RwkvRevForCausalLM, words: str) -> None:
    """With labels; a loss of somebody's own stores its graph."""
    for strategy in CHUNKED:
        with pytest.raises(StrategyError, match=words):
            differentiate(model, strategy, CHUNK, input_ids=IDS)
    full, stored = gradients(model, "full"), gradients(model, "reversible")
    assert all(torch.equal(stored[name], full[name]) for name in full)


def gradients(model: RwkvRevForCausalLM, strategy: str) -> dict[str, Tensor]:
    """Of a loss on logits."""
    with model.set_bptt(strategy, chunk_length=CHUNK):
        loss = model(IDS).logits.square().mean()
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["embed", "normalize", "read", "run"])
def test_methods_of_the_model_in_wrappers(name: str, wrapper: Callable[..., Any]) -> None:
    model = tiny_model("5.2")
    setattr(model, name, wrapper(getattr(model, name)))
    with pytest.raises(StrategyError, match=rf"RwkvRevForCausalLM\.{name}"):
        differentiate(model, "reversible", CHUNK, input_ids=IDS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["embed", "normalize", "run"])
def test_methods_of_the_base_model_in_wrappers(name: str, wrapper: Callable[..., Any]) -> None:
    model = tiny_model("5.2")
    setattr(model.model, name, wrapper(getattr(model.model, name)))
    assert_refused(model, name)


def test_a_subclass_that_overrides_in_a_wrapper() -> None:
    class Other(RwkvRevModel):
        embed = around(RwkvRevModel.embed)

    model = tiny_model("5.2")
    model.model.__class__ = Other
    assert_refused(model, "Other")


PATCHED: list[tuple[type, str]] = [
    (nn.Linear, "forward"),
    (nn.LayerNorm, "forward"),
    (Block, "forward"),
    (TimeMixRwkv5, "project"),
    (RwkvRevModel, "embed"),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layer, name", PATCHED, ids=lambda value: getattr(value, "__name__", value))
def test_functions_replaced_on_a_class(
    layer: type, name: str, wrapper: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("5.2")
    monkeypatch.setattr(layer, name, wrapper(getattr(layer, name)))
    assert_refused(model, rf"replaced {name} of the class {layer.__name__}|RwkvRevModel\.{name}")


def test_the_call_of_every_module_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("5.2")
    monkeypatch.setattr(nn.Module, "_call_impl", around(nn.Module._call_impl))
    assert_refused(model, "replaced _call_impl of the class Module")


def test_a_declared_function_on_a_class_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    forward = nn.Linear.forward
    declared = position_wise(functools.wraps(forward)(lambda layer, x: 0.5 * forward(layer, x)))
    monkeypatch.setattr(nn.Linear, "forward", declared)
    full = differentiate(model, "full", input_ids=IDS)
    reversible = differentiate(model, "reversible", CHUNK, input_ids=IDS)
    torch.testing.assert_close(reversible.loss, full.loss, rtol=1e-6, atol=0)


def test_a_wrapped_hook_of_pytorch_and_a_function_of_somebodys_own() -> None:
    class Centred(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, module: Any, given: Any, output: Tensor) -> Tensor:
            return centred(output)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
            return None, None, centred(gradient)

    def pre_hook(module: Any, given: Any) -> Any:
        return (centred(given[0]),)

    def hook(module: Any, given: Any, output: Any) -> Any:
        return centred(output)

    pruned = prune.BasePruningMethod.__call__
    hooks = [
        Centred.apply,
        functools.wraps(pruned)(hook),
        functools.partial(functools.wraps(pruned)(hook)),
        torch.no_grad()(hook),
        torch.vmap(hook),
        nn.Sequential(nn.Identity()),
    ]
    for number, strange in enumerate(hooks):
        model = tiny_model("5.2")
        model.blocks[1].channel_mix.key.register_forward_hook(strange)
        assert strangers(model).unknown, number
    model = tiny_model("5.2")
    model.blocks[1].channel_mix.key.register_forward_pre_hook(functools.wraps(pruned)(pre_hook))
    assert_refused(model, r"hook .* on model\.blocks\.1\.channel_mix\.key")


def test_hooks_of_pytorch_are_known() -> None:
    model = tiny_model("5.2")
    prune.random_unstructured(model.blocks[1].channel_mix.key, "weight", 0.2)
    assert not strangers(model).unknown


def test_a_wrapped_hook_of_peft() -> None:
    layer = pytest.importorskip("peft.tuners.lora.model")
    model = tiny_model("5.2")
    known = functools.partial(layer._adapter_names_pre_forward_hook, adapter_names=["a"])
    handle = model.blocks[1].channel_mix.key.register_forward_pre_hook(known, with_kwargs=True)
    assert not strangers(model).unknown
    handle.remove()
    strange = functools.wraps(layer._adapter_names_pre_forward_hook)(lambda module, given, named: None)
    model.blocks[1].channel_mix.key.register_forward_pre_hook(strange, with_kwargs=True)
    assert strangers(model).unknown


def test_classes_that_pass_for_others() -> None:
    class Other(nn.Module):
        pass

    functools.update_wrapper(Other, Block, updated=())
    assert Other.__module__ == Block.__module__
    assert (origin(Other), origin(Block)) == ("", "rwkv_rev.cells.block")
    model = tiny_model("5.2")
    model.blocks[0].time_mix.key = Other()
    assert strangers(model).unknown


def test_code_that_calls_other_code_is_from_where_all_of_it_is() -> None:
    torchs = ("torch.",)
    assert defined_in(nn.Linear.forward, torchs) and defined_in(nn.Linear(1, 1).forward, torchs)
    assert defined_in(functools.partial(nn.functional.relu), torchs)
    assert not defined_in(functools.partial(torch.vmap, centred), torchs)
    assert not defined_in(property(centred), torchs) and not defined_in(staticmethod(centred), torchs)
    assert not defined_in(torch.no_grad()(centred), torchs)
    assert defined_in(torch.no_grad()(torch.vmap(nn.functional.relu)), torchs)
