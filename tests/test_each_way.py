"""Code in the place of a method that one strategy calls and another does not: refused by name, declared or not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.base_model import RwkvRevModel
from rwkv_rev.cells.block import Block
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.overridden import overridden_alone
from rwkv_rev.cells.stateless import StatelessCell
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign import adapters
from rwkv_rev.foreign.each_way import overridden
from rwkv_rev.foreign.search import strangers

CHUNK = 4
IDS = random_tokens(10)
CHUNKED = ("checkpoint", "reversible", "truncated")
AGREE = 1e-10
WORKS = r"is not called by every strategy: put the code into a hook or a module .*position_wise"


def model_of(version: str = "5.2") -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64)


def larger(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result * 1.5
    return (result[0] * 1.5, *result[1:]) if isinstance(result, tuple) else result


def declared(method: Callable[..., Any]) -> Any:
    return position_wise(lambda *given, **named: larger(method(*given, **named)))


def assert_refused(
    model: RwkvRevForCausalLM, words: str, *, logits: bool = True, works: str = f".*{WORKS}"
) -> None:
    """With labels; a loss of one's own is that of the whole graph."""
    for strategy in CHUNKED:
        with pytest.raises(StrategyError, match=words + works) as error:
            differentiate(model, strategy, CHUNK, input_ids=IDS)
        assert "\n" not in str(error.value)
    if logits:
        assert_like_full(model)


def assert_like_full(model: RwkvRevForCausalLM) -> None:
    """Of a loss on logits, in three chunks and in two."""
    for strategy, length in (("reversible", 10), ("checkpoint", 2 * CHUNK)):
        found = []
        for way in ("full", strategy):
            with model.set_bptt(way, chunk_length=CHUNK):
                loss = model(IDS[:, :length]).logits.square().mean()
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for value, expected in zip(*found, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


METHODS = [
    *(("", name) for name in ("read", "embed", "normalize", "run")),
    *(("model", name) for name in ("forward", "embed", "normalize", "run", "typed_blocks")),
    *(("model.blocks.1.time_mix", name) for name in ("step", "advance", "replay", "values", "update")),
    ("model.blocks.0", "exact"),
]


@pytest.mark.parametrize(("place", "name"), METHODS, ids=lambda value: value or "top")
def test_a_method_replaced_and_declared(place: str, name: str) -> None:
    model = model_of()
    owner = model.get_submodule(place)
    setattr(owner, name, declared(getattr(owner, name)))
    assert_refused(model, name)


@pytest.mark.parametrize("name", ["step", "exact"])
def test_a_method_of_a_cell_of_others_replaced(name: str) -> None:
    class Mine(ChannelMix):
        pass

    model = model_of("4")
    cell = model.blocks[1].channel_mix
    cell.__class__ = Mine
    setattr(cell, name, declared(getattr(cell, name)))
    assert_refused(model, rf"the replaced {name} of model\.blocks\.1\.channel_mix")


@pytest.mark.parametrize(
    ("layer", "name"), [(TimeMixRwkv5, "step"), (RwkvRevModel, "normalize"), (Block, "plan")]
)
def test_a_declared_function_on_a_class(layer: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = getattr(layer, name)
    monkeypatch.setattr(layer, name, declared(method))
    assert_refused(model_of(), name, logits=False)


@pytest.mark.parametrize("place", ["forward", "project", "output_of", "log_decay"])
def test_what_every_way_calls_may_be_declared(place: str) -> None:
    model = model_of()
    cell = model.blocks[1].time_mix
    method = getattr(cell, place)
    change = (lambda p: p._replace(key=1.5 * p.key)) if place == "project" else larger
    setattr(cell, place, position_wise(lambda *given: change(method(*given))))
    full = differentiate(model, "full", input_ids=IDS)
    for strategy in ("checkpoint", "reversible"):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
    assert_like_full(model)


# --- subclasses -------------------------------------------------------------------------------------------------------


class Reversed(RwkvRevForCausalLM):
    @property
    def blocks(self) -> Any:
        return self.model.typed_blocks()[::-1]


class Fewer(RwkvRevForCausalLM):
    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.head.weight])


class Conventional(RwkvRevForCausalLM):
    """Overrides what models of transformers override, and what sees whole contexts."""

    another = 3

    def forward(self, *given: Any, **named: Any) -> Any:
        return super().forward(*given, **named)

    def prepare_inputs_for_generation(self, *given: Any, **named: Any) -> Any:
        return super().prepare_inputs_for_generation(*given, **named)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)

    def set_bptt(self, *given: Any, **named: Any) -> Any:
        return super().set_bptt(*given, **named)

    def helper(self) -> int:
        return self.another


@pytest.mark.parametrize(("kind", "name"), [(Reversed, "blocks"), (Fewer, "parameters")])
def test_a_subclass_of_the_model(kind: type, name: str) -> None:
    model = model_of()
    model.__class__ = kind
    assert_refused(model, rf"{kind.__name__}\.{name}", logits=kind is Reversed)


