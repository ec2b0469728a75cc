"""Two processes compute what one does with the doubled batch, however they are launched."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from finetune_cases import counting_text, environment, finetune, losses, settings
from processes import run_command, run_commands, start_command_in_ranks

from rwkv_rev.training.checkpoints import CHECKSUMS, checkpoints, damage
from rwkv_rev.training.finetune import FinetuneResult

pytestmark = pytest.mark.dist


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
    "accelerate": [
        *("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
        *("--dynamo_backend", "no", "--mixed_precision", "no"),
    ],
}


def two_processes(
    *arguments: object,
    launcher: str = "torchrun",
    options: Sequence[str] = ("--multi_gpu",),
) -> subprocess.CompletedProcess[str]:
    """``torchrun`` or ``accelerate launch``, then ``-m rwkv_rev.cli finetune ...``, on the CPU with gloo.

    The first process that torchrun starts is a fresh interpreter; the others are forked.
    """
    module, *launch = [*LAUNCHERS[launcher], *(options if launcher == "accelerate" else ())]
    command = [*launch, "-m", "rwkv_rev.cli", "finetune", *arguments]
    env = environment(HF_HOME=tempfile.gettempdir())  # nobody's accelerate configuration
    return run_command(*command, env=env, module=module)


def options(
    model: Path, data: Path, output: Path, cache: Path, *, steps: int = 2, device: str = "cpu"
) -> list[object]:
    return [
        *(model, "--data", data, "--output", output, "--cache-dir", cache, "--device", device),
        *("--context-length", 128, "--chunk-length", 50, "--max-steps", steps),
        *("--warmup", 1, "--save-every", 2),
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return documents(tmp_path)


def documents(folder: Path, lines: int = 80) -> Path:
    """Of different lengths: the processes' batches differ in shape, and one process's last is empty."""
    text = counting_text(folder / "text.txt", lines).read_text()
    ends = [0, *(n * lines // 16 for n in (70, 110, 113, 240)), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(ends)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


@pytest.fixture(scope="module")
def alone(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneResult, Path]:
    """One process with the doubled batch, and its output."""
    folder = tmp_path_factory.mktemp("alone")
    data = documents(folder)
    config = settings(
        shallow["5.2"],
        data,
        folder / "one",
        context_length=128,
        chunk_length=50,
        max_steps=2,
        batch_size=2,
        grad_accum=2,
        eval_data=[str(data)],
    )
    return finetune(config), folder / "one"


@pytest.mark.parametrize(
    ("launcher", "launch"),
    [
        ("torchrun", []),
        pytest.param("accelerate", ["--multi_gpu"], marks=pytest.mark.slow),
        pytest.param("accelerate", ["--use_fsdp", "--fsdp_version", "2"], marks=pytest.mark.slow),
    ],
    ids=["torchrun", "accelerate", "its FSDP plugin"],
)
def test_same_losses_as_one_process(
    shallow: dict[str, Path],
    alone: tuple[FinetuneResult, Path],
    data: Path,
    tmp_path: Path,
    launcher: str,
    launch: list[str],
) -> None:
    arguments = [
        *options(shallow["5.2"], data, tmp_path / "two", tmp_path / "cache"),
        *("--batch-size", 1, "--grad-accum", 2, "--eval-data", data, "--json"),
    ]
    done = two_processes(*arguments, launcher=launcher, options=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr and "deprecated" not in done.stderr, done.stderr
    result = json.loads(done.stdout)
    one, output = alone
    assert losses(tmp_path / "two") == pytest.approx(losses(output), rel=2e-5)
    assert result["tokens"] == one.tokens and result["steps"] == 2
    assert one.held_out is not None
    assert result["held_out"]["after"] == pytest.approx(one.held_out[1], rel=1e-4)
    assert not (tmp_path / "two.training").exists()


WAYS: dict[str, list[object]] = {
    "lora": ["--tune", "lora", "--lora-rank", 4],
    "state": ["--tune", "state"],
    "carried": ["--carry-state"],
}
SHARDED: list[object] = ["--weight-decay", 0.1, "--json", "--resume", "auto", "--dtype", "float32"]
CARRIED: list[object] = ["--carry-state", "--resume", "auto"]


class Runs(NamedTuple):
    folder: Path
    two: dict[str, subprocess.CompletedProcess[str]]
    one: dict[str, subprocess.CompletedProcess[str]]

    def losses(self, name: str) -> list[float]:
        return losses(self.folder / name)


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
            ],
        ),
    ],
)
def runs(
    request: pytest.FixtureRequest, shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """By two processes and by one: two runs are killed and go on, and others."""
    folder, device = tmp_path_factory.mktemp("runs"), request.param
    data = documents(folder)
    env = environment() if device == "cpu" else dict(os.environ)

    def command(name: str, batch: int, *more: object, steps: int = 4) -> list[object]:
        common = options(shallow["5.2"], data, folder / name, folder / "cache", steps=steps, device=device)
        return ["finetune", *common, *more, "--batch-size", batch]

    by_two = {
        "sharded, killed": command("sharded, killed", 1, *SHARDED, "--shard-optimizer"),
        "carried, killed": command("carried, killed", 1, *CARRIED),
    }
    for name in by_two:
        kill_at_a_checkpoint(by_two[name], folder / f"{name}.training", env)
    newest = checkpoints(folder / "sharded, killed.training")[-1]
    sealed = json.loads((newest / CHECKSUMS).read_text())
    assert damage(newest) is None and {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= set(sealed)
    shutil.copytree(folder / "sharded, killed.training", folder / "sharded, fewer.training")
    by_two["sharded, two"] = command("sharded, two", 1, *SHARDED, "--shard-optimizer")
    by_two["carried, two"] = command("carried, two", 1, *CARRIED)
    by_two |= {f"{way}, two": command(f"{way}, two", 1, *WAYS[way], steps=3) for way in ("lora", "state")}
    by_one = {name: command(name, 2, *SHARDED) for name in ("sharded, fewer", "sharded, one")}
    by_one |= {
        f"{way}, one": command(f"{way}, one", 2, *more, steps=4 if way == "carried" else 3)
        for way, more in WAYS.items()
    }
    return Runs(folder, run_commands(by_two, 2, env=env), run_commands(by_one, env=env))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_of_tuning(runs: Runs, way: str) -> None:
    assert runs.losses(f"{way}, two") == pytest.approx(runs.losses(f"{way}, one"), rel=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_sharded_optimizer(runs: Runs) -> None:
    """Half the state in each process, the same losses; killed, it goes on sharded, and unsharded in one process."""
    one = runs.losses("sharded, one")
    assert runs.losses("sharded, two") == pytest.approx(one, rel=5e-5)
    results = runs.two["sharded, two"], runs.one["sharded, one"]
    sharded, whole = (json.loads(done.stdout)["optimizer_bytes"] for done in results)
    assert 0.4 < sharded / whole < 0.6
    assert "resuming from" in runs.two["sharded, killed"].stderr
    assert runs.losses("sharded, killed") == runs.losses("sharded, two")
    assert "resuming from" in runs.one["sharded, fewer"].stderr
    assert runs.losses("sharded, fewer") == pytest.approx(one, rel=5e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_carried_states_go_on(runs: Runs) -> None:
    """Killed, two processes go on with the states and the whole optimizer of their checkpoint."""
    for name in ("carried, killed", "carried, two"):
        assert ("resuming from" in runs.two[name].stderr) == (name == "carried, killed")
    assert runs.losses("carried, killed") == runs.losses("carried, two")


def kill_at_a_checkpoint(arguments: list[object], work: Path, env: dict[str, str]) -> None:
    """SIGKILL every process of a run once it has written a checkpoint, and is half through."""
    ranks = start_command_in_ranks(arguments, 2, work.with_name("streams"), env, last={0: 2, 1: 2})
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == -signal.SIGKILL
    assert checkpoints(work) and not work.with_name(work.stem).exists()


@pytest.mark.slow
def test_refusals_end_every_process(shallow: dict[str, Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    done = run_command(
        "finetune", *options(shallow["5.2"], data, tmp_path / "out", tmp_path / "cache"), world=2
    )
    assert done.returncode != 0
    assert "already exists; pass --force" in done.stderr
