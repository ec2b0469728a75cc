"""What transformers' conventions ask of any model: settings of the configuration, tuples, recomputed layers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import AGREE, assert_agree, differentiate, random_tokens, relative_error, tiny_model
from pairwise import every_two
from torch.utils.checkpoint import checkpoint

from rwkv_rev.errors import StrategyError
from rwkv_rev.modeling import RwkvRevForCausalLM

TOKENS = random_tokens(10, batch=2)

# --- the configuration's settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [True, False], ids=["base", "language model"])
def test_hidden_states_by_configuration(base: bool) -> None:
    whole = tiny_model("5.2").eval()
    model = whole.model if base else whole
    asked = model(TOKENS, output_hidden_states=True).hidden_states
    assert len(asked) == 3
    assert model(TOKENS).hidden_states is None
    model.config.output_hidden_states = True
    for found, expected in zip(model(TOKENS).hidden_states, asked, strict=True):
        assert torch.equal(found, expected)
    assert model(TOKENS, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("base", [True, False], ids=["base", "language model"])
def test_tuples(base: bool) -> None:
    whole = tiny_model("5.2").eval()
    model = whole.model if base else whole
    expected = model(TOKENS)
    found = model(TOKENS, return_dict=False)
    assert type(found) is tuple
    assert torch.equal(found[0], expected[0])
    model.config.return_dict = False
    assert torch.equal(model(TOKENS)[0], expected[0])
    assert type(model(TOKENS)) is tuple
    assert torch.equal(model(TOKENS, return_dict=True)[0], expected[0])


@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_losses_where_the_configuration_asks_for_tuples(strategy: str) -> None:
    model = tiny_model("5.2")
    expected = differentiate(model, strategy, 4, input_ids=TOKENS)
    model.config.return_dict = False
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=4):
        loss = model(TOKENS, labels=TOKENS)[0]
    loss.backward()
    assert loss == expected.loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected.gradients[name])
    assert model.eval().generate(TOKENS, max_new_tokens=2, pad_token_id=0).shape == (2, 12)


@pytest.mark.parametrize("initial", [True, False])
def test_what_stays_float32_is_there(initial: bool) -> None:
    model = tiny_model("5.2", has_initial_state=initial)
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    for found in (model, model.model):
        assert found._keep_in_fp32_modules_strict <= names
        assert ("initial_wkv" in found._keep_in_fp32_modules_strict) == initial


# --- activation checkpointing -----------------------------------------------------------------------------------


def counting(calls: list[int]) -> Callable[..., Any]:
    """``checkpoint`` that counts its calls."""

    def count(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return checkpoint(*arguments, **settings)

    return count


@pytest.mark.parametrize(("every", "blocks"), [(1, 4), (2, 2), (3, 2)])
@pytest.mark.parametrize(("strategy", "chunks"), [("full", 1), ("reversible", 3), ("checkpoint", 3)])
def test_the_given_function_recomputes_every_nth_block(
    strategy: str, chunks: int, every: int, blocks: int
) -> None:
    model = tiny_model("5.1", num_hidden_layers=4)
    expected = differentiate(model, strategy, 4, input_ids=TOKENS)
    calls: list[int] = []
    model._set_gradient_checkpointing(
        gradient_checkpointing_func=partial(counting(calls)), every_n_layers=every
    )
    assert_agree(differentiate(model, strategy, 4, input_ids=TOKENS), expected)
    assert len(calls) == blocks * chunks
    model.eval()
    model(TOKENS)
    assert len(calls) == blocks * chunks


@pytest.mark.parametrize("settings", [None, {}, {"preserve_rng_state": False}, {"determinism_check": "none"}])
def test_settings_are_handed_on(settings: dict[str, Any] | None) -> None:
    model = tiny_model("4")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)
    for block in model.blocks:
        given = block.recompute.keywords
        assert given["use_reentrant"] is False
        assert {k: v for k, v in given.items() if k != "use_reentrant"} == (settings or {})
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    assert all(block.recompute is None for block in model.blocks)


def offloaded(*arguments: Any, **settings: Any) -> Any:
    """As transformers offloads what is kept, without pinned memory."""
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(*arguments, **settings)


@pytest.mark.parametrize(
    "function", [partial(checkpoint, use_reentrant=True), partial(offloaded)], ids=["reentrant", "offloaded"]
)
@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_reentrant_and_offloaded_recomputation_give_the_gradient(
    strategy: str, function: Callable[..., Any]
) -> None:
    """Of a state that requires gradients too, where the reentrant way of PyTorch would give none."""
    model = tiny_model("5.2", dtype=torch.float64)
    with torch.no_grad():
        state = model(TOKENS).state
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            model._set_gradient_checkpointing(gradient_checkpointing_func=function)
        for tensor in state.tensors():
            tensor.requires_grad_().grad = None
        found = differentiate(model, strategy, 4, input_ids=TOKENS, state=state)
        gradients.append(found.gradients | {"state": state.wkv.grad.clone()})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < AGREE, name


# --- weights that are on the device only while their module is called -----------------------------------------------


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model("5.2").save_pretrained(folder)
    return folder


@pytest.fixture(params=["a block", "the head"])
def offloaded_model(request: pytest.FixtureRequest, saved_model: Path, tmp_path: Path) -> tuple[Any, Any]:
    """A model of 2 layers with one module on the disk, and the same in memory."""
    places = dict.fromkeys(("model.embeddings", "model.ln0", "model.ln_out", "head"), "cpu")
    places |= {"model.blocks.0": "cpu", "model.blocks.1": "cpu"}
    places["model.blocks.1" if request.param == "a block" else "head"] = "disk"
    load = RwkvRevForCausalLM.from_pretrained
    offloaded = load(saved_model, device_map=places, offload_folder=tmp_path / "offload")
    return offloaded, load(saved_model)


def test_offloaded_models_evaluate_and_generate(offloaded_model: tuple[Any, Any]) -> None:
    offloaded, whole = offloaded_model
    with torch.no_grad():
        found, expected = (model(TOKENS, labels=TOKENS) for model in offloaded_model)
        assert relative_error(offloaded(TOKENS).logits, whole(TOKENS).logits) < AGREE
    assert relative_error(found.loss, expected.loss) < AGREE
    found, expected = (model.generate(TOKENS, max_new_tokens=4, pad_token_id=0) for model in offloaded_model)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strategy", ["full", "reversible", "checkpoint", "truncated"])
def test_offloaded_parameters_are_not_trained_in_silence(
    offloaded_model: tuple[Any, Any], strategy: str
) -> None:
    model, _ = offloaded_model
    with (
        model.set_bptt(strategy, chunk_length=5),
        pytest.raises(StrategyError, match="offloaded: they get no gradient"),
    ):
        model(TOKENS, labels=TOKENS)
    with model.set_bptt("full"), pytest.raises(StrategyError, match="offloaded: they get no gradient"):
        model(TOKENS, labels=TOKENS, return_logits=True)


@pytest.mark.parametrize(
    ("strategy", "hook", "offloaded_model"),
    every_two(
        ["auto", "full", "reversible", "checkpoint", "truncated"],
        ["device_map", "cpu_offload", "disk_offload"],
        ["a block", "the head"],
    ),
    indirect=["offloaded_model"],
)
def test_offloaded_parameters_are_not_trained_by_losses_of_ones_own(
    offloaded_model: tuple[Any, Any], strategy: str, hook: str, tmp_path: Path
) -> None:
    """Logits and hidden states of any length; only the head itself is beside the hidden states.

    Every two of a strategy, a way to offload and a place meet.
    """
    import accelerate

    model, whole = offloaded_model
    if hook != "device_map":
        given = {"offload_dir": str(tmp_path / "more")} if hook == "disk_offload" else {}
        model = getattr(accelerate, hook)(whole, execution_device=torch.device("cpu"), **given)
    for length in (4, TOKENS.shape[1]):
        ids = TOKENS[:, :length]
        with model.set_bptt(strategy, chunk_length=5):
            with pytest.raises(StrategyError, match=r"offloaded: they get no gradient.*torch\.no_grad"):
                model(ids).logits.square().mean().backward()
            with torch.no_grad():
                model(ids)
            in_the_base = any(p.is_meta for p in model.model.parameters())
            if in_the_base:
                with pytest.raises(StrategyError, match="offloaded: they get no gradient"):
                    model.model(ids)
            model.requires_grad_(False)
            assert not model(ids).logits.requires_grad
            model.requires_grad_(True)


def test_frozen_offloaded_parameters_under_full(offloaded_model: tuple[Any, Any]) -> None:
    gradients = []
    for model in offloaded_model:
        model.requires_grad_(False)
        embeds = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        with model.set_bptt("full"):
            model(inputs_embeds=embeds, labels=TOKENS).loss.backward()
        gradients.append(embeds.grad)
    assert relative_error(*gradients) < AGREE
