"""The example that trains by each objective: that it runs, what its figures are of, and what the tables tell."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_rev.training.objectives.objectives import KINDS, objectives_of
from rwkv_rev.training.objectives.recall import Recall

FOLDER = Path(__file__).parent.parent / "examples" / "objectives"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "objectives.py"))


def test_a_quick_run(
    example: dict[str, Any], shallow: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = {
        "model": shallow["5.2"], "steps": 1, "context-length": 512, "chunk-length": 128, "batch-size": 1,
        "held-out-rows": 2, "json": tmp_path / "found.json", "plot": tmp_path / "found.png",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    example["main"]([*given, "--runs", "truncated next-token", "next-token", "recall"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 * (1 + 4)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["run"] for row in found["results"]] == [
        "before training", "truncated next-token", "next-token", "recall",
    ]  # fmt: skip
    before, truncated, exact, _ = found["results"]
    assert list(before["positions"]) == ["0-64", "64-128", "128-256", "256-512"]
    assert list(before["behind the marker"]) == ["64", "128", "256", "512"]
    # one step of the same rows: two gradients, and questions in the third
    assert truncated["tokens"] == exact["tokens"] and truncated["positions"] != exact["positions"]
    assert all(0 < row["second reading"] < 8 for row in found["results"])
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_every_objective_is_run(example: dict[str, Any]) -> None:
    runs = example["RUNS"]
    named = {settings.get("objective", "next-token") for settings in runs.values()}
    assert named == set(KINDS)
    assert all(objectives_of(name) for name in named)
    (recall,) = objectives_of("recall").parts
    assert isinstance(recall, Recall) and (recall.span, recall.cue) == (example["SPAN"], example["CUE"])


def test_figures_are_of_the_tokens_they_name(example: dict[str, Any]) -> None:
    """By a model that says what it was asked for: its logits tell token and place apart."""
    settings = example["Settings"](context_length=512, held_out_rows=3)
    rows = torch.arange(3 * 512).remainder(251).view(3, 512)
    asked: list[tuple[torch.Tensor, bool]] = []

    def costs(model: None, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        asked.append((ids, state is not None))
        return torch.arange(ids.shape[1] - 1, dtype=torch.float32).expand(len(ids), -1), "after"

    measure = example["measure"]
    measure.__globals__["bits"] = costs
    found = measure(None, rows, settings)
    # costs are the number of the prediction: token t is predicted by position t - 1
    assert found["positions"]["64-128"] == pytest.approx(sum(range(63, 127)) / 64)
    assert found["positions"]["0-64"] == pytest.approx(sum(range(63)) / 63)
    assert found["second reading"] == pytest.approx((256 + 510) / 2)
    assert found["after a change"] == pytest.approx(sum(range(256, 319)) / 63)
    changed, twice = asked[1][0], asked[2][0]
    assert torch.equal(changed[1, 256:], rows[0, :64]) and torch.equal(twice[:, :256], twice[:, 256:])
    mark = len(example["MARKER"].encode())
    begins = [448, 480, *(512 - distance + 32 * span for distance in (128, 256, 512) for span in range(4))]
    for (ids, with_state), begin in zip(asked[3:17], begins, strict=True):
        assert with_state and torch.equal(ids[:, mark:], rows[:, begin : begin + 32])
    of_128 = found["behind the marker"]["128"]
    assert of_128["again"] == pytest.approx(sum(range(mark + 7, mark + 31)) / 24)
    assert of_128["first"] == pytest.approx(sum(sum(range(b + 7, b + 31)) / 24 for b in begins[2:6]) / 4)
    assert example["saved"](found["behind the marker"])[1] == of_128["first"] - of_128["again"]


def test_the_figures_of_the_page(example: dict[str, Any]) -> None:
    """Its tables are those of the run that lies beside it."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    report = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert [row["run"] for row in report["results"]] == [example["BEFORE"], *example["RUNS"]]
    assert example["tables"](report) in page
