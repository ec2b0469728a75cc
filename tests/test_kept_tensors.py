"""Tensors that code of others makes of trained weights once and keeps: their gradient, or an error by name."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bptt_cases import AGREE, random_tokens, relative_error, tiny_model
from test_token_rules import Pair
from token_cases import LanguageModel, gradients, plain_inputs
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.bptt import kept_tensors
from rwkv_rev.bptt.kept_tensors import what_is_kept_is_trained
from rwkv_rev.cells.token_cell import Token, Update
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.search import strangers
from rwkv_rev.module_settings import settings

LENGTH = 24
IDS = random_tokens(LENGTH, batch=2)
STRATEGIES = ("checkpoint", "reversible")
PLACE = "blocks.1.channel_mix.value"


def factor(*shape: int) -> nn.Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return nn.Parameter(values / 4)


class Adapted(nn.Module):
    """A map and a product of two thin matrices, which is made by :meth:`made` and kept or not by :meth:`product`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.kept = base, None
        self.a, self.b = factor(base.out_features, 3), factor(3, base.in_features)

    def made(self) -> Tensor:
        return self.a @ self.b

    def product(self, x: Tensor) -> Tensor:
        return self.made()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.product(x))


class Attribute(Adapted):
    def product(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.made()
        return self.kept


class Dictionary(Adapted):
    def product(self, x: Tensor) -> Tensor:
        key = self.a._version
        if self.kept is None or key not in self.kept:
            self.kept = {key: self.made()}
        return self.kept[key]


class Cached(Adapted):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.cached = functools.lru_cache(lambda version: self.made())

    def product(self, x: Tensor) -> Tensor:
        return self.cached(self.a._version)


class OfEachLength(Adapted):
    def product(self, x: Tensor) -> Tensor:
        self.kept = self.kept or {}
        return self.kept.setdefault(x.shape[1], self.made())


class InPart(Attribute):
    """One of its matrices is used beside the product, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.b), self.a)


class WithoutGraph(Adapted):
    """Keeps what it makes where nobody wants a gradient."""

    def product(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.made()
        self.kept = self.made() if self.kept is None else self.kept
        return self.kept


class Scaled(nn.Module):
    """A parametrization that keeps what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.kept = factor(1), None

    def forward(self, weight: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = weight * (1 + self.gain)
        return self.kept


for _layer in (Adapted, Attribute, Dictionary, Cached, OfEachLength, InPart, WithoutGraph):
    position_wise(_layer)


def model_with(layer: type[Adapted], version: str = "5.2", place: str = PLACE) -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64)
    holder, _, name = place.rpartition(".")
    base = model.model.get_submodule(place)
    setattr(model.model.get_submodule(holder), name, layer(base))
    return model


def parametrized(version: str = "5.2") -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64)
    linear = model.model.get_submodule(PLACE)
    parametrize.register_parametrization(linear, "weight", Scaled())
    linear.parametrizations.weight[0].kept = None
    return model


def hooked(version: str = "5.2") -> RwkvRevForCausalLM:
    """A hook that keeps a product in its closure."""
    model = tiny_model(version, dtype=torch.float64)
    model.model.a, model.model.b = factor(16, 3), factor(3, 16)
    kept: list[Tensor] = []

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        if not kept:
            kept.append(model.model.a @ model.model.b)
        return output + F.linear(output, kept[0])

    model.model.get_submodule(PLACE).register_forward_hook(position_wise(hook))
    return model


KEPT: dict[str, Callable[[str], RwkvRevForCausalLM]] = {
    "attribute": lambda version: model_with(Attribute, version),
    "dictionary": lambda version: model_with(Dictionary, version),
    "lru_cache": lambda version: model_with(Cached, version),
    "of each length": lambda version: model_with(OfEachLength, version),
    "in part": lambda version: model_with(InPart, version),
    "parametrization": parametrized,
    "hook": hooked,
}


def outcome(model: RwkvRevForCausalLM, strategy: str, own: bool, chunk: int) -> dict[str, Tensor]:
    """Gradients of the model's own loss or of one on logits."""
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=chunk):
        loss = (
            model(IDS, labels=IDS).loss if own else model(IDS).logits.log_softmax(-1)[..., 3].square().mean()
        )
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_like_full(make: Callable[[], RwkvRevForCausalLM], strategy: str, own: bool, chunk: int) -> None:
    expected, found = outcome(make(), "full", own, LENGTH), outcome(make(), strategy, own, chunk)
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= AGREE, name


