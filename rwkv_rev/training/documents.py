"""Read training data as documents, one at a time; :mod:`rwkv_rev.training.sources` finds it.

What can be read, and what one document is:

- ``.txt``, ``.md``, ``.rst``, ``.py``: UTF-8, the whole file is one document, line ends untouched;
- ``.jsonl``: one record a line: a text, a prompt and a completion, a conversation (:mod:`rwkv_rev.training.records`);
- ``.json``: an array of such records, a single one, or one a line;
- ``.csv``: one record a row, the fields named by the first row (RFC 4180);
- these compressed by gzip: ``.txt.gz``, ``.jsonl.gz`` and so on;
- ``.parquet``, Hugging Face datasets (``hf:owner/name[/config][:split]``) and folders that ``save_to_disk`` of the
  ``datasets`` library wrote: the same fields, one record a row;
- RWKV's ``binidx`` pairs: already token ids, read by :mod:`rwkv_rev.training.binidx`.

Nothing is held but the record at hand, and of a ``.json`` the whole file. A text longer than ``PIECE_BYTES`` is handed
out in pieces, cut where a line ends and the next begins with no white space, so that several processes can tokenise
one long book. Limit: a tokenizer whose tokens span a line end may see a different token at such a cut, at most one in
four mebibytes.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from rwkv_rev.errors import DataError
from rwkv_rev.printable import shortened
from rwkv_rev.training.named_once import NamedTwice, json_object, refuse_twice
from rwkv_rev.training.records import Fields, Piece, place

PIECE_BYTES = 4 << 20
_LONGEST_FIELD = (1 << 31) - 1
_UNITS = {"parquet": "row", "hub": "row", "arrow": "row", "binidx": "document", "json": "record"}
_NAME = r"(?!\.)(?!\S*\.\.)[\w.-]+"  # no part of a path: .. and hidden names are none
HUB_ID = re.compile(
    rf"(?P<id>{_NAME}(/{_NAME})?)(/(?P<config>{_NAME}))?(:(?P<split>[\w.\[\]%:+-]+))?", re.ASCII
)


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = shortened(" ".join(str(error).split()), 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class DataSource:
    """One file, one binidx pair or one dataset. ``kind``: text, jsonl, json, csv, parquet, binidx, arrow or hub."""

    kind: str
    name: str
    path: Path | None = None

    @property
    def unit(self) -> str:
        return _UNITS.get(self.kind, "line")

    @cached_property
    def dataset(self) -> Any:
        """The loaded Hugging Face dataset of a hub or arrow source (memory-mapped by ``datasets``)."""
        return _load_hub_dataset(self.name) if self.kind == "hub" else _load_saved_dataset(self)

    def content_hash(self) -> str:
        """Hash of what the source holds, independent of its name and dates."""
        if self.kind == "hub":
            return f"hub:{self.dataset._fingerprint}"
        try:
            digests = [_digest(path) for path in self._files()]
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        return digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode()).hexdigest()

    def nbytes(self) -> int:
        """Size in bytes (of the files, or of the loaded table)."""
        if self.kind == "hub":
            return int(self.dataset.data.nbytes)
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        assert self.path is not None
        return sorted(self.path.glob("*.arrow")) if self.kind == "arrow" else [self.path]

    def pieces(self, fields: Fields | None = None) -> Iterator[Piece]:
        """Documents in file order. Raises DataError naming file and line of what cannot be parsed."""
        fields = fields or Fields()
        if self.kind == "text":
            return (replace(piece, train_on=fields.train_on) for piece in _read_text(self))
        if self.kind in ("jsonl", "json", "csv"):
            read = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}[self.kind]
            return read(self, fields)
        if self.kind == "parquet":
            return _read_parquet(self, fields)
        if self.kind in ("hub", "arrow"):
            return _read_rows(self, fields, self.dataset.column_names, iter(self.dataset))
        raise ValueError(f"{self.name}: {self.kind} holds token ids, not text")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


@contextmanager
def _opened(source: DataSource) -> Iterator[Any]:
    """The bytes of a file, decompressed; DataError where they cannot be."""
    assert source.path is not None
    packed = source.path.suffix.lower() == ".gz"
    with gzip.open(source.path, "rb") if packed else source.path.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{source.name}: not a whole .gz file: {one_line(error)}") from error


def _read_text(source: DataSource) -> Iterator[Piece]:
    line, continues, rest = 1, False, b""
    with _opened(source) as file:
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
    with _opened(source) as file:
        for number, row in _json_lines(source, file):
            where = place(source.name, number)
            yield fields.choose(_names(row, where), where).piece(row, source.name, number, "line")


def _json_lines(source: DataSource, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not blank."""
    for number, raw in enumerate(file, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        try:
            yield number, json.loads(raw, object_pairs_hook=json_object)
        except NamedTwice as error:
            raise DataError(f"{place(source.name, number)}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place(source.name, number)}: not valid JSON: {one_line(error)}") from error


def _read_json(source: DataSource, fields: Fields) -> Iterator[Piece]:
    with _opened(source) as file:
        raw = file.read()
    try:
        values = json.loads(raw, object_pairs_hook=json_object)
    except NamedTwice as error:
        raise DataError(f"{source.name}: {error}") from None
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(
                f"{place(source.name, error.lineno)}: not valid JSON: {one_line(error)}"
            ) from error
        values = [value for _, value in _json_lines(source, io.BytesIO(raw))]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source.name}: not valid JSON: {one_line(error)}") from error
    for number, row in enumerate(values if isinstance(values, list) else [values], start=1):
        where = place(source.name, number, source.unit)
        yield fields.choose(_names(row, where), where).piece(row, source.name, number, source.unit)


