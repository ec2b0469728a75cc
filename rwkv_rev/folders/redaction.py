"""What a model folder may say about the machine that made it: names of files, never where they lie.

Records, cards and summaries are written from plain values that went through :func:`public`; so a folder holds nothing
that an upload would have to take out again. Where a source lies is remembered on this machine alone
(:mod:`rwkv_rev.folders.whereabouts`).
"""

import re
from pathlib import PurePath
from typing import Any

_NAMED = ("model", "output", "data", "eval_data")  # of these, the last part of each path
_LOCAL = ("cache_dir", "tape_dir", "resume", "resume_from", "notes", "warnings")  # without meaning elsewhere
_ABSOLUTE = re.compile(r"(~[\w.-]*|[A-Za-z]:)?[\\/].*", re.DOTALL)
_INSIDE = re.compile(
    r"(?<![\w.:/\\~-])(?:~[\w.-]*|[A-Za-z]:)?[\\/](?=[\w.~])(?:[^\s\"'<>|\\/]+[\\/])*([^\s\"'<>|\\/]*)"
)


def public(values: Any) -> Any:
    """Plain values for JSON, of which every path is a name and settings of this machine alone are left out."""
    if isinstance(values, dict):
        return {
            key: _names(value) if key in _NAMED else public(value)
            for key, value in values.items()
            if key not in _LOCAL
        }
    if isinstance(values, list | tuple):
        return [public(value) for value in values]
    if isinstance(values, PurePath):
        return values.name
    return public_text(values) if isinstance(values, str) else values


def public_text(text: str) -> str:
    """A text with the names alone of the absolute paths in it."""
    return file_name(text) if _ABSOLUTE.fullmatch(text) else _INSIDE.sub(r"\1", text)


def file_name(text: str) -> str:
    """The last part of a path or glob; a data set or repository of the Hub (``hf:owner/name``) as it is."""
    if text.startswith(("hf:", "bundled:")):
        return text
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1]


def _names(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_names(each) for each in value]
    return file_name(str(value)) if isinstance(value, str | PurePath) else public(value)
