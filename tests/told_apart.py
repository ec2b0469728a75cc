"""A search for code that tells generations, cells and memories apart by their names.

Tests import it as ``from told_apart import told_apart``.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from test_imports import ROOT, parsed, sources

from rwkv_rev.architectures import registry

HOMES = ("architectures", "cells", "reversal", "wkv")
"""Folders of ``rwkv_rev`` where generations, cells and memories are made."""
COMMON = {"", "architecture", "registry", "scan", "fields", "epsilons", "fla"}
"""Files of ``architectures/`` that are no architecture's own."""
ASKING = {"isinstance", "issubclass"}
PROBING = {"hasattr", "getattr", "setattr", "delattr"}
LINES = dict(
    re.findall(
        r'^    "(.+)": "\w+\.(\w+)",$', Path(registry.__file__).read_text(encoding="utf-8"), re.MULTILINE
    )
)
"""Of the registry: versions, and what their files call them."""
VERSIONS = frozenset(LINES) - {"coupled"}  # which is a word of its own in other places
VERSION = re.compile(r"(?<![a-z_])(rwkv_)?version$")
NUMBERED = re.compile(r"(?<![a-z])w?(r?wkv|RWKV)_?\d", re.IGNORECASE)


@cache
def classes() -> dict[str, str]:
    """The folder of each class that one of :data:`HOMES` makes, but for errors."""
    return {
        node.name: folder
        for folder in HOMES
        for node in tree_of(folder)
        if isinstance(node, ast.ClassDef) and not node.name.endswith("Error")
    }


def tree_of(folder: str) -> Iterator[ast.stmt]:
    """What the files of a folder say at their outermost level."""
    for path in sorted((ROOT / "rwkv_rev" / folder).glob("*.py")):
        yield from parsed(path.read_text(encoding="utf-8")).body


@cache
def kinds() -> frozenset[str]:
    """The cells that a model has, and the memories: what advances and has a fingerprint."""
    common = {"ReversibleCell", "ShiftedCell", "StatelessCell"}
    cells = {
        node.name
        for node in tree_of("cells")
        if isinstance(node, ast.ClassDef) and "Cell" in ast.unparse(ast.Tuple(node.bases))
    }
    memories = {
        node.name
        for node in tree_of("reversal")
        if isinstance(node, ast.ClassDef) and {"advance", "fingerprint"} <= set(attributes_of(node))
    }
    return frozenset(cells - common | memories)


@cache
def own_attributes() -> dict[str, str]:
    """The folder of each attribute of a cell, memory or remnant that no other folder's class has, nor any protocol."""
    where: dict[str, set[str]] = {}
    for module, path in sources().items():
        folder = folder_of(module)
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                common = "Protocol" in ast.unparse(ast.Tuple(node.bases)) or node.name == "ReversibleCell"
                for name in attributes_of(node):
                    where.setdefault(name, set()).add("" if common else folder)
    return {
        name: folder
        for name, (folder, *others) in ((name, sorted(found)) for name, found in where.items())
        if not others and folder in HOMES
    }


