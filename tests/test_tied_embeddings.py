"""``tie_word_embeddings``: head and embedding are one tensor, in the gradient, on the disk and in every export."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    AGREE,
    AS_CLOSE,
    VERSIONS,
    assert_agree,
    differentiate,
    random_tokens,
    relative_error,
    tiny_model,
)
from finetune_cases import counting_text, finetune, settings
from foreign import scan_of
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM, convert, export
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.equivalence.naive_model import naive_logits
from rwkv_rev.equivalence.verification import verify_directory
from rwkv_rev.errors import CheckpointError, ConfigError, StrategyError
from rwkv_rev.training.tuning import apply_tuning

STRATEGIES = ("full", "checkpoint", "reversible", "truncated")
TOKENS = random_tokens(29, batch=2)


def tied_model(version: str = "5.2", **settings: object) -> RwkvRevForCausalLM:
    return tiny_model(version, tie_word_embeddings=True, **settings)


def test_one_parameter() -> None:
    model = tied_model()
    assert model.head.weight is model.model.embeddings.weight is model.get_output_embeddings().weight
    assert "head.weight" not in dict(model.named_parameters())
    assert model.all_tied_weights_keys == {"head.weight": "model.embeddings.weight"}
    apart = tiny_model("5.2")
    assert apart.head.weight is not apart.model.embeddings.weight
    assert apart.all_tied_weights_keys == {}


def gradient_of_the_sum(version: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradient in float64 of a model whose head and embedding are two tensors of the same values, added."""
    model = tiny_model(version, dtype=torch.float64)
    values = {name: p.detach() for name, p in tied_model(version, dtype=torch.float64).named_parameters()}
    values["head.weight"] = values["model.embeddings.weight"].clone()
    leaves = {name: tensor.requires_grad_() for name, tensor in values.items()}
    logits = functional_call(model, leaves, (TOKENS,)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found["model.embeddings.weight"] += found.pop("head.weight")
    return loss.detach(), found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_the_gradient_is_that_of_both_uses(strategy: str, version: str) -> None:
    loss, expected = gradient_of_the_sum(version)
    found = differentiate(tied_model(version, dtype=torch.float64), strategy, 8, input_ids=TOKENS)
    assert relative_error(found.loss, loss) < 1e-12
    assert found.gradients.keys() == expected.keys()
    errors = {name: relative_error(found.gradients[name], gradient) for name, gradient in expected.items()}
    assert max(errors.values()) < 1e-10, errors


def test_truncated_in_one_chunk_is_the_gradient() -> None:
    model = tied_model()
    whole = differentiate(model, "full", input_ids=TOKENS)
    assert_agree(differentiate(model, "truncated", TOKENS.shape[1], input_ids=TOKENS), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adds_both_uses(dtype: torch.dtype) -> None:
    """Under autocast the head's product is in 16 bits, the embedding is not."""
    expected = gradient_of_the_sum("5.2")[1]["model.embeddings.weight"]
    errors = {}
    for strategy in STRATEGIES[:3]:
        model = tied_model()
        with torch.autocast("cpu", dtype=dtype):
            found = differentiate(model, strategy, 8, input_ids=TOKENS).gradients["model.embeddings.weight"]
        errors[strategy] = relative_error(found, expected)
    assert errors["full"] < 5e-2
    assert max(errors.values()) < AS_CLOSE * errors["full"]


def test_logits_beside_the_loss_and_a_plain_forward() -> None:
    _, expected = gradient_of_the_sum("5.2")
    for plain in (False, True):
        model = tied_model(dtype=torch.float64)
        if plain:
            logits = model(TOKENS).logits
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
            ).backward()
        else:
            model(TOKENS, labels=TOKENS, return_logits=True).loss.backward()
        found = model.model.embeddings.weight.grad
        assert relative_error(found, expected["model.embeddings.weight"]) < 1e-9


@pytest.mark.parametrize("frozen", ["embeddings", "rest"])
def test_frozen_parts(frozen: str) -> None:
    model = tied_model()
    full = differentiate(model, "full", input_ids=TOKENS).gradients
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((name == "model.embeddings.weight") == (frozen == "rest"))
    found = differentiate(model, "reversible", 8, input_ids=TOKENS).gradients
    for name, gradient in found.items():
        assert relative_error(gradient, full[name]) < AGREE
    assert len(found) == (1 if frozen == "rest" else len(full) - 1)


def test_fresh_tied_models_train() -> None:
    config = tied_model().config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert model.head.weight is model.model.embeddings.weight
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(32), rel=1e-2)
    assert losses[-1] < losses[0] / 2
    assert model.head.weight is model.model.embeddings.weight


