"""``rwkv-rev finetune --context-parallel``: processes that share contexts compute what one does."""

import json
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from finetune_cases import environment, losses
from processes import run_commands, start_command_in_ranks
from test_finetune_dist import documents

from rwkv_rev.errors import RwkvRevError
from rwkv_rev.training.checkpoints import checkpoints
from rwkv_rev.training.config import FinetuneConfig
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
    model: Path, data: Path, output: Path, cache: Path, *more: object, steps: int = 2
) -> list[object]:
    return [
        *("finetune", model, "--data", data, "--output", output, "--cache-dir", cache, "--device", "cpu"),
        *("--context-length", 128, "--chunk-length", 51, "--warmup", 1, "--json", "--max-steps", steps),
        *more,
    ]


class Runs(NamedTuple):
    """By one start of four processes, of two and of one."""

    folder: Path
    results: dict[str, dict[str, Any]]
    killed: tuple[float, int | None, list[str]]
    """Of the process that stayed when the other was killed: seconds until the end, exit code, errors it told of."""

    def losses(self, name: str) -> list[float]:
        return losses(self.folder / name)


@pytest.fixture(scope="module")
def runs(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = documents(folder)

    def command(name: str, *more: object, steps: int = 2) -> list[object]:
        return options(shallow["5.2"], data, folder / name, folder / "cache", *more, steps=steps)

    shared, seen = ["--context-parallel", 2], ["--eval-data", data]
    going_on = command("killed", *shared, "--save-every", 1, "--resume", "auto", steps=3)
    killed = kill_one_of_two(going_on, folder)
    by_two = {f"{kind}, two": command(f"{kind}, two", *more) for kind, more in KINDS.items()}
    by_one = {f"{kind}, one": command(f"{kind}, one", *more) for kind, more in KINDS.items()}
    accelerates = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    done = run_commands({"four": command("four", *shared, "--batch-size", 1, *seen)}, 4)
    done |= run_commands(by_two | {"killed": going_on}, 2, more=dict.fromkeys(by_two, accelerates))
    by_one |= {
        "rows": command("rows", "--batch-size", 2, *seen),
        "undisturbed": command("undisturbed", steps=3),
    }
    done |= run_commands(by_one)
    assert "Warning" not in done["four"].stderr, done["four"].stderr
    return Runs(folder, {name: json.loads(each.stdout) for name, each in done.items()}, killed)


def kill_one_of_two(command: list[object], folder: Path) -> tuple[float, int | None, list[str]]:
    """After the first checkpoint."""
    ranks = start_command_in_ranks(command, 2, folder / "streams", environment(), last={1: 1})
    ranks[1].join(120)
    assert ranks[1].exitcode == -signal.SIGKILL and checkpoints(folder / "killed.training")
    began = time.monotonic()
    ranks[0].join(60)
    seconds = time.monotonic() - began
    said = (folder / "streams.0.err").read_text().splitlines()
    return seconds, ranks[0].exitcode, [line for line in said if line.startswith("error: ")]


def test_two_groups_of_two(runs: Runs) -> None:
    """A row for each group."""
    result, one = runs.results["four"], runs.results["rows"]
    assert runs.losses("four") == pytest.approx(runs.losses("rows"), rel=2e-5)
    assert result["tokens"] == one["tokens"]
    assert result["held_out"]["after"] == pytest.approx(one["held_out"]["after"], rel=1e-4)
    assert result["tape_bytes"] < 0.7 * one["tape_bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_runs(runs: Runs, kind: str) -> None:
    """As accelerate is configured by its ``ParallelismConfig``."""
    assert runs.losses(f"{kind}, two") == pytest.approx(runs.losses(f"{kind}, one"), rel=2e-5)
    one, two = (runs.results[f"{kind}, {name}"]["tape_bytes"] for name in ("one", "two"))
    assert two < 0.7 * one, "they shared no context"


def test_a_killed_rank_ends_all_and_the_run_goes_on(runs: Runs) -> None:
    """The other one ends by itself, in one line; the same command goes on with the losses of an undisturbed run."""
    seconds, code, told = runs.killed
    assert seconds < 60 and code not in (0, None)
    assert len(told) == 1 and "has ended, or cannot be reached any more" in told[0], told
    assert "--resume auto goes on" in told[0]
    assert runs.losses("killed") == pytest.approx(runs.losses("undisturbed"), rel=5e-5)


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
