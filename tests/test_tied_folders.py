"""Folders whose head is their embedding (``tie_word_embeddings: true``, no head): converted, and all that follows."""

import json
import re
from pathlib import Path

import pytest
import torch
from finetune_cases import counting_text, finetune, settings
from foreign import hf_config, hf_state_dict
from safetensors.torch import load_file, save_file
from transformers import RwkvConfig, RwkvForCausalLM

from rwkv_rev import RwkvRevForCausalLM, convert, export
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.equivalence.verification import verify_directory
from rwkv_rev.errors import CheckpointError

HEAD = "head.weight"


def tied_folder(folder: Path, version: str = "4", **config: object) -> Path:
    """A folder in Hugging Face layout without a head."""
    folder.mkdir()
    state = hf_state_dict(version, vocab=256)
    del state[HEAD]
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(hf_config(version, vocab=256) | {"tie_word_embeddings": True} | config)
    )
    return folder


@pytest.fixture
def saved_by_transformers(tmp_path: Path) -> Path:
    config = RwkvConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, rescale_every=0, tie_word_embeddings=True
    )
    RwkvForCausalLM(config).save_pretrained(tmp_path / "source")
    assert HEAD not in load_file(tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


def test_what_transformers_saves(saved_by_transformers: Path, tmp_path: Path) -> None:
    result = convert(saved_by_transformers, tmp_path / "model", verify=True)
    assert result.verification.passed
    assert {"rwkv", "transformers", "naive"} & {row.oracle for row in result.verification.rows}
    assert result.config.tie_word_embeddings
    assert HEAD not in load_file(tmp_path / "model" / "model.safetensors")
    tokens = torch.arange(1, 20)[None]
    expected = RwkvForCausalLM.from_pretrained(saved_by_transformers, rescale_every=0).eval()(tokens).logits
    found = RwkvRevForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert found.head.weight is found.model.embeddings.weight
    torch.testing.assert_close(found(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_export_and_inspection(version: str, tmp_path: Path) -> None:
    source = tied_folder(tmp_path / "source", version)
    convert(source, tmp_path / "model")
    state = load_file(source / "model.safetensors")
    before, after = inspect_source(source), inspect_source(tmp_path / "model")
    assert before.parameters == after.parameters == sum(tensor.numel() for tensor in state.values())
    assert before.config.tie_word_embeddings and after.config.tie_word_embeddings
    export(tmp_path / "model", tmp_path / "hf", to="hf")
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert verify_directory(tmp_path / "model", oracle="naive", tokens=20).passed
    (tmp_path / "again").mkdir()
    export(tmp_path / "model", tmp_path / "again" / "model.pth")
    report = verify_directory(
        tmp_path / "model", original=str(tmp_path / "again" / "model.pth"), oracle="naive", tokens=20
    )
    assert report.passed


def test_fine_tuning(tmp_path: Path) -> None:
    convert(tied_folder(tmp_path / "source"), tmp_path / "model")
    data = counting_text(tmp_path / "data.txt", lines=100)
    finetune(
        settings(tmp_path / "model", data, tmp_path / "out", context_length=64, chunk_length=32, max_steps=2)
    )
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.head.weight is loaded.model.embeddings.weight


@pytest.mark.parametrize(
    "tied, words",
    [
        (False, "missing head.weight"),
        (None, "missing head.weight"),
        ("yes", "tie_word_embeddings = 'yes'; it must be true or false"),
        (1, "tie_word_embeddings = 1; it must be true or false"),
    ],
)
def test_a_head_is_missing_where_the_configuration_does_not_tie(
    tied: object, words: str, tmp_path: Path
) -> None:
    source = tied_folder(tmp_path / "source", tie_word_embeddings=tied)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        convert(source, tmp_path / "model")
