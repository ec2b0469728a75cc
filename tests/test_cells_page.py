"""docs/cells.md: its cell runs from the equation to a trained model, and its table counts what the formats hold."""

import re
from pathlib import Path

import pytest
import torch
from contract_laws import LAWS, Trial, chunks
from test_examples import run
from test_linear_attention import filled

import rwkv_rev
from rwkv_rev.architectures import registry
from rwkv_rev.architectures.linear_attention import EXPONENTS
from rwkv_rev.numerics import nuhmc
from rwkv_rev.reversal.additive import FORMATS, capacity

PAGE = Path(__file__).parents[1] / "docs" / "cells.md"


def test_from_equation_to_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    names = run("docs/cells.md", tmp_path, monkeypatch)
    assert names["report"].passed
    with (tmp_path / "text.txt").open(encoding="utf-8") as text:
        (tmp_path / "part.txt").write_text("".join(text.readlines()[::8]), "utf-8")
    before, after = (
        rwkv_rev.evaluate(tmp_path / folder, [tmp_path / "part.txt"], context_length=64).total.bits_per_byte
        for folder in ("unit", "trained")
    )
    assert after < before - 1
    for law in ("retreat_undoes_advance", "masked_tokens_change_nothing", "chunks_of_any_length_agree"):
        cell = filled(names["GatedUnit"](12, 6)).double()
        LAWS[law](Trial(cell, cell.empty(2, dtype=torch.float64), chunks(12, 2, 0)))


def test_the_table_of_formats() -> None:
    rows = re.findall(r"^\| ((?:int|float)\d+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(FORMATS)
    for name, cells in rows:
        bits, exponent, below, held, free = (cell.replace(",", "").strip() for cell in cells.split("|"))
        assert (int(bits), int(exponent)) == (FORMATS[name][1], EXPONENTS[name])
        assert int(below) == 2 ** (int(bits) + int(exponent))
        assert int(held) == capacity(name, int(bits) // 2)
        assert free == (str(nuhmc(getattr(torch, name))) if name.startswith("float") else "")
