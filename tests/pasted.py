"""The architecture of docs/cells.md and the toy generation as files of the package, with a line of the registry each.

`make lint` checks their types in the copy that it makes: ``python tests/pasted.py .lint/rwkv_rev``.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def pasted() -> dict[str, str]:
    """Files by their names in ``architectures/``: the page's blocks of a cell and of its model, and the toy."""
    (cell,) = (block for block in blocks("docs/cells.md") if "\nclass GatedUnit" in block)
    (model,) = (block for block in blocks("docs/cells.md") if "\nGATED_UNIT = " in block)
    toy = (ROOT / "tests" / "toy_generation.py").read_text(encoding="utf-8")
    return {"gated_unit.py": f"{cell}\n\n{model}", "toy.py": toy}


def lines() -> list[str]:
    """Of the registry: the page's, and the toy's."""
    page = (ROOT / "docs" / "cells.md").read_text(encoding="utf-8")
    return [*re.findall(r'^    ("gated-unit": ".*",)$', page, re.MULTILINE), '"toy": "toy.TOY",']


def paste(package: Path) -> None:
    """Put them into a copy of the package."""
    for name, text in pasted().items():
        (package / "architectures" / name).write_text(text, encoding="utf-8")
    registry = package / "architectures" / "registry.py"
    text, place = registry.read_text(encoding="utf-8"), '    "7": "rwkv7.RWKV7",\n'
    assert text.count(place) == 1
    further = "".join(f"    {line}\n" for line in reversed(lines()))
    registry.write_text(text.replace(place, place + further), encoding="utf-8")


if __name__ == "__main__":
    paste(Path(sys.argv[1]))
