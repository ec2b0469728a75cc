"""``rwkv-rev finetune --shard-model``, or under accelerate's FSDP plugin: one process's run, with weights in parts."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import environment, losses
from processes import run_command, start_command_in_ranks
from safetensors.torch import load_file
from test_finetune_dist import documents

from rwkv_rev.training.callbacks import read_log
from rwkv_rev.training.checkpoints import checkpoints

pytestmark = pytest.mark.dist

PLUGIN = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
ROWS = 6
"""A step; the last rows are empty, and those of other processes longer."""


def options(model: Path, folder: Path, output: str, rows: int, *more: object, steps: int = 3) -> list[object]:
    return [
        *("finetune", model, "--data", folder / "data.jsonl", "--output", folder / output, "--json"),
        *("--cache-dir", folder / "cache", "--device", "cpu", "--context-length", 256, "--chunk-length", 100),
        *("--warmup", 1, "--max-steps", steps, "--batch-size", rows, "--weight-decay", 0.1, *more),
    ]


def run(world: int, given: list[object], **env: str) -> dict[str, Any]:
    done = run_command(*given, world=world, env=environment(**env))
    assert done.returncode == 0, done.stderr[-4000:]
    noise = [line for line in done.stderr.splitlines() if "Warning" in line and "[transformers]" not in line]
    assert not noise, noise
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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
    "full": ("5.2", 2, []),
    "full in three": ("7", 3, ["--grad-accum", 2]),
    "full, stored": ("5.2", 2, ["--bptt", "full"]),
    "lora": ("6", 2, ["--tune", "lora", "--lora-rank", 4]),
    "state in three": ("7", 3, ["--tune", "state"]),
    "shared contexts in four": ("7", 4, ["--pack"]),
    "carried": ("5.2", 2, ["--carry-state"]),
    "packed, blocks recomputed": ("7", 2, ["--pack", "--set", "checkpoint_blocks=true"]),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "full" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_run_of_one_process(shallow: dict[str, Path], tmp_path: Path, kind: str) -> None:
    version, world, more = KINDS[kind]
    documents(tmp_path, lines=160)
    seen = ["--eval-data", tmp_path / "data.jsonl", "--sample-prompt", "3 squared", "--sample-tokens", 6]
    one = run(1, options(shallow[version], tmp_path, "one", ROWS, *more, *seen))
    groups, shared = (2, ["--context-parallel", 2]) if world == 4 else (world, [])
    given = options(shallow[version], tmp_path, "parts", ROWS // groups, *more, *seen, *shared)
    parts = run(world, given, **PLUGIN) if world == 2 else run(world, [*given, "--shard-model"])
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "one"), rel=5e-5)
    assert norms(tmp_path / "parts") == pytest.approx(norms(tmp_path / "one"), rel=1e-3)
    assert parts["tokens"] == one["tokens"]
    for name in ("before", "after"):
        assert parts["held_out"][name] == pytest.approx(one["held_out"][name], rel=1e-4)
    first, other = (
        read_log(tmp_path / output / "training" / "samples.jsonl")[0] for output in ("one", "parts")
    )
    assert first == other
    assert_same_folder(tmp_path / "one", tmp_path / "parts")
    if version == "5.2":
        assert parts["optimizer_bytes"] < 0.7 * one["optimizer_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_half_precision(shallow: dict[str, Path], tmp_path: Path, tune: str) -> None:
    """As two processes that have the model whole each: rows of the same shapes, by the same autocast."""
    documents(tmp_path, lines=160)
    more = ["--tune", tune, "--dtype", "bfloat16"]
    run(2, options(shallow["7"], tmp_path, "whole", 3, *more))
    run(2, options(shallow["7"], tmp_path, "parts", 3, *more, "--shard-model"))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=5e-5)
    assert_same_folder(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_goes_on_with_another_number_of_processes(shallow: dict[str, Path], tmp_path: Path) -> None:
    """A killed rank ends the others within a minute, in one line; the best step is kept, whoever trained it."""
    documents(tmp_path, lines=160)
    other = tmp_path / "other.txt"
    other.write_text("Of what the run forgets, the first step knows most. " * 8)
    more: list[object] = ["--save-every", 1, "--resume", "auto", "--keep-best", "--eval-every", 1]
    more += ["--eval-data", other, "--lr", 3e-3]
    steps = 6

    def given(output: str, world: int) -> list[object]:
        sharded = ["--shard-model"] if world > 1 else []
        return options(shallow["7"], tmp_path, output, ROWS // world, *more, *sharded, steps=steps)

    one = run(1, given("one", 1))
    training = tmp_path / "killed.training"
    ranks = start_command_in_ranks(given("killed", 3), 3, tmp_path / "streams", environment())
    deadline = time.monotonic() + 120
    while len(checkpoints(training)) < 2 and time.monotonic() < deadline and ranks[0].is_alive():
        time.sleep(0.02)
    assert ranks[1].is_alive(), (tmp_path / "streams.0.err").read_text()
    ranks[1].kill()
    killed = time.monotonic()
    for rank in (0, 2):
        ranks[rank].join(60)
        assert time.monotonic() - killed < 60 and ranks[rank].exitcode not in (0, None)
        told = (tmp_path / f"streams.{rank}.err").read_text().splitlines()
        (line,) = (line for line in told if "error" in line.lower())
        assert "error: another process of this run has ended" in line and "--resume auto goes on" in line
    for world in (3, 2, 1):
        shutil.copytree(training, tmp_path / f"on {world}.training")
        result = run(world, given(f"on {world}", world))
        assert losses(tmp_path / f"on {world}") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
        assert result["best_step"] == one["best_step"] == 1
        assert_same_folder(tmp_path / "one", tmp_path / f"on {world}")
