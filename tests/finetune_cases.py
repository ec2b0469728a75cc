"""Shared by the tests of fine-tuning: a text whose kind the bundled models do not know, and a quick run on it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_rev.training.callbacks import read_log
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.finetune import FinetuneResult, run

TEXT = Path(__file__).resolve().parents[2] / "shared" / "text" / "docs-sample.txt"
TRAIN, HELD_OUT = slice(900_000, 1_100_000), slice(1_400_000, 1_420_000)
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def split_text(folder: Path) -> tuple[Path, Path]:
    """Training and held-out files of one kind of text; skips the test where the sample text is not at hand."""
    if not TEXT.is_file():
        pytest.skip(f"needs {TEXT}")
    raw = TEXT.read_bytes()
    paths = folder / "train.txt", folder / "held-out.txt"
    for path, part in zip(paths, (TRAIN, HELD_OUT), strict=True):
        path.write_text(raw[part].decode("utf-8", "ignore"), "utf-8")
    return paths


def counting_text(path: Path, lines: int = 400) -> Path:
    """A text that needs no sample: numbers and their squares."""
    path.write_text("".join(f"{n} squared is {n * n}\n" for n in range(lines)), "utf-8")
    return path


def settings(model: Path, data: Path, output: Path, **changes: Any) -> FinetuneConfig:
    """A run of a few steps over 256 tokens in chunks of 64."""
    values: dict[str, Any] = {
        "model": str(model),
        "data": [str(data)],
        "output": str(output),
        "context_length": 256,
        "chunk_length": 64,
        "batch_size": 2,
        "max_steps": 3,
        "warmup": 1,
        "save_every": 0,
        "device": "cpu",
        "cache_dir": str(output.parent / "cache"),
        "num_workers": 1,
    }
    return FinetuneConfig(**(values | changes))


def finetune(
    config: FinetuneConfig, *, curve: bool = False, notify: Callable[[str], object] | None = None
) -> FinetuneResult:
    """Of the curve of losses, whose drawing would take as long as a step, only where it is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        if not curve:
            patch.setattr("rwkv_rev.training.saving.has_matplotlib", lambda: False)
        return run(config, notify=notify, quiet=True)


def losses(output: Path) -> list[float]:
    """Training losses of a finished run, by step."""
    rows = [row for row in read_log(output / "training" / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs the command line."""
    return {**os.environ, **OFFLINE, **more}


def stopped_run(model: Path, folder: Path) -> tuple[FinetuneConfig, Path]:
    """Settings of a run of four steps, and its working folder as it is before OUTPUT is written."""
    data = counting_text(folder / "data.txt", 100)
    values: dict[str, Any] = {"max_steps": 4, "save_every": 1, "context_length": 128, "batch_size": 1}
    config = settings(model, data, folder / "out", **values)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(config)
    return config, config.working_directory


def copied_run(stopped: tuple[FinetuneConfig, Path], folder: Path) -> FinetuneConfig:
    """To go on with a copy of it in ``folder``, which holds checkpoints 3 and 4."""
    before, work = stopped
    config = FinetuneConfig(**(before.to_dict() | {"output": str(folder / "out"), "resume": "auto"}))
    shutil.copytree(work, config.working_directory)
    return config
