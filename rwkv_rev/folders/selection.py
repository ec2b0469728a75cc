"""Choose the weights among the files of a repository or directory, and read shard indexes.

The rules stand in :mod:`rwkv_rev.folders.hub`; they look at names and sizes only.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.folders.source import WEIGHT_SUFFIXES
from rwkv_rev.printable import shortened

INDEX_SUFFIX = ".index.json"
# What from_pretrained looks for, in its order.
HUGGING_FACE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

MOST_LISTED = 50  # names in one message

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pth|pt)")


def choose_weights(files: Mapping[str, int | None], pattern: str | None, where: str) -> str:
    """The one weight file (or shard index) that ``pattern`` names, or that stands out without one.

    Args:
        files: size in bytes by relative path.
        pattern: a name or a glob, matched against the whole path and the last part of it.
        where: what people call the place, for messages.

    Raises:
        SourceError: if none or several match; the message lists the candidates with their sizes.
    """
    candidates = sorted(name for name in files if _is_candidate(name))
    if pattern is not None:
        if pattern in files:
            return pattern
        matches = [name for name in candidates if _matches(name, pattern)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise SourceError(
                f"{pattern!r} matches {len(matches)} files of {where}: {_listed(matches, files)}"
            )
        if candidates:
            raise SourceError(f"{where} has no file {pattern!r}; it holds {_listed(candidates, files)}")
        raise SourceError(f"{where} has no file {pattern!r} and holds no weights at all")
    for name in HUGGING_FACE_WEIGHTS:
        if name in files:
            return name
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        count = len(candidates)
        raise SourceError(
            f"{where} holds {count} checkpoints, choose with --file: {_listed(candidates, files)}"
        )
    shards = sorted(name for name in files if _SHARD.search(name))
    if shards:
        raise SourceError(
            f"{where} holds shards such as {shortened(shards[0])} but not their {INDEX_SUFFIX}; add it"
        )
    raise SourceError(f"{where} holds no weights (*{', *'.join(WEIGHT_SUFFIXES)})")


def weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name, from a ``*.index.json``.

    Raises:
        CheckpointError: if the file is no index, or names a file outside its own directory.
    """
    entries = read_object(index).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, str) for v in entries.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for file in entries.values():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
            raise CheckpointError(
                f"{index} names {shortened(repr(file))}, which lies outside its directory; refused"
            )
    return entries


def human_size(size: int | None) -> str:
    """Bytes for people, in decimal units as the Hub shows them."""
    if size is None:
        return "size unknown"
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def some(names: Sequence[str], count: int = 3) -> str:
    """The first ``count`` names, each shortened, and how many more there are."""
    more = len(names) - count
    return ", ".join(map(shortened, names[:count])) + (f" and {more} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
    """The text of an error in one line of about 200 characters."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, 200)


def _is_candidate(name: str) -> bool:
    if _SHARD.search(name) or _NOT_WEIGHTS.fullmatch(PurePosixPath(name).name):
        return False
    return name.endswith(WEIGHT_SUFFIXES) or name.endswith(
        tuple(suffix + INDEX_SUFFIX for suffix in WEIGHT_SUFFIXES)
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(PurePosixPath(name).name, pattern)


def _listed(names: Sequence[str], files: Mapping[str, int | None]) -> str:
    shown = ", ".join(f"{shortened(name)} ({human_size(files[name])})" for name in names[:MOST_LISTED])
    more = len(names) - MOST_LISTED
    return shown + (f" and {more} more" if more > 0 else "")
