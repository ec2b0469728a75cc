"""Damaged inputs of every format: never an unforeseen exception, never a hang, never a file left.

The suite tries a few numbered mutations of each. ``RWKV_REV_FUZZ=2000 pytest -n 0 -s tests/test_fuzz.py`` tries 2,000
of each and prints counts; ``RWKV_REV_FUZZ=7:8`` tries number 7 alone.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from fuzz import FORMATS, mutate, prepare

FEW = "0:6"


def numbers() -> range:
    first, _, stop = (os.environ.get("RWKV_REV_FUZZ") or FEW).rpartition(":")
    return range(int(first or 0), int(stop))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", FORMATS)
def test_mutations(
    kind: str, tmp_path: Path, bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, place, scratch = tmp_path / "whole", tmp_path / "place", tmp_path / "scratch"
    whole.mkdir()
    scratch.mkdir()
    file = prepare(kind, whole, bundled["5.2"])
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr("warnings.showwarning", None)
    refused, faults = 0, []
    for number in numbers():
        was_refused, fault = mutate(kind, number, whole, file, place)
        refused += was_refused
        if fault:
            faults.append(f"{kind} {number}: {fault}")
        shutil.rmtree(place)
    print(f"{kind}: {len(numbers())} mutations, {refused} refused, {len(faults)} faults")
    assert not faults, "\n".join(faults[:20])
    assert not list(scratch.iterdir())
