"""The example that measures chunk lengths and batch sizes."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from processes import START_METHOD, run_python

EXAMPLE = Path(__file__).parent.parent / "examples" / "wide_batches" / "wide_batches.py"


def forked(command: list[str], **options: Any) -> Any:
    """A process that has imported everything."""
    return run_python(command, **options)


def test_a_point(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(EXAMPLE))
    monkeypatch.setattr("rwkv_rev.forecast.TINY_CHUNK", 4)  # as outside of tests
    point = ["--model", "bundled:rwkv-4", "--tokens", "96", "--point", "1", "2"]
    example["main"](point)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["rows"], found["tokens"], found["chunk_length"], found["at_once"]) == (2, 96, 1, 64)
    assert found["tokens_per_second"] > 0 and found["tape"] == 0  # two chunks
    assert example["line_of"](found).startswith("| 2 | 1 | 64 |")
    example["main"]([*point, "--most-gigabytes", "0.001"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["error"] == "0 GB forecast: not run"


def test_points_that_fail_have_lines_and_the_page_has_the_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    if START_METHOD == "forkserver":
        monkeypatch.setattr(example["subprocess"], "run", forked)
    example["main"](["--model", "no-such-shape", "--chunk-lengths", "1", "--batch-sizes", "3"])
    printed = capsys.readouterr().out
    assert "| 3 | 1 | rwkv_rev.errors.SourceError" in printed
    page = (EXAMPLE.parent / "README.md").read_text("utf-8").splitlines()
    heads = [line.replace("| model |", "|") for line in page if "tokens at once |" in line]
    assert len(heads) == 3 and set(heads) == {printed.splitlines()[0]}
