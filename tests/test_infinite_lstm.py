"""The example that trains a reversible LSTM over contexts that double."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "infinite_lstm" / "infinite_lstm.py"


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    example = runpy.run_path(str(EXAMPLE))
    given = [
        "--least",
        "5",
        "--most",
        "7",
        "--stride",
        "2",
        "--width",
        "12",
        "--batch-size",
        "2",
        "--chunk-length",
        "8",
    ]
    example["main"]([*given, "--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 + 2 + len(example["BACK"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["context"] for row in found["rows"]] == [32, 128]
    drift = found["drift"]
    assert all(row["exact"] == 0 for row in drift)
    assert drift[0]["float64"] < 1e-12 < 1e-8 < drift[0]["float32"] < 1e-4
    assert drift[-1]["float32"] is drift[-1]["float64"] is None
    assert (tmp_path / "found.png").stat().st_size > 1000
