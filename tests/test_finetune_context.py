"""``rwkv-rev finetune --context-parallel``: processes that share contexts compute what one does."""

import json
import time
from pathlib import Path

import pytest
from finetune_cases import environment, finetune, losses, settings
from processes import run_command, start_command_in_ranks
from test_finetune_dist import documents

from rwkv_rev.errors import RwkvRevError
from rwkv_rev.training.checkpoints import checkpoints
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.finetune import FinetuneResult
from rwkv_rev.training.launch import context_ranks

pytestmark = pytest.mark.dist

KINDS = {
    "full": [],
    "packed": ["--pack"],
    "carried": ["--carry-state"],
    "lora": ["--tune", "lora", "--lora-rank", 4],
    "state": ["--tune", "state"],
}


def options(
    model: Path, data: Path, output: Path, cache: Path, *more: object, steps: int = 3
) -> list[object]:
    return [
        *("finetune", model, "--data", data, "--output", output, "--cache-dir", cache, "--device", "cpu"),
        *("--context-length", 128, "--chunk-length", 51, "--warmup", 1, "--json", "--max-steps", steps),
        *more,
    ]


@pytest.fixture(scope="module")
def alone(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneResult, Path]:
    """One process with two rows a step."""
    folder = tmp_path_factory.mktemp("alone")
    data = documents(folder)
    given = {"context_length": 128, "chunk_length": 51, "max_steps": 3, "batch_size": 2, "warmup": 1}
    return finetune(
        settings(shallow["5.2"], data, folder / "one", eval_data=[str(data)], **given)
    ), folder / "one"


def test_two_groups_of_two(
    shallow: dict[str, Path], alone: tuple[FinetuneResult, Path], tmp_path: Path
) -> None:
    """A row for each group."""
    data = documents(tmp_path)
    more = ["--context-parallel", 2, "--batch-size", 1, "--eval-data", data]
    done = run_command(*options(shallow["5.2"], data, tmp_path / "out", tmp_path / "cache", *more), world=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    result, (one, output) = json.loads(done.stdout), alone
    assert losses(tmp_path / "out") == pytest.approx(losses(output), rel=2e-5)
    assert result["tokens"] == one.tokens and one.held_out is not None
    assert result["held_out"]["after"] == pytest.approx(one.held_out[1], rel=1e-4)
    assert result["tape_bytes"] < 0.7 * one.tape_bytes


@pytest.mark.parametrize(
    "kind", [kind if kind == "state" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_other_runs(shallow: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """As accelerate is configured by its ``ParallelismConfig``."""
    data = documents(tmp_path)
    given = options(shallow["5.2"], data, tmp_path / "one", tmp_path / "cache", *KINDS[kind])
    assert run_command(*given).returncode == 0
    given = options(shallow["5.2"], data, tmp_path / "two", tmp_path / "cache", *KINDS[kind])
    env = environment(ACCELERATE_USE_PARALLELISM_CONFIG="true", PARALLELISM_CONFIG_CP_SIZE="2")
    done = run_command(*given, world=2, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


def test_a_killed_rank_ends_all_and_the_run_goes_on(shallow: dict[str, Path], tmp_path: Path) -> None:
    """The other one ends by itself, in one line; the same command goes on with the losses of an undisturbed run."""
    data, training = documents(tmp_path), tmp_path / "killed.training"
    more = ["--context-parallel", 2, "--save-every", 1, "--resume", "auto"]
    common = options(shallow["5.2"], data, tmp_path / "killed", tmp_path / "cache", *more, steps=12)
    ranks = start_command_in_ranks(common, 2, tmp_path / "streams", environment())
    deadline = time.monotonic() + 120
    while not checkpoints(training) and time.monotonic() < deadline and ranks[0].is_alive():
        time.sleep(0.02)
    assert checkpoints(training) and ranks[1].is_alive()
    ranks[1].kill()
    killed = time.monotonic()
    ranks[0].join(60)
    assert time.monotonic() - killed < 60 and ranks[0].exitcode not in (0, None)
    ranks[1].join()
    told = [
        line for line in (tmp_path / "streams.0.err").read_text().splitlines() if line.startswith("error: ")
    ]
    assert len(told) == 1, told
    done = run_command(*common, world=2)
    assert done.returncode == 0, done.stderr[-3000:]
    given = options(shallow["5.2"], data, tmp_path / "one", tmp_path / "cache", steps=12)
    assert run_command(*given).returncode == 0
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "one"), rel=5e-5)


def test_accelerates_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for asked in (1, 2):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
        assert context_ranks(asked) == 2
    assert context_ranks(1) == 1  # what has been taken is not there any more
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(
        RwkvRevError, match="context_parallel = 4, and accelerate was configured for cp_size = 2"
    ):
        context_ranks(4)


def test_what_cannot_be_dealt_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RwkvRevError, match="3 processes cannot be dealt out in groups of 2; start 2,"):
        context_ranks(2)
    config = FinetuneConfig(model="m", data=["d"], output="o", context_parallel=2, bptt="full")
    with pytest.raises(RwkvRevError, match="splits every chunk"):
        config.check()