# --- saving, loading, resizing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_round_trip(tmp_path: Path, shard: str) -> None:
    model = tied_model().eval()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    stored = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
    assert "model.embeddings.weight" in stored and "head.weight" not in stored
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_untied_models_stay_so(tmp_path: Path) -> None:
    model = tiny_model("5.2").eval()
    model.save_pretrained(tmp_path)
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path)
    assert loaded.head.weight is not loaded.model.embeddings.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_two_tensors_are_not_tied_while_loading(tmp_path: Path) -> None:
    """Which of the two is meant is not ours to choose; transformers warns and leaves them apart."""
    model = tiny_model("5.2").eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the stored head and embedding differ"):
        RwkvRevForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    config = RwkvRevConfig.from_pretrained(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="the stored head and embedding differ"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    # what the message says works
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path)
    loaded.config.tie_word_embeddings = True
    loaded.tie_weights()
    assert loaded.head.weight is loaded.model.embeddings.weight
    # equal ones are one
    with torch.no_grad():
        model.head.weight.copy_(model.model.embeddings.weight)
    model.save_pretrained(tmp_path)
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert loaded.head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("size", [40, 20])
def test_resizing(tmp_path: Path, tied: bool, size: int) -> None:
    model = tiny_model("5.2", tie_word_embeddings=tied).eval()
    tokens = TOKENS % 20
    kept = min(size, 32)
    with torch.no_grad():
        before = model(tokens).logits[..., :kept]
    model.resize_token_embeddings(size)
    assert model.vocab_size == model.config.vocab_size == size
    assert model.model.embeddings.weight.shape == model.head.weight.shape == (size, 16)
    assert (model.head.weight is model.model.embeddings.weight) == tied
    after = model(tokens).logits.detach()
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :kept], before)
    model.train()
    full = differentiate(model, "full", input_ids=tokens)
    assert_agree(differentiate(model, "reversible", 8, input_ids=tokens), full)
    model.save_pretrained(tmp_path)
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, after)


def test_a_head_that_is_the_embedding_by_assignment_alone(tmp_path: Path) -> None:
    """It trains as one that is told; a folder of it would have no head."""
    model = tiny_model("5.2").eval()
    model.head.weight = model.model.embeddings.weight
    with pytest.raises(ConfigError, match=r"set model\.config\.tie_word_embeddings = True"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "model")
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


# --- other layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_export_writes_the_head_too(tmp_path: Path, version: str) -> None:
    model = tied_model(version).eval()
    model.save_pretrained(tmp_path / "model")
    expected = model(TOKENS[:1]).logits[0].double()
    export(tmp_path / "model", tmp_path / "model.pth")
    tensors = torch.load(tmp_path / "model.pth", weights_only=True)
    assert torch.equal(tensors["head.weight"], tensors["emb.weight"])
    found = torch.cat(list(naive_logits(tensors, TOKENS[0], scan=scan_of(version))))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    export(tmp_path / "model", tmp_path / "hf", to="hf")
    for source in ("model.pth", "hf"):
        again = convert(str(tmp_path / source), tmp_path / f"{source}-again", tokenizer="none").directory
        loaded = RwkvRevForCausalLM.from_pretrained(again).eval()
        assert not loaded.config.tie_word_embeddings
        torch.testing.assert_close(loaded(TOKENS[:1]).logits[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_inspection_counts_the_tensor_once(tmp_path: Path) -> None:
    model = tied_model()
    model.save_pretrained(tmp_path)
    assert inspect_source(tmp_path).parameters == sum(p.numel() for p in model.parameters())
    with ConvertedModel(tmp_path) as stored:
        assert stored.shape("head.weight") == (32, 16)
        assert torch.equal(stored.tensor("head.weight"), model.head.weight)
        assert stored.nbytes("head.weight") == stored.nbytes("model.embeddings.weight")


def test_verification(tmp_path: Path) -> None:
    """A tied model is equal to an original in which head and embedding are equal."""
    model = tied_model("5.1", vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "original.pth")
    report = verify_directory(
        tmp_path / "model",
        original=str(tmp_path / "original.pth"),
        oracle="naive",
        tokens=60,
        gradients=True,
        reversal=True,
        context=40,
    )
    assert report.passed, report.table()
    tensors = torch.load(tmp_path / "original.pth", weights_only=True)
    tensors["head.weight"] = tensors["head.weight"] + 1e-3
    torch.save(tensors, tmp_path / "original.pth")
    report = verify_directory(
        tmp_path / "model", original=str(tmp_path / "original.pth"), oracle="naive", tokens=60
    )
    assert not report.passed
    assert report.divergence.startswith("head")


def test_a_head_that_is_missing_without_being_tied(tmp_path: Path) -> None:
    tied_model().save_pretrained(tmp_path)
    config = RwkvRevConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"lacks head\.weight"):
        ConvertedModel(tmp_path)


def test_additions_to_a_shared_head_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "data", tmp_path / "out", tune="lora", lora_targets=["head"])
    with pytest.raises(StrategyError, match="the head of this model is its embedding"):
        apply_tuning(tied_model(), config)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_fine_tuning_stores_the_tensor_once(bundled: dict[str, Path], tmp_path: Path, tune: str) -> None:
    source = shutil.copytree(bundled["4"], tmp_path / "tied")
    model = RwkvRevForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(source)
    data = counting_text(tmp_path / "data.txt", lines=100)
    finetune(
        settings(source, data, tmp_path / "out", tune=tune, context_length=128, chunk_length=64, max_steps=2)
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "head.weight" not in stored
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.head.weight is loaded.model.embeddings.weight
    changed = not torch.equal(stored["model.embeddings.weight"], model.model.embeddings.weight)
    assert changed == (tune == "full")
    assert verify_directory(tmp_path / "out", oracle="naive", tokens=40).passed


@pytest.mark.parametrize("size", [0, -3, 1.5, True, 2**62])
def test_what_is_no_number_of_tokens_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"new_num_tokens = {size} must be a whole number from 1"):
        tiny_model("5.2").resize_token_embeddings(size)