def _names(row: Any, where: str) -> Iterable[str]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object with fields")
    return row


def _read_csv(source: DataSource, fields: Fields) -> Iterator[Piece]:
    csv.field_size_limit(_LONGEST_FIELD)  # of the module: 128 KiB would be too short for a document
    with _opened(source) as file:
        rows = csv.reader(_decoded_lines(source, file), strict=True)
        names: list[str] | None = None
        line = 1
        try:
            for row in rows:
                where = place(source.name, line)
                if names is None:
                    names = row
                    refuse_twice(names)
                    layout = fields.choose(names, where)
                elif row and len(row) != len(names):
                    raise DataError(f"{where}: {len(row)} fields, but the first row names {len(names)}")
                elif row:
                    yield layout.piece(dict(zip(names, row, strict=True)), source.name, line, "line")
                line = rows.line_num + 1
        except NamedTwice as error:
            raise DataError(f"{place(source.name, line)}: {error}") from None
        except csv.Error as error:
            raise DataError(f"{place(source.name, line)}: not valid CSV: {one_line(error)}") from error


def _decoded_lines(source: DataSource, file: IO[bytes]) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place(source.name, number)}: not UTF-8 text (byte 0x{raw[error.start]:02x}); convert it"
            ) from error


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
            refuse_twice(names)
            layout = fields.choose(names, source.name)
            batches = table.iter_batches(batch_size=256, columns=[*layout.columns, *layout.beside])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from _read_rows(source, fields, names, rows)
    except NamedTwice as error:
        raise DataError(f"{source.name}: {error}") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{source.name}: not a readable .parquet file: {one_line(error)}") from error


def _read_rows(
    source: DataSource, fields: Fields, names: Sequence[str], rows: Iterator[dict[str, Any]]
) -> Iterator[Piece]:
    layout = fields.choose(names, source.name)
    for number, row in enumerate(rows, start=1):
        yield layout.piece(row, source.name, number, "row")


def _load_hub_dataset(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        hint = "" if name.startswith("hf:") else "no such file or folder; read as a Hub dataset, it "
        raise DataError(f"{name}: {hint}needs the datasets package: pip install 'rwkv-rev[train]'") from error
    match = HUB_ID.fullmatch(name.removeprefix("hf:"))
    assert match is not None
    try:
        dataset = datasets.load_dataset(match["id"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the Hub, the network, the dataset's files: `datasets` raises all kinds
        hint = "" if name.startswith("hf:") else "no such file or folder, and "
        raise DataError(f"{name}: {hint}the dataset cannot be loaded: {one_line(error)}") from error
    return dataset


def _load_saved_dataset(source: DataSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source.name}: reading a saved dataset needs the datasets package: pip install 'rwkv-rev[train]'"
        ) from error
    try:
        return datasets.load_from_disk(str(source.path))
    except Exception as error:  # files missing or damaged: `datasets` raises all kinds
        raise DataError(f"{source.name}: the saved dataset cannot be loaded: {one_line(error)}") from error
