"""Subclasses of tensors and modes that compute something else in the place of PyTorch's functions."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bptt_cases import assert_agree, default_device, differentiate, random_tokens, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.overriding import foreign_modes

CHUNK = 8
IDS = random_tokens(20, batch=2)
EXACT = ("checkpoint", "reversible")
AGREE = 1e-10
"""In float64."""


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """To 15 levels, straight through."""
    return x + ((x / largest * 7).round() / 7 * largest - x).detach()


class Weight(Tensor):
    """A weight before whose product activations are rounded by the largest of a call."""

    @staticmethod
    def largest(x: Tensor) -> Tensor:
        return x.detach().abs().max()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[0], args[1].as_subclass(Tensor)
            return F.linear(rounded(x, cls.largest(x)), weight)
        made = super().__torch_function__(func, types, args, kwargs or {})
        keeps = func in (Tensor.detach, Tensor.clone, Tensor.requires_grad_)
        return made if keeps or not isinstance(made, cls) else made.as_subclass(Tensor)


@position_wise
class RowWeight(Weight):
    """By the largest of each token."""

    @staticmethod
    def largest(x: Tensor) -> Tensor:
        return x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-6)


class OfARowWeight(RowWeight):
    """What it overrides nobody knows."""


class Wrapped(Tensor):
    """A weight of a wrapper's kind, which is asked before each kernel."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].inner))
        plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def weighed(put: Callable[[nn.Linear], None]) -> RwkvRevForCausalLM:
    model = tiny_model("7", dtype=torch.float64)
    put(model.model.blocks[1].channel_mix.value)
    return model


