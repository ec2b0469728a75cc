"""Hooks, modules and replaced forwards of others: heard alike by every strategy, or refused by name."""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, Outcome, assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.search import strangers

CHUNK = 8
IDS = random_tokens(20, batch=2)
CHUNKED = ("checkpoint", "reversible", "truncated")

AGREE = 1e-10
"""In float64."""


def model_of(version: str = "5.2") -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64)


def assert_like_full(model: RwkvRevForCausalLM, **inputs: Any) -> Outcome:
    """Both exact strategies, in a first, an inner and a shorter last chunk, agree with ``full``, whose outcome it
    gives."""
    full = differentiate(model, "full", input_ids=IDS, **inputs)
    for strategy in ("checkpoint", "reversible"):
        assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS, **inputs), full, AGREE)
    return full


def direction(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def steer(module: nn.Module, given: Any, output: Any) -> Any:
    """A steering vector, on a tensor or on the first of several outputs (a stream: the residual)."""
    if isinstance(output, Tensor):
        return output + direction(16)
    return (steer(module, given, output[0]), *output[1:])


PLACES = [
    "blocks.0",
    "blocks.1",
    "blocks.1.time_mix",
    "blocks.0.channel_mix",
    "blocks.0.ln2",
    "embeddings",
    "ln_out",
]


@pytest.mark.parametrize(
    ("place", "version"),
    [(place, VERSIONS[(i + turn) % len(VERSIONS)]) for i, place in enumerate(PLACES) for turn in (0, 3)],
)
def test_a_declared_hook_is_heard_everywhere(version: str, place: str) -> None:
    """Each place in two generations, in turns."""
    model = model_of(version)
    with torch.no_grad():
        plain = model(IDS, labels=IDS).loss
    model.model.get_submodule(place).register_forward_hook(
        rwkv_rev.position_wise(lambda *given: steer(*given))
    )
    full = assert_like_full(model)
    assert abs(float(full.loss - plain)) > 1e-4
    with torch.no_grad():
        for strategy in ("full", "auto", "reversible", "truncated"):
            with model.set_bptt(strategy, chunk_length=CHUNK):
                torch.testing.assert_close(model(IDS, labels=IDS).loss, full.loss, rtol=1e-6, atol=0)
        with model.set_bptt("reversible", chunk_length=CHUNK):
            chunked = model(IDS).logits
    torch.testing.assert_close(chunked, model(IDS).logits, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("place", ["blocks.0", "blocks.1.time_mix"])
def test_a_declared_pre_hook_and_a_backward_hook(place: str) -> None:
    model = model_of()
    module = model.model.get_submodule(place)
    module.register_forward_pre_hook(
        rwkv_rev.position_wise(lambda module, given: (given[0] * 1.1, *given[1:]))
    )
    handle = module.register_full_backward_hook(
        rwkv_rev.position_wise(lambda module, to_inputs, to_outputs: (to_inputs[0] * 0.5, *to_inputs[1:]))
    )
    halved = assert_like_full(model).gradients
    handle.remove()
    whole = assert_like_full(model).gradients
    assert any(not torch.equal(halved[name], whole[name]) for name in whole)


def test_the_class_of_a_module_may_be_declared() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.factor = inner, nn.Parameter(2 + direction(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.inner(x)

    model = model_of()
    model.blocks[1].time_mix.key = Scaled(model.blocks[1].time_mix.key)
    with pytest.raises(StrategyError, match=r"Scaled at model\.blocks\.1\.time_mix\.key"):
        differentiate(model, "reversible", CHUNK, input_ids=IDS)
    rwkv_rev.position_wise(Scaled)
    assert assert_like_full(model).gradients["model.blocks.1.time_mix.key.factor"].all()


def replaced_forward(model: RwkvRevForCausalLM) -> None:
    block = model.blocks[0]
    inner = block.forward
    block.forward = lambda *arguments: inner(*arguments)  # type: ignore[method-assign]


def global_hook(model: RwkvRevForCausalLM) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(lambda module, given, output: None).remove


STRANGE: dict[str, tuple[Callable[[RwkvRevForCausalLM], Any], str]] = {
    "forward hook": (lambda m: m.blocks[1].register_forward_hook(steer), r"hook steer on model\.blocks\.1"),
    "hook on a cell": (
        lambda m: m.blocks[0].time_mix.register_forward_hook(steer),
        r"hook steer on model\.blocks\.0\.time_mix",
    ),
    "hook with kwargs": (
        lambda m: m.head.register_forward_hook(lambda m, a, k, o: o, with_kwargs=True),
        r"hook .*lambda.* on head",
    ),
    "pre-hook": (
        lambda m: m.model.ln0.register_forward_pre_hook(lambda m, a: a),
        r"hook .*lambda.* on model\.ln0",
    ),
    "backward hook": (
        lambda m: m.blocks[0].register_full_backward_hook(lambda m, a, b: None),
        r"hook .*lambda.* on model\.blocks\.0",
    ),
    "backward pre-hook": (
        lambda m: m.blocks[0].ln1.register_full_backward_pre_hook(lambda m, a: None),
        r"hook .*lambda.* on model\.blocks\.0\.ln1",
    ),
    "global hook": (global_hook, r"the global hook .*lambda"),
    "replaced forward": (replaced_forward, r"replaced forward of model\.blocks\.0"),
    "batch norm": (
        lambda m: setattr(m.blocks[0], "ln1", nn.BatchNorm1d(16)),
        r"BatchNorm1d at model\.blocks\.0\.ln1",
    ),
    "recurrent layer": (
        lambda m: setattr(m.blocks[0].time_mix, "key", nn.LSTM(16, 16)),
        r"LSTM at model\.blocks\.0\.time_mix\.key",
    ),
    "compiled in place": (lambda m: m.blocks[0].compile(), r"compiled call of model\.blocks\.0"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    strange, words = STRANGE[name]
    model = model_of()
    undo = strange(model)
    try:
        for strategy in CHUNKED:
            with pytest.raises(StrategyError, match=words) as error:
                differentiate(model, strategy, CHUNK, input_ids=IDS)
            assert "position_wise" in str(error.value) and "\n" not in str(error.value)
    finally:
        if callable(undo):
            undo()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_hook_that_looks_at_positions_is_right_where_it_runs() -> None:
    """Not in chunks: ``full``, evaluation and logits see the whole context whatever its length."""
    model = model_of()

    def at_ten(module: nn.Module, given: Any, output: Any) -> Any:
        out = output[0].clone()
        out[:, 10] += 1.0
        return (out, *output[1:])

    model.blocks[0].register_forward_hook(at_ten)
    full = differentiate(model, "full", input_ids=IDS)
    with torch.no_grad(), model.set_bptt("auto", chunk_length=CHUNK):
        torch.testing.assert_close(model(IDS, labels=IDS).loss, full.loss, rtol=1e-9, atol=0)
        logits = model(IDS).logits
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-9, atol=1e-12)


def test_hooks_of_the_base_model_are_heard_by_full() -> None:
    model = model_of()
    plain = differentiate(model, "full", input_ids=IDS).loss

    def louder(module: nn.Module, given: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.model.register_forward_hook(louder)
    loud = differentiate(model, "full", input_ids=IDS).loss
    assert abs(float(loud - plain)) > 1e-3
    with torch.no_grad(), model.set_bptt("reversible", chunk_length=CHUNK):
        torch.testing.assert_close(model(IDS, labels=IDS).loss, loud, rtol=1e-9, atol=0)


def test_hooks_of_well_known_tools_need_no_declaration() -> None:
    model = model_of()
    model.enable_input_require_grads()
    model.model.embeddings.requires_grad_(False)
    weight_norm_of = pytest.warns(FutureWarning, match="weight_norm")
    with weight_norm_of:
        weight_norm(model.blocks[0].time_mix.key)
    parametrizations.orthogonal(model.blocks[1].channel_mix.receptance)
    assert strangers(model)[:3] == ([], [], True)
    assert strangers(model_of())[:3] == ([], [], False)
    full = assert_like_full(model)
    assert "model.blocks.0.time_mix.key.weight_g" in full.gradients
    assert "model.blocks.1.channel_mix.receptance.parametrizations.weight.original" in full.gradients


@pytest.mark.parametrize("strategy", CHUNKED)
def test_a_trainable_tensor_beside_a_frozen_model_is_refused(strategy: str) -> None:
    """As steering vectors are trained: nothing in the model is, so its loss would have no gradient at all."""
    model = model_of().requires_grad_(False)
    vector = direction(16).requires_grad_()

    def add(module: nn.Module, given: Any, output: Any) -> Any:
        return output + vector

    model.get_submodule("model.ln_out").register_forward_hook(add)
    with pytest.raises(StrategyError, match="is not known to treat each position by itself"):
        differentiate(model, strategy, CHUNK, input_ids=IDS)
    rwkv_rev.position_wise(add)
    with pytest.raises(StrategyError, match=r"a tensor of shape \[16\] .* nn\.Parameter"):
        differentiate(model, strategy, CHUNK, input_ids=IDS)
    vector.requires_grad_(False)
    with model.set_bptt(strategy, chunk_length=CHUNK):
        frozen = model(IDS, labels=IDS).loss
    assert not frozen.requires_grad
    with model.set_bptt("full"):
        torch.testing.assert_close(frozen, model(IDS, labels=IDS).loss, rtol=1e-7, atol=0)


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
def test_what_stands_in_the_place_of_the_norm_of_heads(version: str) -> None:
    """``ln_x`` is computed by its formula only where nobody has wrapped or hooked it."""
    model = model_of(version)
    plain = assert_like_full(model)
    for block in model.blocks:
        block.time_mix.ln_x = nn.Sequential(block.time_mix.ln_x)
    wrapped = assert_like_full(model)
    assert wrapped.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    for block in model.blocks:
        block.time_mix.ln_x[0].register_forward_hook(
            rwkv_rev.position_wise(lambda module, given, output: -output)
        )
    hooked = assert_like_full(model)
    assert hooked.loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def test_cached_parametrizations() -> None:
    """A weight computed once, in the sweep without graph, must not be taken for the one that gets the gradient."""
    model = model_of()
    parametrize.register_parametrization(model.blocks[0].time_mix.receptance, "weight", Symmetric())
    expected = assert_like_full(model)
    name = "model.blocks.0.time_mix.receptance.parametrizations.weight.original"
    assert expected.gradients[name].any()
    with parametrize.cached():
        model.blocks[0].time_mix.receptance.weight  # noqa: B018 (in the cache now)
        for strategy in ("checkpoint", "reversible"):
            assert_agree(differentiate(model, strategy, CHUNK, input_ids=IDS), expected, AGREE)


@pytest.mark.parametrize("name", ["model.ln_out.bias", "model.blocks.0.time_mix.time_decay", "head.weight"])
def test_a_trainable_buffer_is_refused(name: str) -> None:
    model = model_of()
    module, _, attribute = name.rpartition(".")
    value = model.get_parameter(name).detach().clone().requires_grad_()
    delattr(model.get_submodule(module), attribute)
    model.get_submodule(module).register_buffer(attribute, value)
    for strategy in CHUNKED:
        with pytest.raises(StrategyError, match=r"nn\.Parameter"):
            differentiate(model, strategy, CHUNK, input_ids=IDS)


@pytest.mark.parametrize("place", ["model.blocks.0", "model.embeddings", "head", "model.ln_out"])
def test_a_trainable_tensor_beside_the_parameters_is_refused(place: str) -> None:
    model = model_of()
    size = 32 if place == "head" else 16
    vector = direction(size).requires_grad_()

    @rwkv_rev.position_wise
    def add(module: nn.Module, given: Any, output: Any) -> Any:
        return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])

    handle = model.get_submodule(place).register_forward_hook(add)
    for strategy in CHUNKED:
        with pytest.raises(StrategyError, match=rf"a tensor of shape \[{size}\] .* nn\.Parameter"):
            differentiate(model, strategy, CHUNK, input_ids=IDS)
    if place == "head":  # the head's gradients are finished beside autograd's graph under ``full`` as well
        with pytest.raises(StrategyError, match=r"nn\.Parameter"):
            differentiate(model, "full", input_ids=IDS)
    else:
        differentiate(model, "full", input_ids=IDS)
        assert vector.grad is not None
    handle.remove()
    # the advice works
    registered = nn.Parameter(vector.detach())
    model.model.register_parameter("vector", registered)
    vector = registered
    model.get_submodule(place).register_forward_hook(add)
    assert assert_like_full(model).gradients["model.vector"].all()


def test_neftune_adds_to_a_chunk_what_it_adds_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise shrinks with the length that the hook sees; here the same noise is drawn for both."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = model_of()
    whole = torch.rand(2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = itertools.count()
    starts: list[int] = []

    def uniform(self: Tensor, low: Any, high: Any) -> Tensor:
        start = starts[next(place)]
        return self.copy_(low + (high - low) * whole[:, start : start + self.shape[1]])

    monkeypatch.setattr(Tensor, "uniform_", uniform)
    model.model.embeddings.neftune_noise_alpha = 5
    model.model.embeddings.register_forward_hook(neftune_post_forward_hook)
    starts = [0]
    full = differentiate(model, "full", input_ids=IDS)
    for strategy in ("checkpoint", "reversible"):
        place, starts = itertools.count(), [0, 8, 16, 8, 0]
        assert_agree(
            differentiate(model, strategy, CHUNK, input_ids=IDS), full, 1e-6
        )  # the hook scales in float32
    assert model.model.embeddings.neftune_noise_alpha == 5
    place, starts = itertools.count(), [0, 8, 16]
    differentiate(model, "truncated", CHUNK, input_ids=IDS)
    assert next(place) == 3


@pytest.mark.parametrize("place", ["model.blocks.0.time_mix.key", "head"])
def test_spectral_norm_is_refused(place: str) -> None:
    """In training it moves its vectors at every call: chunks would see other weights. In eval mode it is exact."""
    model = model_of()
    layer = parametrizations.spectral_norm(model.get_submodule(place))
    for strategy in CHUNKED:
        with pytest.raises(
            StrategyError, match=r"was written to while the loss was computed, .* use bptt='full'"
        ):
            differentiate(model, strategy, CHUNK, input_ids=IDS)
    layer.eval()
    assert_like_full(model)


# --- code that hides --------------------------------------------------------------------------------------------------


def mean_of_all(x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True)


@pytest.mark.parametrize("way", ["patched, then hooked", "hooked, then patched", "a hook among accelerate's"])
def test_code_behind_hooks_of_accelerate_is_refused(way: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = model_of()
    key = model.blocks[1].channel_mix.key

    class Mean(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return mean_of_all(output)

    def patch() -> None:
        forward = key.forward
        key.forward = lambda x: mean_of_all(forward(x))

    if way.startswith("patched"):
        patch()
    hooks.add_hook_to_module(key, hooks.AlignDevicesHook(execution_device="cpu"))
    if not way.startswith("patched"):
        assert not strangers(model).unknown, "accelerate's own hook is known"
    if way.startswith("hooked"):
        patch()
    if way.startswith("a hook"):
        hooks.add_hook_to_module(key, Mean(), append=True)
    for strategy in CHUNKED:
        with pytest.raises(
            StrategyError, match=r"the replaced forward of model\.blocks\.1\.channel_mix\.key"
        ):
            differentiate(model, strategy, CHUNK, input_ids=IDS)


def test_a_declared_class_does_not_speak_for_its_subclasses() -> None:
    @rwkv_rev.position_wise
    class Declared(nn.Linear):
        pass

    class Other(Declared):
        def forward(self, x: Tensor) -> Tensor:
            return mean_of_all(super().forward(x))

    model = model_of()
    for layer, known in ((Declared, True), (Other, False)):
        model.blocks[1].channel_mix.key = layer(16, 32, bias=False, dtype=torch.float64)
        assert bool(strangers(model).unknown) is not known
    with pytest.raises(StrategyError, match=r"Other at model\.blocks\.1\.channel_mix\.key"):
        differentiate(model, "reversible", CHUNK, input_ids=IDS)


@pytest.mark.parametrize("place", ["model.blocks.1.time_mix project", "model embed", " embed", " normalize"])
def test_replaced_methods_are_refused(place: str) -> None:
    """Strategies call more than ``forward``: methods of cells and of the models, replaced on an instance."""
    model = model_of()
    path, name = place.split(" ")
    owner = model.get_submodule(path)
    method = getattr(owner, name)
    setattr(owner, name, lambda *given: method(*given))
    for strategy in CHUNKED:
        with pytest.raises(StrategyError, match=name):
            differentiate(model, strategy, CHUNK, input_ids=IDS)


def test_methods_of_a_subclass_are_refused() -> None:
    class Other(RwkvRevForCausalLM):
        def normalize(self, hidden: Tensor) -> Tensor:
            return 0.5 * super().normalize(hidden)

    model = model_of()
    model.__class__ = Other
    with pytest.raises(StrategyError, match=r"Other\.normalize"):
        differentiate(model, "reversible", CHUNK, input_ids=IDS)


def test_group_norm_over_positions_is_refused() -> None:
    """PyTorch's takes the second dimension for channels: on [B, C, D] it would normalise over the chunk."""
    model = model_of()
    model.blocks[0].ln1 = nn.GroupNorm(2, CHUNK, dtype=torch.float64)
    with pytest.raises(StrategyError, match=r"GroupNorm at model\.blocks\.0\.ln1"):
        differentiate(model, "reversible", CHUNK, input_ids=IDS[:, : 2 * CHUNK])


def test_embeddings_that_count_tokens_are_refused() -> None:
    model = model_of()
    model.model.embeddings.scale_grad_by_freq = True
    with pytest.raises(StrategyError, match="scale_grad_by_freq"):
        differentiate(model, "checkpoint", CHUNK, input_ids=IDS)


@pytest.mark.parametrize("name", ["time_decay", "mix_key"])
@pytest.mark.parametrize("own", [False, True], ids=["global generator", "generator of its own"])
def test_parametrizations_that_draw_decays_are_refused(own: bool, name: str) -> None:
    """Decays are read once for a sweep, and in each chunk: they must not change. Those that stay are exact."""
    generator = torch.Generator().manual_seed(0) if own else None

    class Noisy(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value + 0.1 * torch.rand(value.shape, generator=generator, dtype=value.dtype)

    class Twice(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    model = model_of()
    parametrize.register_parametrization(model.blocks[0].time_mix, name, Noisy())
    for strategy in ("checkpoint", "reversible"):
        with pytest.raises(StrategyError, match=r"TimeMixRwkv5 of layer 0 gives other .* at each look"):
            differentiate(model, strategy, CHUNK, input_ids=IDS)
    model = model_of()
    parametrize.register_parametrization(model.blocks[0].time_mix, name, Twice())
    assert_like_full(model)


def test_a_decay_that_is_drawn_and_no_plan_reads() -> None:
    """RWKV-7's is a sum of a vector and what the token says, made in each chunk, and drawn again there."""

    class Noisy(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value + 0.1 * torch.rand_like(value)

    model = model_of("7")
    parametrize.register_parametrization(model.blocks[0].time_mix, "decay_base", Noisy())
    found = []
    for strategy in ("checkpoint", "reversible"):
        torch.manual_seed(0)
        found.append(differentiate(model, strategy, CHUNK, input_ids=IDS))
    assert_agree(*found)
    model = model_of("6")
    parametrize.register_parametrization(model.blocks[0].time_mix, "decay_base", Noisy())
    with pytest.raises(StrategyError, match=r"TimeMixRwkv6 of layer 0 gives other .* at each look"):
        differentiate(model, "reversible", CHUNK, input_ids=IDS)


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_hooks_that_make_decays_are_refused(version: str) -> None:
    """``weight_norm`` of old makes the weight in each call, after a sweep has read it. Under ``full`` it is exact."""
    model = model_of(version)
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(model.blocks[1].time_mix, "time_decay")
    for strategy in ("checkpoint", "reversible"):
        with pytest.raises(StrategyError, match=r"layer 1 anew at each call.*parametrization"):
            differentiate(model, strategy, CHUNK, input_ids=IDS)
    assert differentiate(model, "full", input_ids=IDS).gradients["model.blocks.1.time_mix.time_decay_g"].any()


def test_losses_of_two_threads_take_turns() -> None:
    """Generators and PyTorch's caches belong to the process: dropout in another thread would spoil both."""
    models = [tiny_model("5.2", seed=seed) for seed in range(2)]
    for model in models:
        model.blocks[0].channel_mix.value = nn.Sequential(model.blocks[0].channel_mix.value, nn.Dropout(0.3))

    def train(model: RwkvRevForCausalLM) -> list[float]:
        losses = []
        for _ in range(4):
            with model.set_bptt("reversible", chunk_length=CHUNK):
                loss = model(IDS, labels=IDS).loss
            losses.append(loss.item())
            loss.backward()
        return losses

    with ThreadPoolExecutor(2) as pool:
        for losses in pool.map(train, models):
            assert len(losses) == 4


def test_norms_that_a_cell_gives_tokens_as_rows() -> None:
    """What the class says of itself counts; what it inherits from ours does not."""

    class Own(TimeMixRwkv5):
        pass

    class Declared(Own):
        norms_of_tokens = ("ln_x",)

    for kind, refused in ((TimeMixRwkv5, False), (Own, True), (Declared, False)):
        arguments = {"gated": True, "bonus_is_exponential": False, "group_norm_epsilon": 1e-3}
        found = strangers(nn.ModuleList([kind(2, 4, (2, 4), **arguments)]))
        assert [stranger.where for stranger in found.unknown] == ["GroupNorm at 0.ln_x"] * refused
        assert all("Own has to say of itself" in stranger.objection for stranger in found.unknown)


def test_what_is_wrapped_around_declared_code_is_not_declared() -> None:
    """``functools.wraps`` hands on a function's attributes; the one around may look at positions."""

    @rwkv_rev.position_wise
    def declared(module: Any, given: Any, output: Any) -> None:
        return None

    @functools.wraps(declared)
    def around(module: Any, given: Any, output: Any) -> Any:
        return output - output.mean(1, keepdim=True)

    @functools.wraps(Doubling())
    def around_an_object(module: Any, given: Any, output: Any) -> Any:
        return output - output.mean(1, keepdim=True)

    for hook, refused in ((declared, False), (around, True), (around_an_object, True)):
        assert bool(strangers_of(hook)) == refused
    assert not strangers_of(rwkv_rev.position_wise(around))


class Doubling:
    def __init__(self) -> None:
        rwkv_rev.position_wise(self)

    def __call__(self, module: Any, given: Any, output: Any) -> Any:
        return 2 * output


def strangers_of(hook: Any) -> list[Any]:
    model = tiny_model("5.2")
    model.blocks[0].time_mix.key.register_forward_hook(hook)
    return strangers(model).unknown
