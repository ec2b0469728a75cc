"""SIGKILL at random moments: ``--resume auto`` goes on from the last whole checkpoint as if nothing had happened."""

import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from finetune_cases import counting_text, environment, losses
from processes import run_command, start_command
from safetensors.torch import load_file

from rwkv_rev.training.callbacks import read_log
from rwkv_rev.training.checkpoints import checkpoints

STEPS = 24
KILLS = 4


def finetune(model: Path, data: Path, output: Path) -> list[str]:
    return [
        *("finetune", str(model), "--data", str(data)),
        *("--output", str(output), "--cache-dir", str(data.parent / "cache"), "--device", "cpu"),
        *("--context-length", "128", "--chunk-length", "50", "--batch-size", "2", "--grad-accum", "2"),
        *("--max-steps", str(STEPS), "--save-every", "2", "--resume", "auto"),
        *("--tune", "lora", "--set", "lora_dropout=0.1", "--set", "lora_rank=4"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_and_resumed(
    bundled: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Data order and dropout draws are those of a run that nobody disturbed: losses and weights to the bit."""
    data = counting_text(tmp_path / "data.txt", 300)
    output = tmp_path / "killed"
    undisturbed = run_command(*finetune(bundled["5.2"], data, tmp_path / "whole"), timeout=600)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]

    moments = random.Random(7)
    work = output.with_name("killed.training")
    resumed_from = []
    for _ in range(KILLS):
        before = len(read_log(work / "log.jsonl"))
        process = start_command(
            finetune(bundled["5.2"], data, output), tmp_path_factory.mktemp("streams") / "run", environment()
        )
        _wait_for_progress(process, work / "log.jsonl", before)
        time.sleep(moments.uniform(0.0, 0.75))  # in the middle of a step, of a checkpoint, of anything
        process.kill()
        process.join()
        assert not output.exists(), "not finished, so not there"
        whole_ones = checkpoints(work)
        resumed_from.append(whole_ones[-1].name if whole_ones else "the start")
    done = run_command(*finetune(bundled["5.2"], data, output), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(set(resumed_from)) > 1, f"the kills came too early to tell anything: {resumed_from}"
    assert "resuming from" in done.stderr
    assert losses(output) == losses(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(output / "model.safetensors").items():
        assert tensor.equal(expected[name]), name
    assert not work.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data.txt", "cache", "whole", "killed"}, left


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_stopped_by_a_person(
    bundled: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ctrl-C: one line that says what is kept and how to go on."""
    data = counting_text(tmp_path / "data.txt", 300)
    streams = tmp_path_factory.mktemp("streams") / "run"
    process = start_command(finetune(bundled["5.2"], data, tmp_path / "out"), streams, environment())
    _wait_for_progress(process, tmp_path / "out.training" / "log.jsonl", 0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    said = streams.with_suffix(".err").read_text("utf-8").strip().splitlines()
    assert said[-1].startswith("stopped") and ("--resume auto" in said[-1] or "--force" in said[-1]), said
    assert not (tmp_path / "out").exists()


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