@pytest.mark.parametrize("on", ["the class", "the object"])
@pytest.mark.parametrize("name", ["get_input_embeddings", "parameters", "named_parameters", "modules"])
def test_what_gives_the_same_is_no_other_way(name: str, on: str) -> None:
    """transformers' own models override ``get_input_embeddings``, too."""
    model = model_of()
    expected = differentiate(model, "full", input_ids=IDS)
    ours = getattr(RwkvRevForCausalLM, name)
    if on == "the class":
        model.__class__ = type(
            "Mine", (RwkvRevForCausalLM,), {name: lambda self, *a, **k: ours(self, *a, **k)}
        )
    else:
        setattr(model, name, lambda *a, **k: ours(model, *a, **k))
    for strategy in ("checkpoint", "reversible"):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), expected, AGREE)


@pytest.mark.parametrize("on", ["the class", "the object"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_documents_do_not_begin_with_a_replaced_state(strategy: str, labels: bool, on: str) -> None:
    model = model_of()
    model.set_bptt(strategy, chunk_length=CHUNK)
    ours = RwkvRevModel.initial_state
    if on == "the class":
        model.model.__class__ = type(
            "Mine", (RwkvRevModel,), {"initial_state": position_wise(lambda *given: ours(*given))}
        )
    else:
        model.model.initial_state = position_wise(lambda *given: ours(model.model, *given))
    borders = torch.zeros_like(IDS, dtype=torch.bool)
    borders[0, 3] = True
    with pytest.raises(StrategyError, match=r"initial_state of the .* was replaced.*a row of its own"):
        model(IDS, borders=borders, **({"labels": IDS} if labels else {}))


def test_conventions_of_transformers() -> None:
    model = model_of()
    model.__class__ = Conventional
    assert model.helper() == 3
    full = differentiate(model, "full", input_ids=IDS)
    for strategy in ("checkpoint", "reversible"):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
    assert_like_full(model)


@pytest.mark.parametrize("name", ["forward", "normalize", "typed_blocks"])
def test_a_declared_subclass_of_the_base_model(name: str) -> None:
    def other(self: Any, *given: Any, **named: Any) -> Any:
        return getattr(RwkvRevModel, name)(self, *given, **named)

    model = model_of()
    model.model.__class__ = position_wise(type("Mine", (RwkvRevModel,), {name: other}))
    assert_refused(model, rf"Mine\.{name}")


def test_our_own_models_override_nothing() -> None:
    for version in ("4", "5.2", "6", "7"):
        model = model_of(version)
        assert not list(overridden(model, inside=False)) and not list(overridden(model.model, inside=True))


def subclass(base: type, *names: str) -> type:
    """Overrides each, and doubles what comes of a chunk."""

    def of(name: str) -> Any:
        return lambda self, *given, **named: larger(getattr(base, name)(self, *given, **named))

    return type("Mine", (base,), {name: of(name) for name in names})


ALONE = [
    (ChannelMix, "step"),
    (TimeMixRwkv5, "step"),
    (TimeMixRwkv5, "replay"),
    (TimeMixRwkv5, "values"),
    (TimeMixRwkv5, "update"),
]


@pytest.mark.parametrize("as_declared", [False, True], ids=["undeclared", "declared"])
@pytest.mark.parametrize(("base", "name"), ALONE)
def test_a_cell_that_overrides_one_way_alone(base: type, name: str, as_declared: bool) -> None:
    model = model_of()
    cell = model.blocks[1].channel_mix if base is ChannelMix else model.blocks[1].time_mix
    cell.__class__ = kind = subclass(base, name)
    kind.norms_of_tokens = base.norms_of_tokens  # type: ignore[attr-defined]
    if as_declared:
        position_wise(kind)
    assert_refused(model, rf"the overridden {name} of Mine at model\.blocks\.1")


def test_a_block_that_overrides_one_way_alone() -> None:
    model = model_of()
    model.model.blocks[1].__class__ = subclass(Block, "_replay")
    assert_refused(model, r"the overridden _replay of Mine at model\.blocks\.1")


class Around(nn.Module):
    """What people put around a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **named: Any) -> Any:
        return larger(self.inner(*given, **named))


@pytest.mark.parametrize("own", [{}, {"lift": larger}], ids=["forward", "forward and lift"])
@pytest.mark.parametrize("as_declared", [False, True], ids=["undeclared", "declared"])
@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.time_mix", "blocks.1.channel_mix"])
def test_a_module_around_a_layer(place: str, as_declared: bool, own: dict[str, Any]) -> None:
    """It trains under ``full``, with activation checkpointing too."""
    model, kind = model_of(), type("Around", (Around,), own)
    if as_declared:
        position_wise(kind)
    model.model.set_submodule(place, kind(model.model.get_submodule(place)))
    assert_refused(
        model,
        rf"Around at model\.{place} .*stands in the place of a whole block or cell, .* a hook on",
        works="",
    )


def test_an_adapter_around_a_layer_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of peft's, what is said goes by its class."""
    monkeypatch.setattr(adapters, "is_of_peft", lambda code: code is Around)
    model = model_of()
    model.model.blocks[1].time_mix = Around(model.model.blocks[1].time_mix)
    with (
        model.set_bptt("reversible", chunk_length=CHUNK),
        pytest.raises(StrategyError, match=r"Around at model\.blocks\.1\.time_mix is not known to treat"),
    ):
        model(IDS, labels=IDS)


class HandingOn(Around):
    def __getattr__(self, name: str) -> Any:
        inner = self._modules["inner"]
        return inner if name == "inner" else getattr(inner, name)


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.time_mix", "blocks.1.channel_mix"])
def test_a_module_around_a_layer_that_hands_on_its_attributes(place: str) -> None:
    model = model_of()
    model.model.set_submodule(place, HandingOn(model.model.get_submodule(place)))
    with (
        model.set_bptt("reversible", chunk_length=CHUNK),
        pytest.raises(StrategyError, match="position_wise"),
    ):
        model(IDS, labels=IDS)
    position_wise(model.model.get_submodule(place))
    full = differentiate(model, "full", input_ids=IDS)
    for strategy in ("checkpoint", "reversible"):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.channel_mix"])
def test_an_identity_is_no_layer(place: str) -> None:
    model = model_of()
    model.model.set_submodule(place, nn.Identity())
    with (
        model.set_bptt("reversible", chunk_length=CHUNK),
        pytest.raises(StrategyError, match=r"is left out by .*config\.num_hidden_layers"),
    ):
        model(IDS, labels=IDS)
    model.model.blocks = nn.ModuleList([model.model.blocks[0]])
    full = differentiate(model, "full", input_ids=IDS)
    assert_agree(differentiate(model, "reversible", CHUNK, input_ids=IDS), full, AGREE)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_on_the_base_model(kind: str) -> None:
    model = model_of()
    getattr(model.model, f"register_{kind}_hook")(position_wise(lambda *_: None))
    assert_refused(
        model,
        "the hook .* on model is not called by every strategy.*: put it on the model with the head",
        works="",
    )


class OwnByHalves(ReversibleCell):
    """A cell of one's own whose subclasses say how to go on."""

    def step(self, x: Tensor, state: Any, mask: Any = None) -> Any:
        raise NotImplementedError


class Own(OwnByHalves):
    def step(self, x: Tensor, state: Any, mask: Any = None) -> Any: ...
    def advance(self, x: Tensor, state: Any, mask: Any = None) -> Any: ...
    def replay(self, x: Tensor, state: Any, remnant: Any, mask: Any = None) -> Any: ...
    def retreat(self, x: Tensor, state: Any, remnant: Any, mask: Any = None) -> Any: ...
    def values(self, state: Any) -> Any: ...
    def project(self, x: Tensor) -> Any: ...


def test_which_cells_are_whole() -> None:
    steps = ("step", "advance", "replay", "retreat")
    memories = ("update", "advance_memory", "retreat_memory")
    for base, names, expected in (
        (TimeMixRwkv5, steps, None),
        (TimeMixRwkv5, memories, None),
        (TimeMixRwkv5, (*steps, "exact", "values"), None),
        (TimeMixRwkv5, ("project", "output_of", "log_decay"), None),
        (TimeMixRwkv5, steps[:3], "step"),
        (TimeMixRwkv5, memories[:2], "update"),
        (StatelessCell, ("compute",), None),
        (StatelessCell, ("step",), "step"),
        (Own, ("step",), "step"),
        (Own, ("retreat", "advance"), "advance"),
        (Own, steps, None),
        (Own, ("project",), None),
        (OwnByHalves, steps[1:], None),
        (Own, ("values",), "values"),
        (Own, (*steps, "exact"), None),
    ):
        assert overridden_alone(subclass(base, *names)) == expected, names
    for own in (TimeMixRwkv5, Block, nn.Linear, Own):
        assert overridden_alone(own) is None
    mixin = type("Mixin", (), {"step": lambda self, *given: None})
    assert overridden_alone(type("Mixed", (mixin, Own), {})) == "step"
    assert overridden_alone(type("Whole", (mixin, OwnByHalves), dict.fromkeys(steps[1:]))) is None


def test_a_cell_that_overrides_what_every_way_calls() -> None:
    class Mine(ChannelMix):
        def output_of(self, projection: Any, read: Tensor) -> Tensor:
            return 1.5 * super().output_of(projection, read)

    model = model_of("4")
    plain = differentiate(model, "full", input_ids=IDS).loss
    model.blocks[1].channel_mix.__class__ = Mine
    assert not strangers(model).unknown
    full = differentiate(model, "full", input_ids=IDS)
    assert abs(float(full.loss - plain)) > 1e-6
    for strategy in ("checkpoint", "reversible"):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), full, AGREE)
