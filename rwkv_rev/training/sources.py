"""Find training data: paths, folders, globs and dataset ids to one :class:`~rwkv_rev.training.documents.DataSource`
for each file, in an order that does not depend on the file system.

Of a folder every readable file under it counts, but hidden ones; what is left out is counted by kind, so that nobody
believes to have trained on it. Loads no dataset and opens no data file.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rwkv_rev.errors import CheckpointError, DataError, SourceError
from rwkv_rev.folders.safe_input import read_object, refuse_special
from rwkv_rev.printable import counted, shortened
from rwkv_rev.training.documents import HUB_ID, DataSource, one_line

KIND_OF_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".bin": "binidx",
    ".idx": "binidx",
}
PACKED = ("text", "jsonl", "json", "csv")
"""Kinds that may be compressed by gzip."""
READABLE = (
    ".txt, .md, .rst, .py, .jsonl, .json, .csv (each also .gz), .parquet, a .bin/.idx pair, a folder of "
    "datasets.save_to_disk, a folder, a glob or hf:owner/name"
)
Skipped = Counter[str]
_SHOWN = 8


def find_sources(data: str | Path | Sequence[str | Path], skipped: Skipped | None = None) -> list[DataSource]:
    """Expand paths, folders, globs and dataset ids, in the order given; files of a folder or glob are sorted.

    Files of folders that cannot be read are counted in ``skipped`` by kind. Raises DataError for anything missing,
    unreadable by kind, or empty.
    """
    items = [data] if isinstance(data, str | Path) else list(data)
    skipped = Counter() if skipped is None else skipped
    sources = [source for item in items for source in _expand(str(item), skipped)]
    if not sources:
        raise DataError(f"no data given; give {READABLE}")
    return sources


def describe_skipped(skipped: Skipped) -> str:
    """``3 files: 2 .png, 1 hidden``, the most frequent first."""
    kinds = [f"{count:,} {kind}" for kind, count in skipped.most_common(_SHOWN)]
    if (rest := len(skipped) - len(kinds)) > 0:
        kinds.append(counted(rest, "more kind"))
    return f"{counted(skipped.total(), 'file')}: {', '.join(kinds)}"


def _expand(item: str, skipped: Skipped) -> list[DataSource]:
    if item.startswith("hf:"):
        if not HUB_ID.fullmatch(item.removeprefix("hf:")):
            raise DataError(
                f"{item}: not a dataset id; write hf:owner/name, hf:owner/name/config or hf:owner/name:split"
            )
        return [DataSource("hub", item)]
    path = _expanded(item)
    refuse_special(path, DataError)
    try:
        return _found(item, path, skipped)
    except OSError as error:
        raise DataError(f"{item}: cannot be looked at: {error.strerror or error}") from error


def _found(item: str, path: Path, skipped: Skipped) -> list[DataSource]:
    if (saved := _saved_dataset(path)) is not None:
        return [saved]
    if path.is_dir():
        return _from_directory(path, skipped)
    if path.is_file():
        return [_from_file(path)]
    if Path(f"{path}.idx").is_file():
        return [_from_file(Path(f"{path}.idx"))]
    if any(letter in item for letter in "*?["):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns)
        sources = _unique_pairs(_from_file(match) for match in matches if match.is_file())
        if not sources:
            raise DataError(f"{item}: no file matches")
        return sources
    match = HUB_ID.fullmatch(item)
    if match and "/" in match["id"] and _kind(path) is None and not item.startswith("."):
        return [DataSource("hub", item)]
    raise DataError(f"{item}: no such file or folder; give {READABLE}")


def _expanded(item: str) -> Path:
    try:
        return Path(item).expanduser()
    except RuntimeError as error:  # ~nobody
        raise DataError(f"{item}: {one_line(error)}") from error


def _from_directory(folder: Path, skipped: Skipped) -> list[DataSource]:
    found: list[DataSource] = []
    left_out: Skipped = Counter()

    def closed(error: OSError) -> None:
        left_out["folders that cannot be read"] += 1

    for root, folders, names in os.walk(folder, onerror=closed):
        here = Path(root)
        left_out["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
        inner: dict[str, DataSource | None] = {}
        for name in folders:
            if not name.startswith("."):
                try:
                    inner[name] = _saved_dataset(here / name)
                except OSError as error:
                    closed(error)
        folders[:] = [name for name, saved in inner.items() if saved is None]
        found += [saved for saved in inner.values() if saved is not None]
        for path in (here / name for name in names if not name.startswith(".")):
            kind = _kind(path)
            alone = (
                kind == "binidx" and path.suffix.lower() == ".bin" and not _is_file(path.with_suffix(".idx"))
            )
            if not _is_file(path):
                left_out["not a file"] += 1
            elif kind is None or alone:
                left_out[_suffix(path)] += 1
            else:
                found.append(_from_file(path))
    left_out += Counter()  # without kinds of which there are none
    if not found:
        there = f"; it holds {describe_skipped(left_out)}" if left_out else ""
        raise DataError(f"{folder}: nothing that can be read in this folder{there}; give {READABLE}")
    skipped += left_out
    return _unique_pairs(sorted(found, key=lambda source: source.path or Path()))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # closed to us, or gone
        return False


def _saved_dataset(folder: Path) -> DataSource | None:
    """A folder of ``save_to_disk``: of one dataset, or of several splits, of which ``train`` is meant."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return DataSource("arrow", str(folder), folder)
    splits = folder / "dataset_dict.json"
    if not splits.is_file():
        return None
    try:
        names = [str(name) for name in read_object(splits)["splits"]]
    except (SourceError, CheckpointError, KeyError, TypeError) as error:
        raise DataError(f"{splits}: not a saved dataset: {one_line(error)}") from error
    if "train" not in names:
        raise DataError(
            f"{folder}: has no split train; name one of its folders: {', '.join(map(shortened, names[:12]))}"
        )
    return DataSource("arrow", str(folder / "train"), folder / "train")


def _suffix(path: Path) -> str:
    """The ending that tells a file's kind, the one before ``.gz`` included."""
    found = "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix
    return found.lower() if re.fullmatch(r"(\.\w{1,12}){1,2}", found) else "of no kind"


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix != ".gz":
        return KIND_OF_SUFFIX.get(suffix)
    inner = KIND_OF_SUFFIX.get(Path(path.stem).suffix.lower())
    return inner if inner in PACKED else None


def _unique_pairs(sources: Iterable[DataSource]) -> list[DataSource]:
    """Both files of a binidx pair name the same source; keep it once."""
    return list(dict.fromkeys(sources))


def _from_file(path: Path) -> DataSource:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: cannot tell what '{path.suffix or path.name}' holds; give {READABLE}")
    if kind == "binidx":
        path = path.with_suffix(".idx")
        for half in (path, path.with_suffix(".bin")):
            if not half.is_file():
                raise DataError(
                    f"{half}: missing; a binidx data set is a .bin and an .idx file of the same name"
                )
    return DataSource(kind, str(path), path)
