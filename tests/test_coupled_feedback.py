"""The example that trains a model whose token shifts have become coupled feedback."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "coupled_feedback" / "coupled_feedback.py"
QUICK = ["--steps", "1", "--every", "1", "--window", "16", "--batch-size", "8", "--held-out-windows", "4"]


@pytest.mark.parametrize("model", ["rwkv-4", "rwkv-5.2"])
def test_a_quick_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    example["main"](
        [*QUICK, "--learning-rate", "3e-4", "--model", model, "--json", str(tmp_path / "found.json")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 1] * 3
    shift, coupled, nothing = rows[::2]
    assert coupled["loss"] == nothing["loss"] > shift["loss"] + 0.1  # feedback begins with zeros
    assert coupled["back"] == nothing["back"] == 0 and shift["back"] is None
    assert rows[3]["loss"] < coupled["loss"] and rows[5]["loss"] < nothing["loss"]
