"""Two processes compute what one does with the doubled batch, however they are launched."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from finetune_cases import counting_text, environment, finetune, losses, settings
from processes import run_command, start_command_in_ranks

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

    What torchrun starts are fresh interpreters; what accelerate does, by torchrun's own means, is forked.
    """
    module, *launch = [*LAUNCHERS[launcher], *(options if launcher == "accelerate" else ())]
    command = [*launch, "-m", "rwkv_rev.cli", "finetune", *arguments]
    env = environment(HF_HOME=tempfile.gettempdir())  # nobody's accelerate configuration
    return run_command(*command, env=env, module=module)


def options(
    model: Path, data: Path, output: Path, cache: Path, *, steps: int = 4, device: str = "cpu"
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
        max_steps=4,
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
    assert result["tokens"] == one.tokens and result["steps"] == 4
    assert one.held_out is not None
    assert result["held_out"]["after"] == pytest.approx(one.held_out[1], rel=1e-4)
    assert not (tmp_path / "two.training").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--tune", "lora", "--lora-rank", 4], ["--tune", "state"], ["--carry-state"]],
    ids=["lora", "state", "carried"],
)
def test_other_ways_of_tuning(
    shallow: dict[str, Path], data: Path, tmp_path: Path, more: list[object]
) -> None:
    arguments = options(shallow["5.2"], data, tmp_path / "two", tmp_path / "cache")
    done = run_command("finetune", *arguments, *more, "--batch-size", 1, world=2)
    assert done.returncode == 0, done.stderr[-3000:]
    arguments = options(shallow["5.2"], data, tmp_path / "one", tmp_path / "cache")
    done = run_command("finetune", *arguments, *more, "--batch-size", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    "device",
    [
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
def test_sharded_optimizer(shallow: dict[str, Path], data: Path, tmp_path: Path, device: str) -> None:
    """Half the state in each process, the same losses; killed, it goes on sharded, and unsharded in one process."""
    cache, steps = tmp_path / "cache", 8
    rest = ["--weight-decay", 0.1, "--json", "--resume", "auto", "--dtype", "float32"]
    env = environment() if device == "cpu" else dict(os.environ)

    def arguments(output: str, batch: int) -> list[object]:
        common = options(shallow["5.2"], data, tmp_path / output, cache, steps=steps, device=device)
        return [*common, *rest, "--batch-size", batch]

    def run(output: str, world: int, *more: str) -> subprocess.CompletedProcess[str]:
        done = run_command("finetune", *arguments(output, 2 // world), *more, world=world, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    one, two = run("one", 1), run("two", 2, "--shard-optimizer")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=5e-5)
    sharded, whole = (json.loads(done.stdout)["optimizer_bytes"] for done in (two, one))
    assert 0.4 < sharded / whole < 0.6

    kill_at_a_checkpoint([*arguments("killed", 1), "--shard-optimizer"], tmp_path / "killed.training", env)
    newest = checkpoints(tmp_path / "killed.training")[-1]
    sealed = json.loads((newest / CHECKSUMS).read_text())
    assert damage(newest) is None and {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= set(sealed)
    shutil.copytree(tmp_path / "killed.training", tmp_path / "fewer.training")
    assert "resuming from" in run("killed", 2, "--shard-optimizer").stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    run("fewer", 1)
    assert losses(tmp_path / "fewer") == pytest.approx(losses(tmp_path / "one"), rel=5e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_carried_states_go_on(shallow: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Killed, two processes go on with the states and the whole optimizer of their checkpoint."""
    rest = ["--carry-state", "--resume", "auto", "--batch-size", 1]

    def arguments(output: str) -> list[object]:
        return [*options(shallow["5.2"], data, tmp_path / output, tmp_path / "cache", steps=8), *rest]

    kill_at_a_checkpoint(arguments("killed"), tmp_path / "killed.training", environment())
    for output in ("killed", "two"):
        done = run_command("finetune", *arguments(output), world=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("resuming from" in done.stderr) == (output == "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")


def kill_at_a_checkpoint(arguments: list[object], work: Path, env: dict[str, str]) -> None:
    """SIGKILL every process of a run once it has written a checkpoint."""
    ranks = start_command_in_ranks(["finetune", *arguments], 2, work.with_name("streams"), env)
    deadline = time.monotonic() + 120
    while not checkpoints(work) and time.monotonic() < deadline and ranks[0].is_alive():
        time.sleep(0.02)
    group = [child for rank in ranks for child in psutil.Process(rank.pid).children(recursive=True)]
    for member in [*ranks, *group]:
        member.kill()
    for rank in ranks:
        rank.join()
    psutil.wait_procs(group)
    assert checkpoints(work) and not work.with_name(work.stem).exists(), "killed too late or too early"


@pytest.mark.slow
def test_refusals_end_every_process(shallow: dict[str, Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    done = run_command(
        "finetune", *options(shallow["5.2"], data, tmp_path / "out", tmp_path / "cache"), world=2
    )
    assert done.returncode != 0
    assert "already exists; pass --force" in done.stderr
