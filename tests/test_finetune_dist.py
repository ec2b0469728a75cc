"""Two processes compute what one does with the doubled batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_cases import counting_text, environment, finetune, losses, settings

pytestmark = pytest.mark.dist


def two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node 2 -m rwkv_rev.cli finetune ...`` on the CPU, with gloo."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launch, "-m", "rwkv_rev.cli", "finetune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


def options(model: Path, data: Path, output: Path, cache: Path) -> list[object]:
    return [
        *(model, "--data", data, "--output", output, "--cache-dir", cache, "--device", "cpu"),
        *("--context-length", 256, "--chunk-length", 100, "--max-steps", 4, "--warmup", 1, "--save-every", 2),
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Documents of different lengths: the processes' batches differ in shape, and one process's last is empty."""
    text = counting_text(tmp_path / "text.txt", 160).read_text()
    pieces = [text[:700], text[700:1100], text[1100:1130], text[1130:2400], text[2400:]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


def test_same_losses_as_one_process(bundled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = options(bundled["5.2"], data, tmp_path / "two", cache)
    done = two_processes(*arguments, "--batch-size", 1, "--grad-accum", 2, "--eval-data", data, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    config = settings(
        bundled["5.2"],
        data,
        tmp_path / "one",
        cache_dir=str(cache),
        context_length=256,
        chunk_length=100,
        max_steps=4,
        batch_size=2,
        grad_accum=2,
        eval_data=[str(data)],
    )
    alone = finetune(config)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    assert result["tokens"] == alone.tokens and result["steps"] == 4
    assert alone.held_out is not None
    assert result["held_out"]["after"] == pytest.approx(alone.held_out[1], rel=1e-4)
    assert not (tmp_path / "two.training").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--tune", "lora", "--lora-rank", 4], ["--tune", "state"], ["--carry-state"]],
    ids=["lora", "state", "carried"],
)
def test_other_ways_of_tuning(
    bundled: dict[str, Path], data: Path, tmp_path: Path, more: list[object]
) -> None:
    arguments = options(bundled["5.2"], data, tmp_path / "two", tmp_path / "cache")
    done = two_processes(*arguments, *more, "--batch-size", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    arguments = options(bundled["5.2"], data, tmp_path / "one", tmp_path / "cache")
    command = [
        sys.executable,
        "-m",
        "rwkv_rev.cli",
        "finetune",
        *map(str, [*arguments, *more, "--batch-size", 2]),
    ]
    subprocess.run(command, check=True, capture_output=True, env=environment(), timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


@pytest.mark.slow
def test_refusals_end_every_process(bundled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    done = two_processes(*options(bundled["5.2"], data, tmp_path / "out", tmp_path / "cache"))
    assert done.returncode != 0
    assert "already exists; pass --force" in done.stderr