def attributes_of(node: ast.ClassDef) -> Iterator[str]:
    """Fields, methods, and what is put into ``self``."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            yield inner.target.id
        elif isinstance(inner, ast.Assign):
            yield from (target.id for target in inner.targets if isinstance(target, ast.Name))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr


def folder_of(module: str) -> str:
    """``cells`` of ``rwkv_rev.cells.block``, nothing of ``rwkv_rev.state``."""
    (folder, *_) = [*module.split(".")[1:], ""]
    return folder if f"rwkv_rev.{folder}.{module.split('.')[-1]}" == module or folder in HOMES else ""


def told_apart(text: str, folder: str = "") -> set[str]:
    """What a source in a folder of ``rwkv_rev`` tells apart by name, of what is made elsewhere.

    Classes that it asks for or compares, versions, attributes that it looks for; outside of :data:`HOMES` cells,
    memories and architectures that it so much as names, and functions of a numbered generation.
    """
    found: set[str] = set()
    for node in ast.walk(parsed(text)):
        found |= set(asked(node, folder))
        if folder not in HOMES:
            found |= set(named(node))
    return found


def asked(node: ast.AST, folder: str) -> Iterator[str]:
    """What one expression asks for."""
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        yield from foreign_classes(operands, folder)
        yield from versions_in(node)
        if folder != "architectures" and any(map(is_version, operands)) and any(map(has_text, operands)):
            yield "version"
        if any(has_attribute(operand, "__name__", "__qualname__") for operand in operands):
            texts = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
            yield from (text for text in texts if classes().get(text, folder) != folder)
        if any(
            has_attribute(operand, "__dict__") or called(operand) in ("vars", "dir") for operand in operands
        ):
            yield from probed(operands[:1], folder)
    elif isinstance(node, ast.MatchValue):
        yield from versions_in(node)
    elif isinstance(node, ast.MatchClass):
        yield from foreign_classes([node.cls], folder)
    elif isinstance(node, ast.Dict) and len(node.keys) > 1:
        keys = [key for key in node.keys if key]
        if all(any(versions_in(key)) for key in keys):
            yield from (version for key in keys for version in versions_in(key))
    elif isinstance(node, ast.Call):
        if called(node) in ASKING:
            yield from foreign_classes(node.args[1:], folder)
        elif called(node) in PROBING:
            yield from probed(node.args[1:2], folder)
        elif called(node).endswith(".register"):
            yield from foreign_classes(node.args[:1], folder)
        elif folder != "architectures":
            yield from ["version"] * reads_version(node)
    elif isinstance(node, ast.For | ast.comprehension) and folder not in HOMES:
        yield from foreign_classes([node.iter], folder)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
        yield from foreign_classes([key for key in node.value.keys if key], folder)


def named(node: ast.AST) -> Iterator[str]:
    """What it names, of cells, memories, architectures and numbered generations."""
    if isinstance(node, ast.ImportFrom):
        module = str(node.module).removeprefix("rwkv_rev.architectures").lstrip(".")
        own = str(node.module).startswith("rwkv_rev.architectures")
        for name in (alias.name for alias in node.names):
            if is_kind(name) or (own and (module or name) not in COMMON):
                yield name
    name = name_of(node)
    if name and (is_kind(name) or is_numbered(name)):
        yield name


def is_kind(name: str) -> bool:
    return name in kinds() or name in LINES.values()


@cache
def is_numbered(name: str) -> bool:
    return NUMBERED.search(name) is not None


def name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def versions_in(node: ast.AST) -> set[str]:
    """Versions among the constants of an expression."""
    return {
        inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and inner.value in VERSIONS
    }


def called(node: ast.AST) -> str:
    """``re.match`` of ``re.match(...)``, ``.match`` of ``pattern().match(...)``."""
    return dotted(node.func) if isinstance(node, ast.Call) else ""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_version(node: ast.AST) -> bool:
    """Whether it is made of a version: ``config.rwkv_version``, ``version[0]``, ``config["rwkv_version"]``."""
    if isinstance(node, ast.Subscript):
        return is_version(node.value) or "version" in key_of(node.slice)
    if isinstance(node, ast.Call):
        keys = node.args[:1] if called(node).endswith(".get") else []
        return is_version(node.func) or any("version" in key_of(key) for key in keys)
    if isinstance(node, ast.Attribute) and not VERSION.search(node.attr):
        return is_version(node.value)
    return VERSION.search(name_of(node) or "") is not None


def key_of(node: ast.AST) -> str:
    return str(node.value) if isinstance(node, ast.Constant) and VERSION.search(str(node.value)) else ""


def has_text(node: ast.AST) -> bool:
    """Whether it is a text, or a collection of such."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)


def reads_version(node: ast.Call) -> bool:
    """Whether it makes a number of a version, or looks for a text in it."""
    if called(node) in ("int", "float", "tuple", "list", "Version"):
        return any(map(is_version, node.args))
    if called(node).startswith("re."):
        return any(map(is_version, node.args[1:]))
    receiver = node.func.value if isinstance(node.func, ast.Attribute) else node
    return receiver is not node and is_version(receiver) and any(map(has_text, node.args))


def has_attribute(node: ast.AST, *names: str) -> bool:
    return any(isinstance(inner, ast.Attribute) and inner.attr in names for inner in ast.walk(node))


def foreign_classes(nodes: list[ast.expr], folder: str) -> Iterator[str]:
    """Classes of other folders that stand there, and are not called."""
    for node in nodes:
        called = {id(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
        for inner in ast.walk(node):
            name = name_of(inner)
            if name and id(inner) not in called and classes().get(name, folder) != folder:
                yield name


def probed(nodes: list[ast.expr], folder: str) -> Iterator[str]:
    """Constants that are attributes of one folder's classes alone."""
    for node in nodes:
        if isinstance(node, ast.Constant) and own_attributes().get(node.value, folder) != folder:
            yield node.value
