"""What is forecast and what is reported: both are beyond the loaded program, and each says what it counts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cases import counting_text
from processes import run_command

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell less")
def test_like_is_compared_with_like(bundled: dict[str, Path], tmp_path: Path) -> None:
    """A process of 600 MB and more, of which the run is 130 MB in tensors."""
    data = counting_text(tmp_path / "data.txt", 400)
    data.write_text(data.read_text()[:4095])  # with its end token one row
    common = (
        "finetune",
        bundled["5.2"],
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
        "--json",
    )
    common += ("--context-length", 4096, "--max-steps", 1, "--cache-dir", tmp_path / "cache")
    forecast = json.loads(run_command(*common, "--dry-run").stdout)["memory"]["device"]
    result = json.loads(run_command(*common).stdout)
    assert result["process_bytes"] > 3e8 + forecast
    assert 0.85 * forecast < result["memory_bytes"] < 2 * forecast + 5e7


def test_both_say_what_they_count(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 30)
    common = (
        "finetune",
        bundled["4"],
        "--data",
        data,
        "--output",
        "out",
        "--device",
        "cpu",
        "--max-steps",
        1,
    )
    planned, done = (
        " ".join(cli(*common, *more)[1].split()) for more in (["--dry-run"], [])
    )  # lines are folded
    assert "MB of tensors beyond the loaded program" in planned and "allocator keeps freed blocks" in planned
    assert "MB beyond the loaded program" in done and "of host memory with it" in done
