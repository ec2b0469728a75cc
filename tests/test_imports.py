"""Which file imports which: no circles, whatever the place of an import in its file; and no file that is too long.

Imports by a name that is made while the program runs count for all files that the name may be. Those of types alone
(``TYPE_CHECKING``) do not: nothing is imported by them.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"rwkv_rev": "rwkv_rev", "converters": "rwkv_rev.converters", "cli": "rwkv_rev.cli"}
MOST_LINES = 400
LONGER = {
    "rwkv_rev/reversal/triton_lifting.py": "GPU kernels, which are read side by side",
    "rwkv_rev/wkv/triton_wkv4.py": "GPU kernels, which are read side by side",
    "rwkv_rev/wkv/triton_wkv5.py": "GPU kernels, which are read side by side",
    "rwkv_rev/wkv/triton_wkv6.py": "GPU kernels, which are read side by side",
    "rwkv_rev/wkv/triton_wkv7.py": "GPU kernels, which are read side by side",
}


def sources() -> dict[str, Path]:
    """The files of the package by the names of their modules."""
    found = {}
    for folder, package in PLACES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of every import below ``node``, inside functions too, but for those of types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((name.name, "") for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from ((str(child.module), name.name) for name in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for other in child.orelse:
                yield from imported(ast.Module([other], []))
        else:
            yield from imported(child)


def called_for(tree: ast.AST) -> Iterator[str]:
    """A pattern for the modules of each ``import_module(...)``: of a name made of parts, or of any string in sight.

    A part that is put in stands for a file of a folder, and not for ``__main__``.
    """
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
        ):
            continue
        (name, *_) = node.args
        if isinstance(name, ast.Constant):
            yield re.escape(name.value)
        elif isinstance(name, ast.JoinedStr):
            parts = name.values
            yield "".join(re.escape(p.value) if isinstance(p, ast.Constant) else "[a-z]\\w*" for p in parts)
        else:
            strings = (inner.value for inner in ast.walk(tree) if isinstance(inner, ast.Constant))
            yield "|".join(re.escape(value) for value in strings if isinstance(value, str))


parsed = functools.cache(ast.parse)


@functools.cache
def imported_by(text: str) -> tuple[tuple[str, str], ...]:
    """Module and name of every import of a source."""
    return tuple(imported(parsed(text)))


def imports(files: dict[str, str], dynamic: bool = True) -> dict[str, set[str]]:
    """Which modules each one imports, of those that are there; a name that is a module counts as that one."""
    found = {}
    for module, text in files.items():
        found[module] = {
            inner if (inner := f"{source}.{name}") in files else source
            for source, name in imported_by(text)
            if source in files
        }
        if dynamic and re.search("import_module|__import__", text):
            for pattern in called_for(parsed(text)):
                found[module] |= {other for other in files if re.fullmatch(pattern, other)} - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of more than one, each of whom leads to every other."""
    reached = {}
    for start in graph:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        reached[start] = seen
    groups = {frozenset({b for b in reached[a] if a in reached[b]} | {a}) for a in graph}
    return [set(group) for group in groups if len(group) > 1]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {module: path.read_text(encoding="utf-8") for module, path in sources().items()}


@pytest.fixture(scope="module")
def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Without imports by names made at run time, which architectures, kernels and commands are for."""
    return imports(texts, dynamic=False)


def test_no_circle_of_files(texts: dict[str, str]) -> None:
    graph = imports(texts)
    assert len(graph) > 100
    assert "rwkv_rev.architectures.rwkv7" in graph["rwkv_rev.architectures.registry"]
    assert {"rwkv_rev.wkv.naive", "rwkv_rev.wkv.triton_wkv5"} <= graph["rwkv_rev.wkv.dispatch"]
    assert {"rwkv_rev.cli.convert", "rwkv_rev.conversion"} <= graph["rwkv_rev.cli"] | graph["rwkv_rev"]
    assert not circles(graph)


def package(module: str) -> str:
    """``rwkv_rev.converters`` of ``rwkv_rev.converters.names``; files of ``rwkv_rev`` itself stand alone."""
    return ".".join(module.split(".")[:2])


def packages(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which packages each one imports, itself left out."""
    found: dict[str, set[str]] = {package(module): set() for module in graph}
    for module, others in graph.items():
        found[package(module)] |= {package(other) for other in others} - {package(module)}
    return found


def test_no_circle_of_packages(graph: dict[str, set[str]]) -> None:
    assert circles(packages(graph)) == []


def test_what_packages_do_not_know(graph: dict[str, set[str]]) -> None:
    """Folders know no model, converters no proof of what they made."""
    known = packages(graph)
    assert known["rwkv_rev.folders"] == {
        "rwkv_rev.arguments",
        "rwkv_rev.bundled",
        "rwkv_rev.errors",
        "rwkv_rev.printable",
    }
    assert "rwkv_rev.converters" in known["rwkv_rev.equivalence"]
    assert "rwkv_rev.equivalence" not in known["rwkv_rev.converters"]


def test_configuration_imports_the_architectures_alone(graph: dict[str, set[str]]) -> None:
    assert graph["rwkv_rev.configuration"] == {"rwkv_rev.architectures.registry"}
    assert graph["rwkv_rev.architectures.registry"] == set()
    assert packages(graph)["rwkv_rev.architectures"] == {
        "rwkv_rev.cells",
        "rwkv_rev.printable",
        "rwkv_rev.reversal",
        "rwkv_rev.state",
        "rwkv_rev.wkv",
    }


def test_circles_are_found_wherever_the_import_stands() -> None:
    files = {
        "a": "import os\nif True:\n    import b",
        "b": "def f():\n    from c import d",
        "c": "",
        "c.d": "class E:\n    def g(self):\n        from a import x",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    import c",
        "f": "from e import f\nfrom a import a",
    }
    found = imports(files)
    assert found == {"a": {"b"}, "b": {"c.d"}, "c": set(), "c.d": {"a"}, "e": {"c"}, "f": {"e", "a"}}
    assert circles(found) == [{"a", "b", "c.d"}]


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nimportlib.import_module('p.a1')",
        "from importlib import import_module\ndef f(name):\n    import_module(f'p.{name}1')",
        "PLACES = {'x': ('p.a1', 'x')}\ndef f(name):\n    import_module(PLACES[name][0])",
        "def f():\n    return __import__('p.a1').a1",
    ],
    ids=["constant", "parts", "table", "builtin"],
)
def test_imports_by_a_name_made_at_run_time_are_seen(text: str) -> None:
    found = imports({"p": text, "p.a1": "import p", "p.b2": ""})
    assert found["p"] == {"p.a1"} and circles(found) == [{"p", "p.a1"}]


def test_no_file_is_too_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources().values()
    }
    longer = {name for name, lines in lengths.items() if lines > MOST_LINES}
    assert longer - LONGER.keys() == set(), "cut these, or say why not in LONGER"
    assert LONGER.keys() - longer == set(), "these are short enough now: take them out of LONGER"
