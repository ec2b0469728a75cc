"""``rwkv-rev finetune --shard-model``, or under accelerate's FSDP plugin: one process's run, with weights in parts."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from finetune_cases import counting_text, environment, losses
from processes import run_commands, start_command_in_ranks
from safetensors.torch import load_file
from test_finetune_dist import documents

from rwkv_rev.training.callbacks import read_log
from rwkv_rev.training.checkpoints import checkpoints

pytestmark = pytest.mark.dist

PLUGIN = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
ROWS = 6
"""A step; the last rows are empty, and those of other processes longer."""
RESUMED = 3
"""Steps of the run that is killed after the second."""


def options(model: Path, folder: Path, output: str, rows: int, *more: object, steps: int = 2) -> list[object]:
    context, chunk, data = (256, 100, "long") if output.partition(",")[0] in LONG else (96, 38, "short")
    return [
        *("finetune", model, "--data", folder / data / "data.jsonl", "--output", folder / output, "--json"),
        *("--cache-dir", folder / "cache", "--device", "cpu", "--context-length", context),
        *("--chunk-length", chunk, "--warmup", 1, "--max-steps", steps, "--batch-size", rows),
        *("--weight-decay", 0.1, *more),
    ]


def norms(output: Path) -> list[float]:
    """Of the gradient at each step, before it is clipped: AdamW takes no notice of a wrong factor."""
    return [row["grad_norm"] for row in read_log(output / "training" / "log.jsonl") if "loss" in row]


def assert_same_folder(one: Path, other: Path) -> None:
    """The same files, and weights that differ as additions in another order make them."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


KINDS: dict[str, tuple[str, int, list[object]]] = {
    "full in three": ("7", 3, ["--grad-accum", 2]),
    "full, stored": ("5.2", 2, ["--bptt", "full"]),
    "lora": ("6", 2, ["--tune", "lora", "--lora-rank", 4]),
    "state in three": ("7", 3, ["--tune", "state"]),
    "shared contexts in four": ("7", 4, ["--pack"]),
    "carried": ("7", 2, ["--carry-state"]),
    "packed, blocks recomputed": ("7", 2, ["--pack", "--set", "checkpoint_blocks=true"]),
}


WORLDS = (4, 3, 2, 1)
SEEN = ("carried", "lora", "state in three", "shared contexts in four")
"""Kinds that are evaluated, and show samples: one of each number of processes, and one with an adapter."""
LONG = ("state in three", "half full", "half lora")
"""Kinds that begin at zero. Of short contexts some gradients are so small that rounding makes all of AdamW's step."""
HALF: dict[str, list[object]] = {tune: ["--tune", tune, "--dtype", "bfloat16"] for tune in ("full", "lora")}
"""In half precision."""


class Runs(NamedTuple):
    """One start of each number of processes goes through all that so many of them train."""

    folder: Path
    results: dict[str, dict[str, Any]]
    killed: list[tuple[float, int | None, list[str]]]
    """Of those that stayed when another was killed: seconds until the end, exit code, what they said."""


