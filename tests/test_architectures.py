"""What the registry says, and that a generation more goes through everything by its own file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens
from foreign import VERSIONS
from torch import Tensor
from toy_generation import TOY

import rwkv_rev
from rwkv_rev.architectures import registry
from rwkv_rev.architectures.registry import architecture, families, generations, supported
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.converters.names import tensor_table
from rwkv_rev.forecast import forecast_memory
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.tuning import apply_tuning, count_parameters, count_trained

# --- the registry ---------------------------------------------------------------------------------------------------


def test_registry() -> None:
    assert tuple(known.version for known in generations()) == VERSIONS
    assert [architecture(version).version for version in VERSIONS] == list(VERSIONS)
    assert supported() == "RWKV-4, 5.0, 5.1, 5.2, 6 and 7"
    assert families(generations()) == "RWKV-4 or 5 or 6 or 7"
    assert registry.with_tuned_state() == "RWKV-5 or 6 or 7"
    with pytest.raises(ValueError, match=r"rwkv_version = '9' must be one of 4, 5\.0, 5\.1, 5\.2, 6, 7"):
        RwkvRevConfig(rwkv_version="9")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_generation_agrees_with_its_cells(version: str) -> None:
    known = architecture(version)
    config = RwkvRevConfig(
        rwkv_version=version,
        hidden_size=128,
        num_hidden_layers=2,
        vocab_size=32,
        **known.sizes(128),
    )
    with torch.device("meta"):
        model = RwkvRevForCausalLM(config)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layout in known.layouts:
        assert {row.name: row.shape for row in tensor_table(config, layout.name)} == stored
    cells = known.cells(config, 0)
    assert {type(cell) for cell in cells.values()} == known.initialization.keys()
    decay = cells["time_mix"].log_decay()
    assert (decay is None) == (known.log_decay is None)  # no constant
    assert decay is None or decay.numel() == math.prod(known.shape(known.keys, config))
    assert len(config.architecture.layouts) == (3 if version in ("6", "7") else 2)
    with pytest.raises(
        ValueError, match=f"'none' does not exist for RWKV-{version}; use '{known.hub_layout}'"
    ):
        known.column("none")


# --- one more -------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    **TOY.sizes(24),
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the registry."""
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    registry.register(TOY)
    registry.register(TOY)
    with pytest.raises(ValueError, match="there is an architecture called '4' already"):
        registry.register(replace(TOY, version="4"))


def toy_checkpoint() -> dict[str, Tensor]:
    """What the toy's own trainer saves, written without the tables."""
    torch.manual_seed(0)
    D, F, V = 24, 48, 256
    state = {"emb.weight": torch.randn(V, D), "head.weight": torch.randn(V, D)}
    for name in ("ln_out", "blocks.0.ln0", *(f"blocks.{i}.ln{n}" for i in range(2) for n in (1, 2))):
        state |= {f"{name}.weight": 1 + 0.1 * torch.randn(D), f"{name}.bias": 0.1 * torch.randn(D)}
    for block in ("blocks.0.", "blocks.1."):
        state[f"{block}toy.mu"] = torch.rand(1, D)
        state |= {f"{block}toy.{letter}": torch.randn(D, D) / 5 for letter in "rkvo"}
        state |= {f"{block}ffn.time_mix_{letter}": torch.rand(1, 1, D) for letter in "kr"}
        for name, shape in (("key", (F, D)), ("receptance", (D, D)), ("value", (D, F))):
            state[f"{block}ffn.{name}.weight"] = torch.randn(shape) / 5
    return state


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, Tensor]:
    """A file of it."""
    state = toy_checkpoint()
    torch.save(state, tmp_path / "toy.pth")
    return state


@pytest.mark.usefixtures("registered")
def test_a_generation_more_goes_through_everything(tmp_path: Path, checkpoint: dict[str, Tensor]) -> None:
    """From inspection to export: by its own file and the registry's line."""
    found = inspect_source(tmp_path / "toy.pth")
    assert (found.version, found.layout, found.channel_mix_width) == ("toy", "toy-pth", 48)
    (*_, reversible, _) = forecast_memory(
        found.config, found.log_decays, found.parameters, context_length=64, chunk_length=16
    )
    assert reversible.tape > 0

    result = rwkv_rev.convert(tmp_path / "toy.pth", tmp_path / "model", tokenizer="none", verify=True)
    assert result.verification.passed
    assert result.verification.skipped["rwkv"] == "the rwkv package knows no RWKV-toy"
    checks = {"reversal": True, "gradients": True, "context": 40, "chunk": 16}
    assert rwkv_rev.verify(tmp_path / "model", tokens=20, **checks).passed
    model = RwkvRevForCausalLM.from_pretrained(tmp_path / "model").train()
    assert model.config.rwkv_version == "toy" and "RWKV-toy" in (tmp_path / "model/README.md").read_text()
    ids = random_tokens(70, batch=2, vocab=40)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, 20:31] = 0
    full = differentiate(model, "full", input_ids=ids, attention_mask=mask)
    for strategy in ("reversible", "checkpoint"):
        chunked = differentiate(model, strategy, 16, input_ids=ids, attention_mask=mask)
        assert_agree(chunked, full)
    assert full.state.wkv.shape == (2, 2, 24)

    for target, layout in (("blinkdl", "again.pth"), ("hf", "hub")):
        rwkv_rev.export(tmp_path / "model", tmp_path / layout, to=target)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == checkpoint.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in checkpoint.items())
    back = inspect_source(tmp_path / "hub")
    assert (back.version, back.layout) == ("toy", "toy-hub")
    assert '"model_type": "toy"' in (tmp_path / "hub/config.json").read_text()


@pytest.mark.usefixtures("registered")
def test_a_generation_more_is_initialised_and_tuned(tmp_path: Path) -> None:
    model = RwkvRevForCausalLM(RwkvRevConfig(rwkv_version="toy", **SIZES))
    assert torch.equal(model.blocks[1].time_mix.mix, torch.full((24,), 0.6))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for tune, trained in (("lora", 2 * (2 * 4 * 48 + 2 * 4 * (24 + 48))), ("state", 2 * 24)):
        config = FinetuneConfig(model="model", data="data", output="out", tune=tune, lora_rank=4)
        assert count_trained(config, model.config, shapes) == trained
    apply_tuning(model, config)
    assert count_parameters(model)[0] == trained


def test_without_the_line_it_is_refused(tmp_path: Path, checkpoint: dict[str, Tensor]) -> None:
    with pytest.raises(rwkv_rev.RwkvRevError, match=r"is not an RWKV model: no blocks\.0\.att\.time_decay"):
        inspect_source(tmp_path / "toy.pth")
