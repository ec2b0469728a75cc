"""Facts about a checkpoint, without loading it."""

import json
import math
from pathlib import Path

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict

from rwkv_rev.converters.conversion import convert
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.converters.reading import Checkpoint
from rwkv_rev.numerics import bits_forgotten_per_step


@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_and_its_conversion_agree(tmp_path: Path, version: str) -> None:
    state = blinkdl_state_dict(version, vocab=256, dtype=torch.bfloat16)
    torch.save(state, tmp_path / "a.pth")
    before = inspect_source(str(tmp_path / "a.pth"))
    convert(tmp_path / "a.pth", tmp_path / "model")
    after = inspect_source(tmp_path / "model")
    different = {key for key, value in before.to_dict().items() if after.to_dict()[key] != value}
    assert different == {"source", "layout"}
    assert before.version == version
    assert before.parameters == sum(tensor.numel() for tensor in state.values())
    assert before.nbytes == 2 * before.parameters
    assert before.tokenizer == "byte"
    json.dumps(before.to_dict())


def test_bits_forgotten(tmp_path: Path) -> None:
    state = blinkdl_state_dict("5.0", vocab=256)
    for layer, halvings in enumerate((1.0, 3.0)):  # w = 2^-halvings
        state[f"blocks.{layer}.att.time_decay"].fill_(math.log(halvings * math.log(2)))
    torch.save(state, tmp_path / "a.pth")
    found = inspect_source(str(tmp_path / "a.pth"))
    assert found.bits_forgotten == tuple(pytest.approx((bits,) * 6, rel=1e-6) for bits in (1.0, 3.0))
    torch.testing.assert_close(
        bits_forgotten_per_step(torch.tensor([0.0, -math.log(2), -math.inf])),
        torch.tensor([0.0, 1.0, math.inf], dtype=torch.float64),
    )


def test_only_decays_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    inspect_source("bundled:rwkv-5.2")
    assert read == [f"blocks.{i}.att.time_decay" for i in range(6)]


def test_an_unknown_vocabulary_is_no_error(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("4", vocab=300), tmp_path / "a.pth")
    assert "unknown" in inspect_source(str(tmp_path / "a.pth")).tokenizer
