"""docs/cells.md: its cell runs from the equation to a trained model, and its table counts what the formats hold."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from contract_laws import LAWS, Trial, chunks
from pasted import pasted
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


def test_a_command_line_that_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's script makes a model and looks into it, which ``rwkv-rev`` refuses."""
    (script,) = re.findall(r"^```py\n(from gated_unit.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "gated_unit.py").write_text(pasted()["gated_unit.py"], "utf-8")
    (tmp_path / "my_rwkv_rev.py").write_text(script, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["--set", "hidden_size=16", "--set", "num_hidden_layers=2"]
    for words in (["init", "--architecture", "gated-unit", *small, "--output", "unit"], ["inspect", "unit"]):
        monkeypatch.setattr(sys, "argv", ["my_rwkv_rev.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("my_rwkv_rev.py", run_name="__main__")
        assert not ended.value.code
    assert (tmp_path / "unit" / "config.json").is_file()
    del sys.modules["gated_unit"]


def test_the_table_of_formats() -> None:
    rows = re.findall(r"^\| ((?:int|float)\d+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(FORMATS)
    for name, cells in rows:
        bits, exponent, below, held, free = (cell.replace(",", "").strip() for cell in cells.split("|"))
        assert (int(bits), int(exponent)) == (FORMATS[name][1], EXPONENTS[name])
        assert int(below) == 2 ** (int(bits) + int(exponent))
        assert int(held) == capacity(name, int(bits) // 2)
        assert free == (str(nuhmc(getattr(torch, name))) if name.startswith("float") else "")