def as_parameter(made: Callable[[Tensor], Tensor], trained: bool, layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(made(layer.weight.detach().clone()), requires_grad=trained)


def as_buffer(made: Callable[[Tensor], Tensor], layer: nn.Linear) -> None:
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", made(weight))


def as_attribute(made: Callable[[Tensor], Tensor], layer: nn.Linear) -> None:
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = made(weight)


def of_class(kind: type[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.as_subclass(kind)


UNKNOWN = {
    "frozen": partial(as_parameter, of_class(Weight), False),
    "trained": partial(as_parameter, of_class(Weight), True),
    "buffer": partial(as_buffer, of_class(Weight)),
    "attribute": partial(as_attribute, of_class(Weight)),
    "subclass of a declared one": partial(as_parameter, of_class(OfARowWeight), False),
    "wrapper": partial(as_parameter, Wrapped, False),
}


def gradient_of_logits(model: RwkvRevForCausalLM, strategy: str) -> list[Tensor | None]:
    """Of a loss of one's own."""
    model.set_bptt(strategy, chunk_length=CHUNK)
    logits = model(IDS).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True))


def assert_same(model: RwkvRevForCausalLM, strategy: str, around: Any = nullcontext) -> None:
    """The gradient of a loss of one's own is that of ``full``."""
    with around():
        expected = gradient_of_logits(model, "full")
    with around():
        found = gradient_of_logits(model, strategy)
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("put", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("strategy", EXACT)
def test_tensors_of_a_class_that_is_not_known_are_refused(
    strategy: str, put: Callable[[nn.Linear], None]
) -> None:
    """In a layer of PyTorch's own. A loss of one's own has the whole graph."""
    model = weighed(put)
    assert_same(model, strategy)
    model.set_bptt(strategy, chunk_length=CHUNK)
    words = r"the tensor class \w+ of model.blocks.1.channel_mix.value.weight is not known .*position_wise"
    with pytest.raises(StrategyError, match=words):
        model(IDS, labels=IDS)


@pytest.mark.parametrize("trained", [False, True])
def test_a_declared_class_of_tensors_is_heard(trained: bool) -> None:
    model = weighed(partial(as_parameter, of_class(RowWeight), trained))
    plain = differentiate(weighed(lambda layer: None), "full", input_ids=IDS)
    full = differentiate(model, "full", input_ids=IDS)
    assert abs(full.loss - plain.loss) > 1e-6
    for strategy in EXACT:
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
        assert_same(model, strategy)


class Averaging(TorchFunctionMode):
    """Adds to a token what others of the call are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made + made.mean(1, keepdim=True) / 10 if func is F.linear and made.dim() == 3 else made


class Halving(TorchDispatchMode):
    """A gradient that nobody has asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return (made[0] / 2, *made[1:]) if func is torch.ops.aten.native_layer_norm_backward.default else made


@position_wise
class Larger(TorchFunctionMode):
    """Position-wise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 1.01 if func is F.linear else made


@pytest.mark.parametrize("mode", [Averaging, Halving])
@pytest.mark.parametrize("strategy", EXACT)
def test_modes_that_are_not_known_are_refused(strategy: str, mode: Any) -> None:
    model = tiny_model("7", dtype=torch.float64, bptt=strategy, chunk_length=CHUNK)
    with (
        mode(),
        pytest.raises(StrategyError, match=f"the mode {mode.__name__} around the model is not known"),
    ):
        model(IDS, labels=IDS)
    assert_same(model, strategy, mode)


@pytest.mark.parametrize("mode", [Averaging, Larger])
@pytest.mark.parametrize("strategy", EXACT)
def test_reading_under_a_mode_that_is_not_known_is_not_cut(strategy: str, mode: Any) -> None:
    model = tiny_model("7", dtype=torch.float64, bptt="full").eval()
    with torch.no_grad(), mode():
        expected, loss = model(IDS).logits, model(IDS, labels=IDS).loss
        with model.set_bptt(strategy, chunk_length=CHUNK):
            assert torch.allclose(model(IDS).logits, expected, rtol=1e-9, atol=1e-11)
            assert torch.allclose(model(IDS, labels=IDS).loss, loss, rtol=1e-9)


@pytest.mark.parametrize("strategy", EXACT)
def test_a_mode_of_the_forward_pass_alone_gets_the_whole_graph(strategy: str) -> None:
    """It is closed when the second sweep would run."""

    def gradient(strategy: str) -> list[Tensor]:
        model.set_bptt(strategy, chunk_length=CHUNK)
        with Averaging():
            logits = model(IDS).logits
        return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))

    model = tiny_model("7", dtype=torch.float64)
    for one, other in zip(gradient(strategy), gradient("full"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", EXACT)
def test_a_declared_mode_is_heard(strategy: str) -> None:
    model = tiny_model("7", dtype=torch.float64)
    with Larger():
        full = differentiate(model, "full", input_ids=IDS)
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
    assert_same(model, strategy, Larger)
    with Watching():
        full = differentiate(model, "full", input_ids=IDS)
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
    assert_same(model, strategy, Watching)


@pytest.mark.parametrize("strategy", EXACT)
def test_a_declared_mode_of_the_forward_pass_alone(strategy: str) -> None:
    """As in a graph: what it did to the forward pass has its gradient."""
    model = tiny_model("7", dtype=torch.float64)
    found = []
    for name in ("full", strategy):
        model.set_bptt(name, chunk_length=CHUNK)
        with Larger():
            logits = model(IDS).logits
        found.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@position_wise
class Watching(TorchDispatchMode):
    """Position-wise, and heard in gradients."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", EXACT)
def test_modes_opened_or_closed_before_the_gradient_are_refused(strategy: str) -> None:
    """Where a gradient hears them: those of kernels."""
    model = tiny_model("7", dtype=torch.float64, bptt=strategy, chunk_length=CHUNK)
    with Watching():
        logits = model(IDS).logits
    with pytest.raises(StrategyError, match="the mode Watching around the model was changed between"):
        logits.sum().backward()
    for mode in (Watching, Halving):
        logits = model(IDS).logits
        with (
            mode(),
            pytest.raises(StrategyError, match=f"the mode {mode.__name__} around the model was chan"),
        ):
            logits.sum().backward()


HARMLESS = {
    "device": lambda: torch.device("cpu"),
    "default device": lambda: default_device("cpu"),
    "mutation": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


@pytest.mark.parametrize("around", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("strategy", EXACT)
def test_modes_of_pytorch_are_known(strategy: str, around: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("7", dtype=torch.float64)
    full = differentiate(model, "full", input_ids=IDS)
    with around():
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
    told: list[str] = []
    monkeypatch.setattr("rwkv_rev.base_model.logger.warning_once", told.append)
    assert_same(model, strategy, around)
    assert not told


@pytest.mark.parametrize("mode", [FakeTensorMode, partial(FlopCounterMode, display=False)])
def test_modes_that_trace_and_count_are_known(mode: Any) -> None:
    with mode():
        assert foreign_modes() == []


@pytest.mark.parametrize("strategy", EXACT)
def test_a_call_that_is_computed_again_by_pytorch(strategy: str) -> None:
    """``torch.utils.checkpoint`` around the whole of it puts modes of its own there."""
    model = tiny_model("7", dtype=torch.float64, bptt=strategy, chunk_length=CHUNK)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(IDS, labels=IDS).loss, parameters)
    loss = checkpoint(lambda ids: model(ids, labels=ids).loss, IDS, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(one, other)
