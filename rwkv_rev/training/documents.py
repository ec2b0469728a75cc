"""Find training data and read it as documents, one at a time.

What can be read, and what one document is:

- ``.txt``: UTF-8, the whole file is one document, line ends untouched;
- ``.jsonl``: one record a line; its text field, or a prompt and a completion (loss on the completion only);
- ``.parquet`` and Hugging Face datasets (``hf:owner/name[/config][:split]``): the same fields, one record a
  row;
- RWKV's ``binidx`` pairs: already token ids, read by :mod:`rwkv_rev.training.binidx`;
- a folder (every file of these kinds under it, in sorted order) or a glob.

Nothing is held but the record at hand. A ``.txt`` longer than ``PIECE_BYTES`` is handed out in pieces, cut
where a line ends and the next begins with no white space, so that several processes can tokenise one long
book. Limit: a tokenizer whose tokens span a line end may see a different token at such a cut, at most one
in four mebibytes.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rwkv_rev.errors import DataError

PIECE_BYTES = 4 << 20
KIND_OF_SUFFIX = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".bin": "binidx",
    ".idx": "binidx",
}
READABLE = ".txt, .jsonl, .parquet, a .bin/.idx pair, a folder, a glob or hf:owner/name"

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold the text.

    All None: ``text``, or else ``prompt`` and ``completion``; a record with both kinds is refused as
    ambiguous.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise DataError("a prompt field needs a completion field and the other way round; name both")
        if self.text is not None and self.prompt is not None:
            raise DataError("name either a text field or a prompt and a completion field, not both")

    def choose(self, names: Iterable[str], where: str) -> tuple[str | None, str]:
        """(prompt field or None, text field) among ``names``; DataError naming ``where`` without one."""
        present = set(names)
        pair = (self.prompt or "prompt", self.completion or "completion")
        text = self.text or "text"
        has_pair, has_text = present.issuperset(pair), text in present
        if self.prompt is not None:
            has_text = False
        elif self.text is not None:
            has_pair = False
        if has_pair and has_text:
            raise DataError(
                f"{where}: has both '{text}' and '{pair[0]}'/'{pair[1]}'; name the field(s) to train on"
            )
        if has_pair:
            return pair
        if has_text:
            return None, text
        if self.prompt is not None:
            wanted = f"'{pair[0]}' and '{pair[1]}'"
        else:
            wanted = f"'{text}'" if self.text is not None else f"'{text}' (or '{pair[0]}' and '{pair[1]}')"
        found = ", ".join(sorted(present)[:12]) or "nothing"
        raise DataError(f"{where}: no field {wanted}; found: {found}")


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long one.

    ``text`` carries the loss, ``prompt`` (None: no prompt) does not. ``line`` counts lines (or rows) from
    1. ``continues``: this piece goes on with the document of the piece before it. ``many_lines``: the text
    is raw lines of the file, so that line ``i`` of the text is line ``line + i`` of the file.
    """

    text: str
    prompt: str | None
    source: str
    line: int
    unit: str = "line"
    continues: bool = False
    many_lines: bool = False

    @property
    def where(self) -> str:
        return place(self.source, self.line, self.unit)


def place(source: str, line: int, unit: str = "line") -> str:
    """``source:line`` as compilers write it, or ``source: row N`` for tables."""
    return f"{source}:{line}" if unit == "line" else f"{source}: {unit} {line}"


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@dataclass(frozen=True)
class DataSource:
    """One file, one binidx pair or one Hub dataset. ``kind``: text, jsonl, parquet, binidx or hub."""

    kind: str
    name: str
    path: Path | None = None

    @property
    def unit(self) -> str:
        return {"parquet": "row", "hub": "row", "binidx": "document"}.get(self.kind, "line")

    @cached_property
    def dataset(self) -> Any:
        """The loaded Hugging Face dataset of a hub source (memory-mapped by ``datasets``)."""
        return _load_hub_dataset(self.name)

    def content_hash(self) -> str:
        """Hash of what the source holds, independent of its name and dates."""
        if self.kind == "hub":
            return f"hub:{self.dataset._fingerprint}"
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror or error}") from error

    def nbytes(self) -> int:
        """Size in bytes (of the files, or of the loaded table)."""
        if self.kind == "hub":
            return int(self.dataset.data.nbytes)
        assert self.path is not None
        return self.path.stat().st_size

    def pieces(self, fields: Fields | None = None) -> Iterator[Piece]:
        """Documents in file order. Raises DataError naming file and line of what cannot be parsed."""
        fields = fields or Fields()
        if self.kind == "text":
            return _read_text(self)
        if self.kind == "jsonl":
            return _read_jsonl(self, fields)
        if self.kind == "parquet":
            return _read_parquet(self, fields)
        if self.kind == "hub":
            return _read_records(self, fields, self.dataset.column_names, iter(self.dataset))
        raise ValueError(f"{self.name}: {self.kind} holds token ids, not text")


def find_sources(data: str | Path | Sequence[str | Path]) -> list[DataSource]:
    """Expand paths, folders, globs and dataset ids, in the order given; files of a folder or glob are sorted.

    Raises DataError for anything missing, unreadable by kind, or empty. Loads no dataset and opens no file.
    """
    items = [data] if isinstance(data, str | Path) else list(data)
    sources = [source for item in items for source in _expand(str(item))]
    if not sources:
        raise DataError(f"no data given; give {READABLE}")
    return sources


