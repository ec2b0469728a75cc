"""What a fine-tuning run will take: the strategies' own forecast, the optimizer, and when that is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, settings

from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.errors import StrategyError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.training import memory
from rwkv_rev.training.finetune import plan
from rwkv_rev.training.tuning import apply_tuning, count_parameters, count_trained


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tune": "state"},
        {"tune": "lora", "lora_rank": 4},
        {"tune": "lora", "lora_targets": ["time_mix.key", "output"]},
    ],
    ids=["full", "state", "lora", "lora-targets"],
)
def test_trained_weights_are_counted_from_headers(
    bundled: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(bundled["5.2"], tmp_path / "data.txt", tmp_path / "out", **changes)
    model = RwkvRevForCausalLM.from_pretrained(str(bundled["5.2"]), dtype=torch.float32)
    with ConvertedModel(bundled["5.2"]) as source:
        shapes = {name: source.shape(name) for name in source.names()}
    expected, _ = count_parameters(apply_tuning(model, config))
    assert count_trained(config, model.config, shapes) == expected


@pytest.mark.parametrize(
    ("changes", "strategy", "at_once"),
    [
        ({"chunk_length": 256}, "full", 256),
        ({}, "reversible", 64),
        ({"bptt": "full"}, "full", 256),
        ({"bptt": "reversible-lossy"}, "reversible", 64),
        ({"bptt": "truncated"}, "truncated", 64),
    ],
)
def test_auto_is_what_the_model_will_choose(
    bundled: dict[str, Path], tmp_path: Path, changes: dict[str, Any], strategy: str, at_once: int
) -> None:
    data = counting_text(tmp_path / "data.txt", 100)
    found = plan(settings(bundled["5.2"], data, tmp_path / "out", **changes)).to_dict()["memory"]
    assert (found["strategy"], found["tokens_at_once"]) == (strategy, at_once)


def test_tape_is_the_one_a_run_reports(bundled: dict[str, Path], tmp_path: Path) -> None:
    config = settings(bundled["5.2"], counting_text(tmp_path / "data.txt"), tmp_path / "out", max_steps=1)
    assert finetune(config).tape_bytes == pytest.approx(plan_tape(config), rel=0.01)


def plan_tape(config: Any) -> int:
    config = type(config)(**(config.to_dict() | {"output": config.output + "-plan"}))
    return int(plan(config).to_dict()["memory"]["tape"])


def test_what_each_setting_adds(bundled: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 100)

    def forecast(**changes: Any) -> dict[str, Any]:
        return plan(settings(bundled["5.2"], data, tmp_path / "out", **changes)).to_dict()["memory"]

    full, lora = forecast(), forecast(tune="lora", lora_rank=4)
    assert full["optimizer"] == 2 * full["weights"]
    assert lora["optimizer"] < 0.2 * full["optimizer"] and lora["device"] < full["device"]
    assert forecast(grad_accum=2)["device"] == full["device"] + full["weights"]
    assert forecast(dtype="bfloat16")["graph"] < full["graph"]
    assert forecast(checkpoint_blocks=True)["graph"] < 0.5 * full["graph"]
    assert forecast(tune="state", dtype="bfloat16")["weights"] == full["weights"] // 2


def test_a_tape_counts_where_it_lies(bundled: dict[str, Path], tmp_path: Path) -> None:
    """As a run reports it: on the CPU a tape on the host is in the memory that the process grew by."""
    data = counting_text(tmp_path / "data.txt", 2000)

    def forecast(tape: str) -> dict[str, Any]:
        config = settings(bundled["5.2"], data, tmp_path / "out", context_length=20_000, tape=tape)
        return plan(config).to_dict()["memory"]

    host, disk = forecast("host"), forecast("disk")
    assert host["tape"] == disk["tape"] > 1_000_000
    assert host["device"] == forecast("device")["device"] == disk["device"] + host["tape"]


def test_warns_before_it_refuses(
    bundled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = counting_text(tmp_path / "data.txt", 100)
    config = settings(bundled["5.2"], data, tmp_path / "out")
    planned = plan(config)
    assert not any("GB are free" in note for note in planned.notes)
    need = planned.memory.device
    monkeypatch.setattr(memory, "free_memory", lambda device: int(0.9 * need))
    assert any("64 tokens at once need about" in note for note in plan(config).notes)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(0.5 * need))
    with pytest.raises(StrategyError, match="a shorter chunk_length, a smaller batch_size"):
        plan(config)
    config.bptt = "full"
    with pytest.raises(StrategyError, match="use bptt='reversible'"):
        plan(config)


def test_a_tape_beyond_the_host_is_refused(
    bundled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tape larger than the device need: only the host is short."""
    data = counting_text(tmp_path / "data.txt", 20_000)
    config = settings(bundled["5.2"], data, tmp_path / "out", context_length=400_000, chunk_length=16)
    found = plan(config)
    tape = found.memory.gradient.tape
    assert tape > 2 * (found.memory.device - tape)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(0.55 * tape))
    with pytest.raises(StrategyError, match="for the tape on the host"):
        plan(config)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(1.01 * tape))
    assert any("GB on the device" in note and "use --tape disk" in note for note in plan(config).notes)
    config.tape = "disk"
    plan(config)
