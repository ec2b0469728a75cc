"""Facts about a checkpoint, without loading it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict

from rwkv_rev.cli import main
from rwkv_rev.conversion import convert
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
    pieces = {"dtypes"} if version == "6" else set()  # which counts tensors: five of ours lie in one there
    assert different == {"source", "layout"} | pieces
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


def test_forecast_and_numerics_on_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "inspect",
        "bundled:rwkv-5.2",
        "--context-length",
        "4096",
        "--chunk-length",
        "256",
        "--numerics",
    ]

    def run(*more: str) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments, *more])
        assert not left.value.code
        return capfd.readouterr().out

    text = run()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"float64 +52 +67,108,864 +67,108,864", text), "no value is cut"
    assert re.search(r"float64( +[\d,.]+ / (> )?[\d,]+){4} *\n", text), (
        "nor broken, and no column goes on below"
    )
    for words in ("NUHMC", "number of updates at half mantissa capacity", "counted: ", "formula / measured"):
        assert words in " ".join(text.split())
    assert "Memory of a gradient: 4,096 tokens x 1, chunks of 256, float32" in text
    assert "67,108,864" in text
    document = json.loads(run("--json", "--batch-size", "2"))
    by_name = {forecast["strategy"]: forecast for forecast in document["memory_forecast"]}
    assert set(by_name) == {"full", "checkpoint", "reversible", "truncated"}
    assert by_name["reversible"]["tape"] < 0.6 * by_name["checkpoint"]["tape"]
    assert [limit["nuhmc"] for limit in document["numerics"]] == [32, 8, 2048, 67_108_864]


def test_the_forecast_is_only_made_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "bundled:rwkv-4", "--json"])
    document = json.loads(capfd.readouterr().out)
    assert not {"memory_forecast", "numerics", "config", "log_decays"} & set(document)


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_a_tape_that_follows_from_the_text_is_the_most(
    version: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", f"bundled:rwkv-{version}", "--context-length", "4096", "--chunk-length", "512"])
    assert ("--text FILE measures it" in " ".join(capfd.readouterr().out.split())) == (version == "6")
