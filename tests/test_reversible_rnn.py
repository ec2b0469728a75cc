"""The example that counts what a reversible GRU and LSTM forget on text."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "reversible_rnn" / "reversible_rnn.py"
QUICK = ["--steps", "4", "--width", "12", "--window", "10", "--batch-size", "3", "--held-out-windows", "2"]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_a_quick_run(example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--cell", "gru", "lstm", "--limit", "none", "1"]
    example["main"]([*QUICK, *limits, "--json", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 4
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["no limit", "1 bits"] * 2
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    for row in rows:
        assert row["exact"] and row["tokens"] == 60
        assert 0 < row["loss"] < 9
        assert 0.9 * row["ideal"] < row["used"] < 1.5 * row["ideal"]
        assert row["buffer"] >= row["ideal"]
        assert row["limit"] is None or row["used"] <= row["limit"]


def test_the_papers_buffer_takes_what_it_can_count(example: dict[str, Any]) -> None:
    """z = 1/2: a bit a token; one int64 holds 53 of them before the next product may need more."""
    count = example["buffer_bits"]
    for tokens, buffers in ((1, 1), (53, 1), (54, 2), (106, 2), (107, 3)):
        found = count(torch.full((tokens, 2, 1, 5), 0.5))
        assert found == 64 * buffers * 10 + 8 * -(-tokens // 8)
    assert count(torch.ones(300, 2, 1, 5)) == 64 * 10 + 8 * 38
