"""How far something is: one line on any terminal, a line every so often where there is none."""

import io
import re
import sys
import time
from typing import Any

import pytest

from rwkv_rev import progress
from rwkv_rev.progress import Progress
from rwkv_rev.training.callbacks import describe

FACTS = describe({"loss": 2.34567, "tokens_per_second": 12345.6, "tape_bytes": 1.2e7, "memory_bytes": 694e6})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("total", [100, 100_000])
def test_a_bar_fits_its_line(monkeypatch: pytest.MonkeyPatch, columns: int, total: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 24))
    with Progress("fine-tuning", total, "steps", scaled=False) as shown:
        for _ in range(3):
            shown.add(total // 4, *FACTS)
            shown._bar.refresh()
    lines = re.split(r"[\r\n]", terminal.getvalue())
    assert max(map(len, lines)) <= columns
    last = [line for line in lines if line.strip()][-1]
    assert (
        last.startswith("fine-tuning  75%|") and f"{total // 4 * 3}/{total} [" in last and last.endswith("]")
    )
    assert "loss 2.3457" in last and "\n" not in terminal.getvalue().rstrip("\n")
    assert ("tokens/s" in last) == (columns > 80 or total == 100)
    assert ("memory 694 MB" in last) == (columns > 80)


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By time, and also while nothing advances."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with Progress("tokenising", 2_000_000, "bytes") as shown:
        shown.add(500_000)
        time.sleep(0.18)
    said = capsys.readouterr().err.splitlines()
    assert 2 <= len(said) <= 3
    assert re.fullmatch(r"tokenising +25%, 500k of 2.00M bytes in 00:00, 00:00 left", said[0]), said
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "ended"


def test_silence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("quick", 10, "steps") as shown:
        shown.add(10)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with Progress("unwanted", 10, "steps", wanted=False) as shown:
        shown.add(5)
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_run_tells_its_steps(
    shallow: dict[str, Any],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from finetune_cases import counting_text, settings

    from rwkv_rev.training.finetune import run

    monkeypatch.setattr(progress, "EVERY", 0.02)
    data = counting_text(tmp_path / "data.txt", 100)
    held_out = counting_text(tmp_path / "held-out.txt", 90)
    monkeypatch.setattr("rwkv_rev.training.saving.has_matplotlib", lambda: False)
    run(settings(shallow["4"], data, tmp_path / "out", max_steps=4, eval_data=[str(held_out)]))
    said = capsys.readouterr().err
    assert re.search(r"fine-tuning +\d+%, \d of 4 steps in 00:0\d, .* left, loss \d\.\d+, .* tokens/s", said)
    assert re.search(r"evaluating +\d+%, [\d.k]+ of [\d.k]+ tokens in 00:0\d,", said)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