@pytest.fixture(scope="module")
def runs(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    for name, lines in (("short", 64), ("long", 160)):
        (folder / name).mkdir()
        documents(folder / name, lines=lines)
    held_out = counting_text(folder / "held-out.txt", 8)
    commands: dict[int, dict[str, list[object]]] = {world: {} for world in WORLDS}
    more: dict[str, dict[str, str]] = {}
    seen = ["--eval-data", held_out, "--sample-prompt", "3 squared", "--sample-tokens", 3]
    for kind, (version, world, how) in KINDS.items():
        one, parts = f"{kind}, one", f"{kind}, parts"
        how = [*how, *(seen if kind in SEEN else []), "--save-every", 0]
        groups, shared = (2, ["--context-parallel", 2]) if world == 4 else (world, [])
        given = options(shallow[version], folder, parts, ROWS // groups, *how, *shared)
        commands[1][one] = options(shallow[version], folder, one, ROWS, *how)
        if world == 2:
            more[parts] = PLUGIN
        commands[world][parts] = given if world == 2 else [*given, "--shard-model"]
    for tune, how in HALF.items():
        for name, sharded in (("whole", []), ("parts", ["--shard-model"])):
            output = f"half {tune}, {name}"
            commands[2][output] = options(shallow["7"], folder, output, 3, *how, *sharded)
    killed = kill_one_of_three(shallow["7"], folder)
    for world in (3, 2, 1):
        shutil.copytree(folder / "killed.training", folder / f"on {world}.training")
        commands[world][f"on {world}"] = resumable(shallow["7"], folder, f"on {world}", world)
    commands[1]["undisturbed"] = resumable(shallow["7"], folder, "undisturbed", 1)
    results: dict[str, dict[str, Any]] = {}
    for world in WORLDS:
        for name, done in run_commands(commands[world], world, more=more).items():
            said = done.stderr.splitlines()
            noise = [line for line in said if "Warning" in line and "[transformers]" not in line]
            assert not noise, (name, noise)
            results[name] = json.loads(done.stdout)
    return Runs(folder, results, killed)


def resumable(model: Path, folder: Path, output: str, world: int) -> list[object]:
    other = folder / "other.txt"
    other.write_text("Of what the run forgets, the first step knows most. " * 4)
    more: list[object] = ["--save-every", 1, "--resume", "auto", "--keep-best", "--eval-every", 1]
    more += ["--eval-data", other, "--lr", 3e-3, *(["--shard-model"] if world > 1 else [])]
    return options(model, folder, output, ROWS // world, *more, steps=RESUMED)


def kill_one_of_three(model: Path, folder: Path) -> list[tuple[float, int | None, list[str]]]:
    """After the second checkpoint."""
    given, streams = resumable(model, folder, "killed", 3), folder / "streams"
    ranks = start_command_in_ranks(given, 3, streams, environment(), last={1: 2})
    ranks[1].join(120)
    assert ranks[1].exitcode == -signal.SIGKILL, (folder / "streams.0.err").read_text()
    assert len(checkpoints(folder / "killed.training")) == 2
    began, found = time.monotonic(), []
    for rank in (0, 2):
        ranks[rank].join(60)
        seconds = time.monotonic() - began
        found.append(
            (seconds, ranks[rank].exitcode, (folder / f"streams.{rank}.err").read_text().splitlines())
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_of_one_process(runs: Runs, kind: str) -> None:
    outputs = [runs.folder / f"{kind}, {name}" for name in ("one", "parts")]
    one, parts = (runs.results[output.name] for output in outputs)
    assert losses(outputs[1]) == pytest.approx(losses(outputs[0]), rel=5e-5)
    assert norms(outputs[1]) == pytest.approx(norms(outputs[0]), rel=1e-3)
    assert parts["tokens"] == one["tokens"]
    if kind in SEEN:
        for name in ("before", "after"):
            assert parts["held_out"][name] == pytest.approx(one["held_out"][name], rel=1e-4)
        first, other = (read_log(output / "training" / "samples.jsonl")[0] for output in outputs)
        assert first == other
    assert_same_folder(*outputs)
    _, world, how = KINDS[kind]
    if "--tune" not in how and world < 4:
        assert parts["optimizer_bytes"] < 1.2 / world * one["optimizer_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("tune", HALF)
def test_half_precision(runs: Runs, tune: str) -> None:
    """As two processes that have the model whole each: rows of the same shapes, by the same autocast."""
    whole, parts = (runs.folder / f"half {tune}, {name}" for name in ("whole", "parts"))
    assert losses(parts) == pytest.approx(losses(whole), rel=5e-5)
    assert_same_folder(whole, parts)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(runs: Runs) -> None:
    """Within a minute, in one line."""
    for seconds, code, told in runs.killed:
        assert seconds < 60 and code not in (0, None)
        (line,) = (line for line in told if "error" in line.lower())
        assert "error: another process of this run has ended" in line and "--resume auto goes on" in line


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 2, 1])
def test_goes_on_with_another_number_of_processes(runs: Runs, world: int) -> None:
    """The best step is kept, whoever trained it."""
    one, found = runs.folder / "undisturbed", runs.folder / f"on {world}"
    assert losses(found) == pytest.approx(losses(one), rel=1e-3)
    assert runs.results[found.name]["best_step"] == runs.results[one.name]["best_step"] == 1
    assert_same_folder(one, found)
