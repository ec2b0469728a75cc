"""The example that trains a reversible LSTM over contexts that double."""

import json
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from processes import run_python

EXAMPLE = Path(__file__).parent.parent / "examples" / "infinite_lstm" / "infinite_lstm.py"


def test_a_quick_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step in a process of its own, which is forked."""
    pytest.importorskip("matplotlib")
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return run_python(command, **options)

    monkeypatch.setattr("subprocess.run", run)
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
    assert [command[:2] for command in commands] == 2 * [[sys.executable, str(EXAMPLE)]]


def test_rates_and_memory_have_axes_of_their_own() -> None:
    """Each from zero; what was not measured is not drawn."""
    pytest.importorskip("matplotlib")
    example = runpy.run_path(str(EXAMPLE))
    given = dict.fromkeys((field.name for field in fields(example["Row"])), 1)
    measured = [(2**10, 9000.0, 5 << 20), (2**12, 8000.0, 6 << 20), (2**14, 7000.0, None)]
    rows = [
        example["Row"](**(given | {"context": context, "tokens_per_second": rate, "memory": memory}))
        for context, rate, memory in measured
    ]
    figure = example["figure_of"](
        rows, [example["Drift"](1, 1e-6, 1e-15, 0.0), example["Drift"](2, None, 1e-9, 0.0)]
    )
    rates, memories, _ = figure.axes
    assert list(rates.lines[0].get_ydata()) == [9000, 8000, 7000]
    assert list(memories.lines[0].get_ydata()) == [5, 6]
    assert rates.get_ylim()[0] == memories.get_ylim()[0] == 0
    assert memories.get_ylim()[1] < 10 and rates.get_xlim() == memories.get_xlim()
