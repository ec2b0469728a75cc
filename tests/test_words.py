"""Five words that mean one thing each: no name of a class, function, argument or variable uses them for another.

What each means: docs/terms.md. ``recording``, ``planning``, ``working folder`` and the like are words of their own.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_imports import ROOT, sources

TERMS = (ROOT / "docs" / "terms.md").read_text(encoding="utf-8")
MEANINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "advance": {
        "one chunk forwards, exact": ("rwkv_rev/cells/", "rwkv_rev/reversal/", "rwkv_rev/bptt/"),
    },
    "plan": {
        "what chunks need of the weights": (
            *("rwkv_rev/cells/", "rwkv_rev/reversal/", "rwkv_rev/bptt/", "rwkv_rev/wkv/"),
            *("rwkv_rev/equivalence/reversal.py", "rwkv_rev/equivalence/forgetting.py"),
        ),
        "what a training run will do, as people see it": (
            *("rwkv_rev/training/planning.py", "cli/finetune.py", "cli/plan.py"),
        ),
    },
    "record": {
        "what one chunk leaves on the tape": (
            *("rwkv_rev/bptt/", "rwkv_rev/reversal/tape.py"),
            *("rwkv_rev/equivalence/reversal.py", "rwkv_rev/forecast.py"),
        ),
        "conversion.json, where a folder comes from": (
            *("converters/converted.py", "converters/card.py", "converters/export.py", "rwkv_rev/fresh.py"),
            *("rwkv_rev/conversion.py", "rwkv_rev/equivalence/", "rwkv_rev/folders/"),
            "rwkv_rev/training/saving.py",
        ),
        "PyTorch's own word for a file inside a zip file": (
            "converters/zip_records.py",
            "converters/reading.py",
        ),
    },
    "work": {},
    "graph": {
        "what PyTorch keeps for a gradient": (
            *("rwkv_rev/bptt/layers.py", "rwkv_rev/bptt/full.py", "rwkv_rev/bptt/any_loss.py"),
            *("rwkv_rev/cells/token_walk.py", "rwkv_rev/forecast.py", "rwkv_rev/architectures/"),
        ),
    },
}


@functools.cache
def names(text: str) -> frozenset[str]:
    """What a source gives a name to."""
    return frozenset(_names(text))


def _names(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def with_word(text: str, word: str) -> set[str]:
    """Names of a source with a word in them, or its plural."""
    spelt = rf"(^|_){word}s?(?=_|$)|(^|_){word.upper()}S?(?=_|$)|{word.capitalize()}s?(?=[A-Z_0-9]|$)"
    pattern = re.compile(spelt)
    return {name for name in names(text) if pattern.search(name)}


@pytest.mark.parametrize("word", MEANINGS)
def test_a_word_means_one_thing(word: str) -> None:
    known = tuple(place for places in MEANINGS[word].values() for place in places)
    used: dict[str, set[str]] = {}
    for path in sources().values():
        place = path.relative_to(ROOT).as_posix()
        if found := with_word(path.read_text(encoding="utf-8"), word):
            used[place] = found
    assert {place: found for place, found in used.items() if not place.startswith(known)} == {}
    for place in known:
        assert any(name.startswith(place) for name in used), f"nothing is called {word} in {place} any more"
    assert re.search(rf"\*\*{word}\*\*", TERMS, re.IGNORECASE), f"docs/terms.md does not say what {word} is"


def test_the_search_finds() -> None:
    text = """
class WorkItem: pass
class Wkv5Work: pass
def plan_shards(record, working): advanced = workers = 1
self.data_records = recording = planning = framework = 2
"""
    assert with_word(text, "work") == {"WorkItem", "Wkv5Work"}
    assert with_word(text, "plan") == {"plan_shards"}
    assert with_word(text, "record") == {"record", "data_records"}
    assert with_word(text, "advance") == set()


def test_files_are_there() -> None:
    for meanings in MEANINGS.values():
        for place in (place for places in meanings.values() for place in places):
            assert Path(ROOT / place).exists(), place