@pytest.mark.parametrize(("chunks", "version"), [(2, "4"), (3, "5.2"), (4, "7")])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_is_refused_by_name(
    kind: str, strategy: str, own: bool, chunks: int, version: str
) -> None:
    with pytest.raises(StrategyError, match=r"a tensor made of \S*\b(a|original) \(and 1 more\) is used in"):
        outcome(KEPT[kind](version), strategy, own, LENGTH // chunks)


@pytest.mark.parametrize("layer", [Adapted, WithoutGraph])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_made_in_each_call_is_trained(strategy: str, own: bool, layer: type[Adapted]) -> None:
    assert_like_full(lambda: model_with(layer), strategy, own, 8)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_one_chunk_alone_uses_is_trained(strategy: str, own: bool) -> None:
    """A product for each length: the last chunk is shorter, and the gradient goes through each product once."""
    assert_like_full(lambda: model_with(OfEachLength), strategy, own, 16)


@pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is dep:FutureWarning"
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointed_blocks_are_no_way_around(strategy: str) -> None:
    """Where blocks are computed once more the second sweep, too, has a part without graph."""
    for layer in (Attribute, OfEachLength):
        for own in (True, False):
            model = model_with(layer)
            model.gradient_checkpointing_enable()
            with pytest.raises(
                StrategyError, match=r"channel_mix\.value\.a \(and 1 more\) is used in several chunks"
            ):
                outcome(model, strategy, own, 8)


@pytest.mark.parametrize("method", ["project", "gates", "update", "read"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cells_of_ones_own(strategy: str, method: str) -> None:
    """By the contract, undeclared; in each method that a subclass fills in."""

    class Keeping(Pair):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.scale, self.kept = factor(1), None

        def factor(self, name: str) -> Any:
            if name != method:
                return 1
            if self.kept is None:
                self.kept = torch.sigmoid(self.scale)
            return self.kept

        def project(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().project(x * self.factor("project"))

        def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> Any:
            return super().gates(half, token, parts) * self.factor("gates")

        def update(self, part: int, gates: Any, parts: Sequence[Tensor]) -> Update:
            decay, change = super().update(part, gates, parts)
            return decay * self.factor("update"), change

        def read(self, parts: Tensor, x: Tensor) -> Tensor:
            return super().read(parts, x) * self.factor("read")

    model = LanguageModel(Keeping).double().train()
    with pytest.raises(StrategyError, match=r"cell\.scale \(and 1 more\) is used in several"):
        gradients(model, strategy, plain_inputs(model, 21), 8)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", ["ln1", "ln2", "channel_mix.value", "time_mix.key"])
def test_hooks_may_write_in_place(place: str, strategy: str) -> None:
    def make() -> RwkvRevForCausalLM:
        model = tiny_model("5.2", dtype=torch.float64)
        model.model.gain = factor(16)

        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            output.mul_(1 + model.model.gain)

        model.model.blocks[1].get_submodule(place).register_forward_hook(position_wise(hook))
        return model

    for own in (True, False):
        assert_like_full(make, strategy, own, 8)


def test_what_a_hook_sees_in_the_first_sweep_has_no_graph() -> None:
    """Each chunk once, in order."""
    model, seen = model_with(Adapted), []
    model.model.blocks[1].register_forward_hook(position_wise(lambda _, __, output: seen.append(output[0])))
    with model.set_bptt("reversible", chunk_length=8):
        model(IDS)
    assert [out.shape[1] for out in seen] == [8, 8, 8] and not any(out.requires_grad for out in seen)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "truncated"])
def test_what_is_made_before_the_loss_is_refused_by_name(strategy: str) -> None:
    """Of a parameter that the model has; of one that it has not; of one that only the model around it has."""

    def outside(holder: Callable[[RwkvRevForCausalLM], Any]) -> RwkvRevForCausalLM:
        model = tiny_model("5.2", dtype=torch.float64)
        holder(model).gain = factor(16)
        value = holder(model).gain.exp()
        model.model.get_submodule(PLACE).register_forward_hook(position_wise(lambda _, __, out: out * value))
        return model

    with pytest.raises(StrategyError, match=r"a tensor made of model\.gain is used in several chunks"):
        outcome(outside(lambda model: model.model), strategy, True, 8)
    aside = nn.Module()
    model = outside(lambda model: aside if model else None)
    with pytest.raises(
        StrategyError, match=r"an nn\.Parameter of shape \[16\] takes part .* in none of its modules"
    ):
        outcome(model, strategy, True, 8)
    if strategy in STRATEGIES:
        with pytest.raises(
            StrategyError, match=r"register it in one \(for a loss of your own: of model\.model"
        ):
            outcome(outside(lambda model: model), strategy, False, 8)


def test_a_trained_attribute_that_was_computed_is_refused_by_name() -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    linear = model.model.get_submodule(PLACE)
    weight = linear.weight.detach().clone()
    del linear.weight
    model.gain = factor(1)
    linear.weight = weight * model.gain.exp()
    with pytest.raises(StrategyError, match="a tensor made of gain is used in several chunks"):
        outcome(model, "reversible", True, 8)


def test_modules_are_as_they_were() -> None:
    for make in (lambda: model_with(Adapted), lambda: KEPT["parametrization"]("5.2"), hooked):
        model = make()
        before = settings(model)
        with what_is_kept_is_trained(model, strangers(model)):
            assert settings(model) != before
        assert settings(model) == before


def test_a_hook_may_take_itself_off() -> None:
    model = model_with(Adapted)
    module = model.model.blocks[1].channel_mix
    handle = module.register_forward_hook(position_wise(lambda *_: handle.remove()))
    outcome(model, "reversible", True, 8)
    assert not module._forward_hooks


def test_ordinary_models_are_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kept_tensors, "_calls", lambda model: pytest.fail("no code of others keeps anything here")
    )
    model = tiny_model("7")
    model.model.blocks[0].channel_mix.register_forward_hook(lambda *_: None)
    model.model.blocks[0].channel_mix._forward_hooks.clear()
    nn.utils.parametrizations.weight_norm(model.model.get_submodule(PLACE))
    for own in (True, False):
        outcome(model, "reversible", own, 8)