def _expand(item: str) -> list[DataSource]:
    if item.startswith("hf:"):
        if not _HUB_ID.fullmatch(item.removeprefix("hf:")):
            raise DataError(
                f"{item}: not a dataset id; write hf:owner/name, hf:owner/name/config or hf:owner/name:split"
            )
        return [DataSource("hub", item)]
    path = Path(item).expanduser()
    if path.is_dir():
        return _from_directory(path)
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
    match = _HUB_ID.fullmatch(item)
    if (
        match
        and "/" in match["id"]
        and path.suffix.lower() not in KIND_OF_SUFFIX
        and not item.startswith(".")
    ):
        return [DataSource("hub", item)]
    raise DataError(f"{item}: no such file or folder; give {READABLE}")


def _from_directory(folder: Path) -> list[DataSource]:
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in KIND_OF_SUFFIX
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (path.suffix.lower() != ".bin" or path.with_suffix(".idx").is_file())
    )
    sources = _unique_pairs(_from_file(path) for path in files)
    if not sources:
        raise DataError(f"{folder}: no .txt, .jsonl, .parquet or .bin/.idx files in this folder")
    return sources


def _unique_pairs(sources: Iterable[DataSource]) -> list[DataSource]:
    """Both files of a binidx pair name the same source; keep it once."""
    return list(dict.fromkeys(sources))


def _from_file(path: Path) -> DataSource:
    kind = KIND_OF_SUFFIX.get(path.suffix.lower())
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


def _read_text(source: DataSource) -> Iterator[Piece]:
    assert source.path is not None
    line, continues, rest = 1, False, b""
    with source.path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark is not text
            file.seek(0)
        while True:
            block = file.read(PIECE_BYTES)
            rest += block
            if not rest:
                return
            cut = _cut(rest) if block else len(rest)
            if len(rest) < PIECE_BYTES and block:
                continue
            raw, rest = rest[:cut], rest[cut:]
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = line + raw.count(b"\n", 0, error.start)
                raise DataError(
                    f"{place(source.name, bad)}: not UTF-8 text (byte 0x{raw[error.start]:02x}); convert it"
                ) from error
            yield Piece(text, None, source.name, line, continues=continues, many_lines=True)
            line += raw.count(b"\n")
            continues = True


def _cut(raw: bytes) -> int:
    """Where to end a piece: at the last line end before a non-space, else a line end, else a character."""
    end = len(raw)
    for _ in range(4096):
        at = raw.rfind(b"\n", 0, end) + 1
        if at <= 1:
            break
        if at < len(raw) and not raw[at : at + 1].isspace():
            return at
        end = at - 1
    at = raw.rfind(b"\n") + 1
    if at > 0:
        return at
    at = len(raw)
    while at > len(raw) - 4 and at > 1 and raw[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if at > 1 else len(raw)


def _read_jsonl(source: DataSource, fields: Fields) -> Iterator[Piece]:
    assert source.path is not None
    with source.path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = place(source.name, number)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON: {one_line(error)}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: a {type(record).__name__}, not an object with fields")
            yield _piece(record, *fields.choose(record, where), source.name, number, "line")


def _read_parquet(source: DataSource, fields: Fields) -> Iterator[Piece]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{source.name}: reading .parquet needs pyarrow: pip install 'rwkv-rev[train]'"
        ) from error
    try:
        with parquet.ParquetFile(source.path) as table:
            names = list(table.schema_arrow.names)
            columns = [name for name in fields.choose(names, source.name) if name is not None]
            batches = table.iter_batches(batch_size=256, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from _read_records(source, fields, names, rows)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{source.name}: not a readable .parquet file: {one_line(error)}") from error


def _read_records(
    source: DataSource, fields: Fields, names: Sequence[str], rows: Iterator[dict[str, Any]]
) -> Iterator[Piece]:
    prompt, text = fields.choose(names, source.name)
    for number, row in enumerate(rows, start=1):
        yield _piece(row, prompt, text, source.name, number, "row")


def _piece(record: dict[str, Any], prompt: str | None, text: str, source: str, line: int, unit: str) -> Piece:
    for name in (prompt, text):
        if name is not None and not isinstance(record[name], str):
            found = "null" if record[name] is None else f"a {type(record[name]).__name__}"
            raise DataError(f"{place(source, line, unit)}: field '{name}' is {found}, not a string")
    return Piece(record[text], None if prompt is None else record[prompt], source, line, unit)


def _load_hub_dataset(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        hint = "" if name.startswith("hf:") else "no such file or folder; read as a Hub dataset, it "
        raise DataError(f"{name}: {hint}needs the datasets package: pip install 'rwkv-rev[train]'") from error
    match = _HUB_ID.fullmatch(name.removeprefix("hf:"))
    assert match is not None
    try:
        dataset = datasets.load_dataset(match["id"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the Hub, the network, the dataset's files: `datasets` raises all kinds
        hint = "" if name.startswith("hf:") else "no such file or folder, and "
        raise DataError(f"{name}: {hint}the dataset cannot be loaded: {one_line(error)}") from error
    return dataset
