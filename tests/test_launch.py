"""Device and dtype of a run, and what a launcher may ask for."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import settings
from test_imports import ROOT

from rwkv_rev.errors import RwkvRevError
from rwkv_rev.training.launch import choose_dtype, in_processes, own_device, refuse_launch, shards_model
from rwkv_rev.training.training_arguments import training_arguments

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "dtype", "found"),
    [
        (None, "auto", "float32"),
        ("no", "auto", "float32"),
        ("bf16", "auto", "bfloat16"),
        ("bf16", "float32", "float32"),
        ("no", "bfloat16", "bfloat16"),
    ],
)
def test_mixed_precision_of_accelerate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str | None, dtype: str, found: str
) -> None:
    """``auto`` follows accelerate, an explicit dtype wins; either way the trainer computes in what was resolved."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert choose_dtype(dtype, CPU) == found
    config = settings(tmp_path, tmp_path, tmp_path / "out")
    arguments = training_arguments(config, tmp_path / "work", device="cpu", dtype=found)
    assert arguments.mixed_precision == {"float32": "no", "bfloat16": "bf16"}[found]


@pytest.mark.parametrize(
    ("asked", "message"), [("fp8", "configured for fp8"), ("fp16", "float16 needs a GPU")]
)
def test_refused_precision(monkeypatch: pytest.MonkeyPatch, asked: str, message: str) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(RwkvRevError, match=message):
        choose_dtype("auto", CPU)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_split_models_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, name: str) -> None:
    monkeypatch.setenv(variable, "false")
    refuse_launch()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RwkvRevError, match=f"configured for {name}, .*shard_model=True"):
        refuse_launch()


def test_accelerates_fsdp_plugin_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2", None):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
        if version is not None:
            monkeypatch.setenv("FSDP_VERSION", version)
        assert shards_model(False)
        assert "ACCELERATE_USE_FSDP" not in os.environ and "FSDP_STATE_DICT_TYPE" not in os.environ
    assert shards_model(True) and not shards_model(False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "version 1, .* --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "offload_params, .* leave it out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation_checkpointing: .*checkpoint_blocks=true"),
        ({"FSDP_IGNORED_MODULES": "head"}, "ignored_modules, .* leave it out"),
    ],
)
def test_another_fsdp_plugin_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RwkvRevError, match=message):
        shards_model(False)


def test_shards_of_a_parallelism_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    refuse_launch()
    assert shards_model(False)
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    with pytest.raises(RwkvRevError, match=r"replicas of shards: .* leave dp_replicate_size out"):
        shards_model(False)


def test_other_ranks_of_a_parallelism_config_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that share a context are taken: ``tests/test_finetune_context.py``."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    refuse_launch()
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(RwkvRevError, match="configured for tensor parallelism"):
        refuse_launch()


def test_one_gpu_without_a_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The trainer would split batches over all GPUs by ``nn.DataParallel``, which cannot join our outputs."""
    from transformers import TrainingArguments

    monkeypatch.setattr(
        TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu", 2) or 2)
    )
    config = settings(tmp_path, tmp_path, tmp_path / "out")
    assert training_arguments(config, tmp_path / "work", device="cpu", dtype="float32").n_gpu == 1


@pytest.mark.parametrize(("rank", "seen", "own"), [(None, 4, 0), ("2", 4, 2), ("3", 1, 0)])
def test_each_process_asks_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, seen: int, own: int
) -> None:
    """Where a launcher shows each process one GPU alone, that is the first it sees."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert own_device("cuda") == torch.device("cuda", own)
    assert own_device("cpu") == torch.device("cpu")


def test_native_code_does_not_write_into_our_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As gloo does in some versions of torch, before the JSON document of a run in several processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with in_processes():
        os.write(1, b"from native code\n")
    os.write(1, b"ours\n")
    assert capfd.readouterr() == ("ours\n", "from native code\n")


WHOLE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
HALVES = {
    "WORLD_SIZE=x RANK=0": "WORLD_SIZE = 'x' in the environment is no number",
    "RANK=1.5": "RANK = '1.5' in the environment is no number",
    "LOCAL_RANK=": "LOCAL_RANK = '' in the environment is no number",
    "WORLD_SIZE=2 RANK=0": "has RANK, WORLD_SIZE, .* but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
    "LOCAL_RANK=5": "has LOCAL_RANK, .* but no RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    "RANK=1": "has RANK, .* but no WORLD_SIZE",
    "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1": "RANK = 2 .* none of 2 processes",
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=http": "MASTER_PORT = 'http' .* no number",
}


def launched(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("text", HALVES)
def test_half_of_a_launch_is_refused(
    cli: Any, bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch, text: str, more: tuple[str, ...]
) -> None:
    """In one line, before anything else reads these variables."""
    launched(monkeypatch, dict(pair.split("=") for pair in text.split()))
    Path("book.txt").write_text("some text\n" * 30)
    code, out, err = cli("finetune", bundled["4"], "--data", "book.txt", "--output", "out", *more)
    assert (code, out) == (1, "") and re.search(HALVES[text], err) and err.count("\n") == 1
    assert "start by torchrun" in err and not Path("out.training").exists()


@pytest.mark.parametrize(
    "values", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "-1"}, WHOLE], ids=str
)
def test_whole_launches(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    launched(monkeypatch, values)
    refuse_launch()


def test_commands_of_the_docs_are_accelerates() -> None:
    """Its own parser takes them, and its own check of what goes together."""
    from accelerate.commands import launch

    text = (ROOT / "docs" / "finetuning.md").read_text("utf-8").replace("\\\n", " ")
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("accelerate launch ")]
    assert len(commands) >= 3
    for words in commands:
        launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
