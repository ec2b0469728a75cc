"""Every table fits 80 columns or goes on below."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_rev.cli.output import print_table
from rwkv_rev.tables import WIDTH, aligned, folded, wrapped


@given(st.lists(st.integers(3, 76), min_size=1, max_size=12), st.integers(1, 2))
def test_folding_keeps_every_column_once(widths: list[int], keys: int) -> None:
    tables = folded(widths, 77, keys)
    first = list(range(min(keys, len(widths))))
    assert all(columns[: len(first)] == first for columns in tables)
    assert first + [i for columns in tables for i in columns[len(first) :]] == list(range(len(widths)))
    for columns in tables:
        assert sum(widths[i] for i in columns) <= 77 or len(columns) <= len(first) + 1


def test_a_wide_table_goes_on_below() -> None:
    header = ["", *(f"column {i}" for i in range(9))]
    rows = [[f"row {j}", *(f"{i * j:.3f}" for i in range(9))] for j in range(3)]
    lines = aligned(header, rows)
    assert max(map(len, lines)) <= WIDTH and lines.count("") == 1
    assert sum(line.startswith("| row 1") for line in lines) == 2
    assert aligned(header, rows, width=200)[0].count("column") == 9


def test_prose_is_wrapped_and_paths_stay_whole() -> None:
    path = "/a/long-path" * 10
    lines = wrapped(f"weights: the values of {path} are those of the original, every one of them, to the bit")
    assert path in lines and all(len(line) <= WIDTH for line in lines if line != path)
    for before in range(60, 80):
        lines = wrapped(f"{'x' * before} (theory 45.8 %), and\xa0more")
        assert "".join(lines).count("45.8 %") == 1 and not any(line.startswith("%") for line in lines)
        assert "\\xa0" in lines[-1] and max(map(len, lines)) <= WIDTH


def test_printed_tables_fit(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["setting", ">tokens", *(f">a figure of some length {i}" for i in range(6))]
    print_table("many figures", heads, [["reversible C=128", 1024, *range(6)]] * 2, keys=2)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum("reversible C=128" in line for line in lines) > 2


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=9), st.integers(1, 2))
def test_printed_cells_and_heads_stay_whole(
    capsys: pytest.CaptureFixture[str], widths: list[int], keys: int
) -> None:
    """Neither cut nor broken over lines, whatever their widths."""
    capsys.readouterr()
    heads = [f"{i}" + "h" * (width - 1) for i, width in enumerate(widths)]
    cells = [f"{i}" + "c" * (width - 1) for i, width in enumerate(widths)]
    print_table("", [f">{head}" for head in heads], [cells], keys=keys)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for text in (*heads, *cells):
        assert any(f" {text} " in f" {line} " for line in lines)
