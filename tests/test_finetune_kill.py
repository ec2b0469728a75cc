"""Kills at random moments: the same command with ``--resume auto`` ends as if nothing had happened.

``RWKV_REV_KILLS=20 pytest -n 0 tests/test_finetune_kill.py`` kills 20 times by each signal; the suite once. Half of the
moments are drawn over the whole life of a run, half after its last checkpoint was begun: its last save, writing OUTPUT,
renaming it, removing the working folder. The former are told by the processor time that a run has spent, which does not
depend on what else the machine does: drawn by the clock, many would come after the end, and mean another run.
"""

import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from finetune_cases import counting_text, environment
from processes import run_command, start_command
from safetensors.torch import load_file
from torch import Tensor

from rwkv_rev.training.callbacks import read_log

STEPS = 4
KILLS = int(os.environ.get("RWKV_REV_KILLS", "1"))
OF_THIS_MACHINE = {"seconds", "tokens_per_second", "memory_bytes"}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")


def finetune(model: Path, data: Path, output: Path) -> list[str]:
    return [
        *("finetune", str(model), "--data", str(data)),
        *("--output", str(output), "--cache-dir", str(data.parent / "cache"), "--device", "cpu"),
        *("--context-length", "64", "--chunk-length", "25", "--batch-size", "2", "--grad-accum", "2"),
        *("--max-steps", str(STEPS), "--save-every", "3", "--resume", "auto"),
        *("--tune", "lora", "--set", "lora_dropout=0.1", "--set", "lora_rank=4"),
        *("--eval-data", str(data), "--eval-every", "2", "--set", "eval_tokens=64", "--keep-best"),
        *("--patience", "2", "--save-total", "1", "--sample-prompt", "7 squared", "--sample-tokens", "3"),
    ]


class Undisturbed(NamedTuple):
    model: Path
    data: Path
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    weights: dict[str, Tensor]
    life: float  # seconds of processor time
    end: float  # seconds by the clock, after the last checkpoint was begun


@pytest.fixture(scope="module")
def undisturbed(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    data = counting_text(folder / "data.txt", 300)
    command = finetune(shallow["5.2"], data, folder / "out")
    process = start_command(command, folder / "streams", environment())
    last = _wait_for_the_end(process, folder / "out")
    life = 0.0
    while (spent := _spent(process)) is not None:
        life = spent
        time.sleep(0.002)
    process.join(300)
    ended = time.monotonic()
    assert process.exitcode == 0, (folder / "streams.err").read_text()[-3000:]
    return Undisturbed(shallow["5.2"], data, *outcome(folder / "out"), life, ended - last)


def outcome(output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Tensor]]:
    rows = read_log(output / "training" / "log.jsonl")
    kept = [{name: row[name] for name in row if name not in OF_THIS_MACHINE} for row in rows]
    samples = read_log(output / "training" / "samples.jsonl")
    assert len(samples) == 3, "before the first step, after one more, and after the last"
    return kept, samples, load_file(output / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_and_resumed(undisturbed: Undisturbed, tmp_path: Path, name: str, number: int) -> None:
    """Losses, log rows, samples and weights to the bit, and nothing left behind."""
    output, temporary = tmp_path / "here" / "killed", tmp_path / "tmp"
    output.parent.mkdir()
    temporary.mkdir()
    env = environment(TMPDIR=str(temporary))
    command = finetune(undisturbed.model, undisturbed.data, output)
    draw = random.Random(f"{name} {number}").random()
    share = 1.0
    while True:  # until it was killed in time
        process = start_command(command, tmp_path / "run", env)
        if number % 2 == 0:
            while (spent := _spent(process)) is not None and spent < share * draw * undisturbed.life:
                time.sleep(0.002)
        else:
            _wait_for_the_end(process, output)
            time.sleep(share * draw * undisturbed.end)
        assert process.pid is not None
        if process.exitcode is None:
            os.kill(process.pid, getattr(signal, name))
        process.join(300)
        if process.exitcode != 0:
            break
        share *= 0.8
        output.rename(tmp_path / f"whole-{share}")
    done = run_command(*command, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, samples, weights = outcome(output)
    assert rows == undisturbed.rows and samples == undisturbed.samples
    assert weights.keys() == undisturbed.weights.keys()
    assert all(tensor.equal(undisturbed.weights[name]) for name, tensor in weights.items())
    assert [path.name for path in output.parent.iterdir()] == ["killed"]
    assert not list(temporary.iterdir())
    if name != "SIGKILL":
        said = (tmp_path / "run.err").read_text("utf-8")
        assert "Traceback" not in said and "unexpected" not in said, said[-3000:]


def test_stopped_by_a_person(
    shallow: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ctrl-C: one line that says what is kept and how to go on."""
    data = counting_text(tmp_path / "data.txt", 300)
    streams = tmp_path_factory.mktemp("streams") / "run"
    process = start_command(finetune(shallow["5.2"], data, tmp_path / "out"), streams, environment())
    _wait_for_progress(process, tmp_path / "out.training" / "log.jsonl", 0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    said = streams.with_suffix(".err").read_text("utf-8").strip().splitlines()
    assert said[-1].startswith("stopped") and "the same command" in said[-1], said
    assert not (tmp_path / "out").exists()


def _spent(process: BaseProcess) -> float | None:
    """Seconds of processor time so far; None at the end."""
    try:
        times = psutil.Process(process.pid).cpu_times() if process.exitcode is None else None
    except psutil.NoSuchProcess:
        return None
    return times and times.user + times.system


def _wait_for_the_end(process: BaseProcess, output: Path) -> float:
    """Until the last checkpoint is begun; when that was."""
    work = output.with_name(f"{output.name}.training")
    last = f"checkpoint-{STEPS}"
    while process.exitcode is None and not any((at / last).is_dir() for at in (work / ".writing", work)):
        time.sleep(0.002)
    return time.monotonic()


def _wait_for_progress(process: BaseProcess, log: Path, before: int) -> None:
    """Until the run has come a few steps further (the log of a resumed run begins at its checkpoint)."""
    rows = read_log(log)
    deadline = time.monotonic() + 120
    first = rows[-1]["step"] if rows else 0
    while time.monotonic() < deadline and process.exitcode is None:
        rows = read_log(log)
        if rows and rows[-1]["step"] >= min(first + 2, STEPS - 4):
            return
        time.sleep(0.05)
    raise AssertionError(f"the run made no progress (exit status {process.exitcode}, {before} rows before)")
