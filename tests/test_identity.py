"""What a run belongs to: other weights or another architecture are another model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_rev.training import identity
from rwkv_rev.training.identity import model_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"rwkv_version": "5.2", "layer_norm_epsilon": 1e-5}))
    tensors = {f"{name}.weight": torch.randn(40, 1000) for name in "abcdefghijklmnop"}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def beginnings(file: Path) -> list[int]:
    """Where each tensor begins."""
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    return [header + one["data_offsets"][0] for one in json.loads(content[8:header]).values()]


def differs(folder: Path, offset: int) -> bool:
    before, file = model_fingerprint(folder), folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    return model_fingerprint(folder) != before


def test_any_byte_of_a_file_counts(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    assert size > 2 << 20
    for offset in torch.randint(size - (1 << 10), (12,), generator=torch.Generator().manual_seed(1)).tolist():
        assert differs(folder, max(offset, 1 << 10))


def test_every_tensor_of_a_large_file_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1 << 20)
    begins = beginnings(folder / "model.safetensors")
    assert len(begins) == 16
    for begin in begins:
        assert differs(folder, begin)


def test_names_and_shapes_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1 << 20)
    file, before = folder / "model.safetensors", model_fingerprint(folder)
    tensors = load_file(file)
    save_file({name: tensor.reshape(1000, 40) for name, tensor in tensors.items()}, file)
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize("name", ["layer_norm_epsilon", "group_norm_epsilon", "hidden_size"])
def test_what_the_model_computes_counts(folder: Path, name: str) -> None:
    before = model_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text()) | {name: 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert model_fingerprint(folder) != before
