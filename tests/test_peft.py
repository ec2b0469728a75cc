"""peft around the loss: several adapters in a batch, steps that peft takes itself, recomputed blocks, what is refused.

Every method by name is in ``tests/test_peft_methods.py``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bptt_cases import checkpoint_blocks, random_tokens, relative_error, relative_errors, tiny_model
from peft_cases import METHODS, Method, NotInThisPeft, adapted, made, settings_of, tokens
from torch import Tensor, nn

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign import adapters
from rwkv_rev.foreign.search import strangers

CHUNKED = ("reversible", "checkpoint")

# peft still uses names that transformers 5 renamed, and warns of much of its own
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning",
    "ignore::UserWarning:peft",
)


def method(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def loss_of(
    model: RwkvRevForCausalLM, wrapped: nn.Module, strategy: str, length: int = 8, **inputs: Any
) -> Tensor:
    ids = tokens()
    with model.set_bptt(strategy, chunk_length=64 if strategy == "full" else length):
        loss: Tensor = wrapped(**({"input_ids": ids, "labels": ids} | inputs)).loss
    return loss


def gradients(
    model: RwkvRevForCausalLM, wrapped: nn.Module, strategy: str, length: int = 8, **inputs: Any
) -> dict[str, Tensor]:
    wrapped.zero_grad()
    torch.manual_seed(5)
    loss_of(model, wrapped, strategy, length, **inputs).backward()
    return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}


OTHERS = [
    (version, name) for version in ("4", "5.0", "5.1") for name in ("LoRA", "LoKr", "IA3", "prompt tuning")
]


@pytest.mark.parametrize(
    ("version", "name"), [*OTHERS, ("5.0", "LoRA, modules_to_save"), ("5.1", "LoRA, modules_to_save")]
)
def test_other_versions(version: str, name: str, tmp_path: Path) -> None:
    """The table is made with 5.2; the layers are the same in the others."""
    model, wrapped = made(method(name), tmp_path, version=version)
    expected = gradients(model, wrapped, "full")
    for strategy in CHUNKED:
        assert max(relative_errors(gradients(model, wrapped, strategy), expected).values()) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [3, 7]},
        {"modules_to_save": ["embeddings"], "ensure_weight_tying": True},
        {"target_modules": ["key", "embeddings"], "ensure_weight_tying": True},
    ],
    ids=["tokens", "saved", "adapted"],
)
def test_a_head_that_is_the_embedding(settings: dict[str, Any]) -> None:
    """What is trained on the embedding is trained on the head: peft puts the same into both."""
    model = tiny_model("5.2", tie_word_embeddings=True)
    if model.head.weight is not model.model.embeddings.weight:
        pytest.skip("the head is not tied")
    try:
        config = settings_of("LoraConfig", **{"r": 4, "target_modules": ["key"]} | settings)
    except NotInThisPeft as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    wrapped.double().train()
    expected = gradients(model, wrapped, "full")
    ids = tokens()
    logits = wrapped(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    plain = torch.autograd.grad(loss, [p for p in wrapped.parameters() if p.requires_grad])
    for found, truth in zip(expected.values(), plain, strict=True):
        assert relative_error(found, truth) <= 1e-9
    for strategy in CHUNKED:
        assert max(relative_errors(gradients(model, wrapped, strategy), expected).values()) <= 1e-5


# --- several adapters in a batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoRA", "RoAd", "GLoRA"])
def test_rows_with_adapters_of_their_own(name: str, tmp_path: Path) -> None:
    """``adapter_names``: each row as alone under its adapter; evaluated and differentiated in chunks."""
    model, wrapped = made(method(name), tmp_path)
    wrapped.add_adapter("second", wrapped.peft_config["default"])
    with torch.no_grad():
        for of, parameter in wrapped.named_parameters():
            if ".second" in of:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    wrapped.double().eval()
    ids, names = tokens(), ["default", "second"]
    model.set_bptt("auto", chunk_length=10)
    with torch.no_grad():
        logits = wrapped(input_ids=ids, adapter_names=names).logits
        loss = wrapped(input_ids=ids, labels=ids, adapter_names=names).loss
        for row, adapter in enumerate(names):
            wrapped.set_adapter(adapter)
            alone = wrapped(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-7, atol=1e-7)
    wrapped.set_adapter("default")
    assert relative_error(logits[1:], wrapped(input_ids=ids[1:]).logits) > 1e-3
    expected = gradients(model, wrapped, "full", adapter_names=names)
    for strategy in CHUNKED:
        found = gradients(model, wrapped, strategy, adapter_names=names)
        assert max(relative_errors(found, expected).values()) <= 1e-5
        assert loss_of(model, wrapped, strategy, adapter_names=names).item() == pytest.approx(
            loss.item(), rel=1e-7
        )


@pytest.mark.parametrize("name", ["LoRA", "RoAd", "GLoRA"])
def test_a_call_that_ends_in_an_error_leaves_no_hook(name: str, tmp_path: Path) -> None:
    """What told layers whose adapter a row is for has no say in the calls after it."""
    model, wrapped = made(method(name), tmp_path)
    wrapped.double().eval()
    ids, names = tokens(), ["__base__", "default"]
    model.set_bptt("auto", chunk_length=10)
    hooks = [len(module._forward_pre_hooks) for module in wrapped.modules()]
    expected = {strategy: gradients(model, wrapped, strategy) for strategy in ("full", *CHUNKED)}
    for strategy in expected:
        with pytest.raises(ValueError, match="labels have shape"):
            loss_of(model, wrapped, strategy, labels=ids[:, :3], adapter_names=names)
        with pytest.raises(ValueError, match="other values"), torch.no_grad():
            wrapped(input_ids=ids, attention_mask=ids + 2, adapter_names=names)
        with pytest.raises(ValueError, match="max_new_tokens"):
            wrapped.generate(input_ids=ids, max_new_tokens=-1, adapter_names=names)
        assert [len(module._forward_pre_hooks) for module in wrapped.modules()] == hooks
        found = gradients(model, wrapped, strategy)
        assert found.keys() == expected[strategy].keys()
        for of, gradient in found.items():
            assert torch.equal(gradient, expected[strategy][of]), of
    by_row = gradients(model, wrapped, "full", adapter_names=names)  # the same call without an error is heard
    assert max(relative_errors(by_row, expected["full"]).values()) > 1e-3


# --- virtual tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [13, 26, 9])
@pytest.mark.parametrize("name", ["prompt tuning", "P-tuning"])
def test_virtual_tokens_before_padded_rows(name: str, length: int, tmp_path: Path) -> None:
    """With a last chunk of one token, which predicts nothing (26 + 1, 2 * 13 + 1), and padding on either side."""
    model, wrapped = made(method(name), tmp_path)
    for mask in (None, torch.ones(2, 24)):
        if mask is not None:
            mask[0, 19:] = mask[1, :7] = 0
        expected = gradients(model, wrapped, "full", attention_mask=mask)
        for strategy in CHUNKED:
            found = gradients(model, wrapped, strategy, length, attention_mask=mask)
            assert max(relative_errors(found, expected).values()) <= 1e-5


@pytest.mark.parametrize("name", ["LoRA", "prompt tuning", "P-tuning", "activated LoRA"])
@torch.no_grad()
def test_generation_from_padded_rows(name: str, tmp_path: Path) -> None:
    """Each row goes on as alone, greedily or with beams."""
    model, wrapped = made(method(name), tmp_path)
    wrapped.eval()
    model.generation_config.eos_token_id = None
    ids, mask = tokens()[:, :20], torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    if name != "activated LoRA":  # which peft refuses with beams
        options["num_beams"] = 3
    together = wrapped.generate(input_ids=ids, attention_mask=mask, **options)[:, 20:]
    for row, start in ((0, 0), (1, 6)):
        alone = ids[row : row + 1, start:]
        found = wrapped.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(found[0, 20 - start :], together[row])


# --- steps that peft takes itself -------------------------------------------------------------------------------


def allocate(wrapped: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    wrapped.base_model.update_and_allocate(step)


def lora_fa(wrapped: nn.Module) -> torch.optim.Optimizer:
    optimizers = pytest.importorskip("peft.optimizers")
    if not hasattr(optimizers, "create_lorafa_optimizer"):
        pytest.skip("peft has no LoRA-FA")
    return optimizers.create_lorafa_optimizer(wrapped, r=4, lora_alpha=8, lr=0.01)


def sgd(wrapped: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize(
    ("name", "optimizer_of", "after"),
    [
        ("LoRA", lora_fa, None),  # LoRA-FA: an optimiser that leaves A as it is
        ("AdaLoRA", sgd, allocate),  # ranks move by gradients; a regularisation is added to the loss outside
        ("OSF", sgd, None),  # gradients are projected by hooks
    ],
    ids=["LoRA-FA", "AdaLoRA", "OSF"],
)
def test_training_steps(
    name: str,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    after: Callable[[nn.Module, torch.optim.Optimizer, int], None] | None,
    tmp_path: Path,
) -> None:
    """Weights after some steps: the same as under ``full``."""
    finals = {}
    for strategy in ("full", *CHUNKED):
        model, wrapped = made(method(name), tmp_path)
        optimizer = optimizer_of(wrapped)
        for step in range(3):
            optimizer.zero_grad()
            ids = random_tokens(24, 2, seed=20 + step)
            loss_of(model, wrapped, strategy, input_ids=ids, labels=ids).backward()
            optimizer.step()
            if after is not None:
                after(wrapped, optimizer, step)
        finals[strategy] = {of: p.detach().clone() for of, p in wrapped.named_parameters() if p.requires_grad}
    _, start = made(method(name), tmp_path)
    before = dict(start.named_parameters())
    assert any(relative_error(p, before[of]) > 1e-4 for of, p in finals["full"].items())
    for strategy in CHUNKED:
        assert max(relative_errors(finals[strategy], finals["full"]).values()) <= 1e-5


# --- blocks computed again in the backward pass -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["activated LoRA", "Poly"])
def test_recomputed_blocks_need_their_hooks(name: str, tmp_path: Path) -> None:
    """peft takes them off before the backward pass: refused by name, not by a tensor of another shape."""
    model, wrapped = made(method(name), tmp_path)
    checkpoint_blocks(model)
    with pytest.raises(StrategyError, match="train without gradient checkpointing"):
        loss_of(model, wrapped, "full", **method(name).inputs)


@pytest.mark.parametrize("name", ["Poly", "LoKr", "VeLoRA, random", "Arrow"])
def test_recomputed_blocks_in_chunks(name: str, tmp_path: Path) -> None:
    """The sweeps go backward inside the forward pass, when all hooks are there: as without recomputing, draws too."""
    model, wrapped = made(method(name), tmp_path, draws=True)
    inputs = method(name).inputs
    expected = {strategy: gradients(model, wrapped, strategy, **inputs) for strategy in CHUNKED}
    checkpoint_blocks(model)
    for strategy in CHUNKED:
        found = gradients(model, wrapped, strategy, **inputs)
        assert max(relative_errors(found, expected[strategy]).values()) <= 1e-9


# --- what is refused, and what is not right ---------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible", "reversible-lossy", "truncated"])
@pytest.mark.parametrize("place", ["model.blocks.0.time_mix.key", "model.blocks.1.channel_mix.value", "head"])
def test_an_adapter_of_nan(place: str, strategy: str) -> None:
    """The loss is NaN, as under ``full``; it is no mismatch of the sweeps."""
    model = tiny_model("5.2")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["key", "value", "head"])
    ).train()
    with torch.no_grad():
        model.get_submodule(place).lora_B["default"].weight[0, 0] = float("nan")
    loss = loss_of(model, wrapped, strategy, 6)
    assert loss.isnan()
    loss.backward()


def test_a_layer_of_peft_that_was_not_tested() -> None:
    """Being peft's own is not enough; a declaration helps, as for anybody's code."""
    from peft.tuners.lora.layer import Linear

    model = tiny_model("5.2")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["key"]))
    new = type("Linear", (Linear,), {"__module__": "peft.tuners.newest.layer"})
    model.blocks[1].time_mix.key.__class__ = new
    found = strangers(model)
    assert [where for where, _ in found.unknown] == ["Linear at model.blocks.1.time_mix.key"]
    with pytest.raises(StrategyError, match="is not known to treat each position by itself"):
        loss_of(model, model, "reversible")
    rwkv_rev.position_wise(new)
    loss_of(model, model, "reversible").backward()


def test_only_what_is_active_is_refused(tmp_path: Path) -> None:
    """An activated LoRA beside the one in use, or one that is switched off, does nothing."""
    model, wrapped = made(method("LoRA"), tmp_path)
    try:
        called = settings_of("LoraConfig", r=4, target_modules=["key"], alora_invocation_tokens=[3, 4])
    except NotInThisPeft as error:
        pytest.skip(str(error))
    wrapped.add_adapter("called", called)
    wrapped.double()
    expected = gradients(model, wrapped, "full")
    assert max(relative_errors(gradients(model, wrapped, "reversible"), expected).values()) <= 1e-5
    model, wrapped = made(method("Lily"), tmp_path)
    with wrapped.disable_adapter():
        model.model.ln_out.requires_grad_(True)
        loss_of(model, wrapped, "reversible").backward()


def test_cpt_with_logits(tmp_path: Path) -> None:
    """CPT computes its own loss from logits, which are made beside ours when asked for; else it says so."""
    model, wrapped = made(method("CPT"), tmp_path)
    loss = loss_of(model, wrapped, "full", return_logits=True)
    assert loss.requires_grad
    for options in ({"strategy": "full"}, {"strategy": "reversible"}):
        with pytest.raises(StrategyError, match="pass return_logits=True, with bptt='full'"):
            loss_of(model, wrapped, **options)
    with pytest.raises(StrategyError, match="return_logits needs bptt='full'"):
        loss_of(model, wrapped, "reversible", return_logits=True)


def test_names_of_layers_are_those_that_were_tested(tmp_path: Path) -> None:
    """No layer is let through that no case has, so that a name is not added without a test."""
    seen: set[str] = set()
    missing: list[Method] = []
    for case in METHODS:
        if case.training != "exact" and case.evaluation != "in chunks":
            continue
        try:
            model, _ = adapted(case, tmp_path, draws=case.draws != "never")
        except (ImportError, NotInThisPeft):
            missing.append(case)
            continue
        for module in model.modules():
            for part in (type(module), *map(type, getattr(module, "lora_variant", {}).values())):
                if part.__module__.startswith("peft."):
                    seen.add(f"{part.__module__}.{part.__qualname__}".removeprefix("peft."))
    assert seen <= adapters.LAYERS | adapters.REFUSED.keys()
    layers = {"AdaMSS": "tuners.adamss.layer.Linear", "Bone": "tuners.bone.layer.BoneLinear"}
    unseen = {layers.get(case.name) for case in missing if case.name != "CorDA"}
    if None not in unseen:  # else peft is older, and has fewer layers
        of_bits = {f"tuners.lora.bnb.Linear{kind}" for kind in ("4bit", "8bitLt")}  # tests/test_quantised.py
        assert adapters.LAYERS - seen - of_bits == unseen


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_default_target_modules(version: str) -> None:
    """Whoever names none gets every linear map of both cells."""
    model = tiny_model(version)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted = {
        name.split(".lora_A")[0].split("blocks.")[1]
        for name, _ in wrapped.named_parameters()
        if "lora_A" in name
    }
    maps = {
        name.removesuffix(".base_layer").split("blocks.")[1]
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "blocks." in name and "lora" not in name
    }
    assert adapted == maps
    assert all(kind in str(maps) for kind in ("receptance", "key", "value", "output"))
