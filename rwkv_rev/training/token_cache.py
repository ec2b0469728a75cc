"""Tokenise once: a memory-mapped cache on disk, keyed by the content of the data and by the tokenizer.

Key = SHA-256 over (format version, tokenizer, chat template, end tokens, fields, content hash of every source). Changed
data or another tokenizer is another key, so a stale cache is never read; a moved or renamed file still
finds its cache. An entry is a folder

    <cache>/<key>/tokens.bin      ids one after another, uint16 or uint32
    <cache>/<key>/documents.bin   one record a document (token_store.DOCUMENT)
    <cache>/<key>/silent.bin      runs of tokens without loss (token_store.TokenPart)
    <cache>/<key>/meta.json       sizes, checked when the entry is opened; a damaged entry is built again

written beside its place and renamed into it, under a lock file: two processes that start at once build it
once. Entries are never deleted by this code; the folder may be removed at any time while nothing runs.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from rwkv_rev.errors import DataError
from rwkv_rev.folders.temporary import make_temporary_folder
from rwkv_rev.folders.user_cache import user_cache
from rwkv_rev.progress import Progress
from rwkv_rev.training.binidx import read_index
from rwkv_rev.training.documents import DataSource
from rwkv_rev.training.records import Fields
from rwkv_rev.training.sources import Skipped, describe_skipped, find_sources
from rwkv_rev.training.token_store import DOCUMENT, TokenPart, TokenStore
from rwkv_rev.training.tokenise import Encoded, batches, encode_in_order, tokenizer_fingerprint

FORMAT_VERSION = 4
Ends = tuple[int | None, int | None]
"""End tokens: of texts, and of what answers."""


def load_tokens(
    data: str | Path | Sequence[str | Path],
    tokenizer: Any = None,
    *,
    fields: Fields | None = None,
    end_token: int | str | None = "auto",
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = False,
    keep: bool = True,
) -> TokenStore:
    """Documents of ``data`` as token ids, from the cache or tokenised now.

    ``tokenizer``: any transformers tokenizer, or anything with ``encode(text) -> ids``; not needed for
    binidx alone. No special tokens are added but ``end_token``, put after every document (not after binidx
    ones, which bring their own): an id, None for none, or "auto" for the tokenizer's ``eos_token_id`` (of
    :class:`RwkvByteTokenizer`, whose end of text is an ordinary byte, only after conversations and completions: who
    answers has to learn to end).
    ``num_workers`` None: one a core for large data, else 1. ``progress``: tell on stderr how far it is. ``keep`` False:
    what is not in the cache yet goes to a temporary folder, which goes with the store. Raises DataError
    (missing, empty or unparsable data, naming file and line; ids outside ``vocab_size``).
    """
    fields = fields or Fields()
    skipped: Skipped = Counter()
    sources = find_sources(data, skipped)
    texts = [source for source in sources if source.kind != "binidx"]
    if texts and tokenizer is None:
        raise DataError(f"{texts[0].name}: is text, and no tokenizer was given")
    end, answer_end = _document_ends(tokenizer) if end_token == "auto" else (end_token, end_token)
    assert not isinstance(end, str) and not isinstance(answer_end, str)
    ends = (end, answer_end)
    parts, hashes, cached, discard = [], [], None, None
    if texts:
        hashes = [source.content_hash() for source in texts]
        key = _key(tokenizer, ends, fields, hashes)
        root = Path(cache_dir).expanduser() if cache_dir is not None else user_cache("tokens")
        if not keep and _read_meta(root / key) is None:
            root, discard = make_temporary_folder("tokens")
        try:
            cached = _open_or_build(root, key, texts, tokenizer, ends, fields, num_workers, progress)
        except BaseException:
            if discard is not None:
                discard()
            raise
        parts.append(_part(cached, texts))
        hashes = [key]
    for source in sources:
        if source.kind == "binidx":
            assert source.path is not None
            dtype, borders = read_index(source.path)
            binary = source.path.with_suffix(".bin")
            parts.append(TokenPart(binary, dtype, (source.name,), (source.unit,), borders=borders))
            hashes.append(f"{source.content_hash()}:{binary.stat().st_size}")
    meta = _read_meta(cached) if cached else {"empty_documents": 0, "max_token": 0}
    assert meta is not None
    store = TokenStore(
        parts,
        fingerprint=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        end_token=end,
        empty_documents=meta["empty_documents"],
        max_token=meta["max_token"],
        cache=cached,
        notes=(f"skipped {describe_skipped(skipped)}",) if skipped else (),
    )
    if discard is not None:
        weakref.finalize(store, discard)
    if vocab_size is not None:
        store.check_vocabulary(vocab_size)
    return store


def _document_ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """What ends a text, and what ends an answer."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return getattr(tokenizer, "document_end_id", eos), eos


def _key(tokenizer: Any, ends: Ends, fields: Fields, hashes: list[str]) -> str:
    template = getattr(tokenizer, "chat_template", None)
    recipe = [FORMAT_VERSION, tokenizer_fingerprint(tokenizer), template, ends, astuple(fields), hashes]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]


def _part(entry: Path, texts: list[DataSource]) -> TokenPart:
    meta = _read_meta(entry)
    assert meta is not None
    names, units = tuple(source.name for source in texts), tuple(source.unit for source in texts)
    return TokenPart(
        entry / "tokens.bin",
        np.dtype(meta["dtype"]),
        names,
        units,
        table_path=entry / "documents.bin",
        silent_path=entry / "silent.bin",
    )


def _read_meta(entry: Path) -> dict[str, Any] | None:
    """The entry's meta.json, or None when the entry is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text("utf-8"))
        tokens, documents = (entry / "tokens.bin").stat().st_size, (entry / "documents.bin").stat().st_size
        whole = tokens == meta["tokens"] * np.dtype(meta["dtype"]).itemsize
        whole = whole and (entry / "silent.bin").stat().st_size == meta["silent_runs"] * 16
        return meta if whole and documents == meta["documents"] * DOCUMENT.itemsize else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open_or_build(
    root: Path,
    key: str,
    texts: list[DataSource],
    tokenizer: Any,
    ends: Ends,
    fields: Fields,
    num_workers: int | None,
    progress: bool,
) -> Path:
    entry = root / key
    if _read_meta(entry) is not None:
        return entry
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A script without a main guard runs again in each child, and would wait for the parent's lock.
        raise DataError(
            "put the script's code under if __name__ == '__main__': (or tokenise with num_workers=1)"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            if _read_meta(entry) is None:
                for leftover in [*root.glob(f"{key}.building-*"), entry]:
                    shutil.rmtree(leftover, ignore_errors=True)
                building = root / f"{key}.building-{uuid.uuid4().hex[:8]}"
                building.mkdir()
                try:
                    _build(building, texts, tokenizer, ends, fields, num_workers, progress)
                    _move_into_place(building, entry)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{root}: the token cache cannot be written ({error.strerror or error}); name another --cache-dir"
        ) from error
    return entry


def _move_into_place(building: Path, entry: Path) -> None:
    try:
        building.rename(entry)
    except OSError:
        if (
            _read_meta(entry) is None
        ):  # where locks do nothing (some network disks), another may have been first
            raise


def _build(
    folder: Path,
    texts: list[DataSource],
    tokenizer: Any,
    ends: Ends,
    fields: Fields,
    num_workers: int | None,
    progress: bool,
) -> None:
    total = sum(source.nbytes() for source in texts)
    before = _stamps(texts)
    highest = max(_vocabulary(tokenizer), *(1 + (end or 0) for end in ends))
    dtype = np.dtype("<u2" if highest <= 1 << 16 else "<u4")
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "documents.bin").open("wb") as documents,
        (folder / "silent.bin").open("wb") as silent,
    ):
        writer = _Writer(tokens, documents, silent, dtype, ends)
        with Progress("tokenising", total, "bytes", wanted=progress) as shown:
            for batch in encode_in_order(batches(texts, fields), tokenizer, num_workers, total):
                for encoded in batch:
                    writer.add(encoded)
                    shown.add(encoded.text_bytes)
        writer.close()
        for file in (tokens, documents, silent):
            file.flush()
            os.fsync(file.fileno())
    if _stamps(texts) != before:
        raise DataError("the data changed while it was being tokenised; start again when it is complete")
    if not writer.documents:
        raise DataError(_nothing(texts, fields))
    meta = {
        "format": FORMAT_VERSION,
        "dtype": dtype.str,
        "tokens": writer.tokens,
        "documents": writer.documents,
        "empty_documents": writer.empty,
        "max_token": writer.max_token,
        "silent_runs": writer.silent_runs,
        "sources": [source.name for source in texts[:100]],
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _nothing(texts: list[DataSource], fields: Fields) -> str:
    """What to say where no document holds text: the first record and its field, if there are records."""
    source, piece = next(((s, p) for s in texts for p in s.pieces(fields)), (texts[0], None))
    if piece is None or source.kind == "text" or piece.text:
        return f"{texts[0].name}: the data holds no text at all; every document is empty"
    return (
        f"{piece.where}: field '{fields.text or 'text'}' is empty, and no other record holds text to train on"
    )


def _stamps(texts: list[DataSource]) -> list[tuple[int, int]]:
    stats = [source.path.stat() for source in texts if source.path is not None]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _vocabulary(tokenizer: Any) -> int:
    """Number of ids of the tokenizer, or one too many for 16 bits where it does not say."""
    try:
        return len(tokenizer)
    except TypeError:
        return 1 << 17


class _Writer:
    """Appends documents; pieces of one document are joined and the end token put behind the last."""

    def __init__(
        self, tokens: BinaryIO, documents: BinaryIO, silent: BinaryIO, dtype: np.dtype, ends: Ends
    ) -> None:
        self._tokens_file, self._documents_file, self._silent_file = tokens, documents, silent
        self._dtype, self._ends = dtype, ends
        self._current: dict[str, int] | None = None
        self._end: int | None = None
        self._there: int | None = None  # the end token that the text has itself
        self._last = True  # whether the token before carries loss
        self.tokens = self.documents = self.empty = self.silent_runs = 0
        self.max_token = -1

    def add(self, piece: Encoded) -> None:
        if not piece.continues or self._current is None:
            self.close()
            self._current = {"start": self.tokens, "length": 0, "prompt": 0, "text_bytes": 0}
            self._current |= {"line": piece.line, "source": piece.source, "ended": 0}
            self._end = self._ends[piece.answers]
        if self._current["prompt"] == self._current["length"]:
            self._current["prompt"] += len(piece.loss) if not piece.loss.any() else int(piece.loss.argmax())
        self._there = piece.end
        self._write(piece.ids, piece.loss)
        self._current["length"] += len(piece.ids)
        self._current["text_bytes"] += piece.text_bytes

    def _write(self, ids: np.ndarray, loss: np.ndarray) -> None:
        if len(ids):
            self.max_token = max(self.max_token, int(ids.max()))
            if self.max_token > np.iinfo(self._dtype).max:
                raise DataError(f"the tokenizer gave id {self.max_token}, more than its own vocabulary")
            self._last = bool(loss[-1])
        if not loss.all():
            edges = np.flatnonzero(np.diff(np.concatenate([[True], loss, [True]])))
            self._silent_file.write((edges + self.tokens).astype("<i8").tobytes())
            self.silent_runs += len(edges) // 2
        self._tokens_file.write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)

    def close(self) -> None:
        """End the current document; its end carries loss if what it ends does."""
        current, self._current = self._current, None
        if current is None:
            return
        if current["length"] == 0:
            self.empty += 1
            return
        if self._end is not None and self._end != self._there:
            self._write(np.array([self._end], np.uint32), np.array([self._last]))
            current["length"] += 1
            current["ended"] = 1
        row = np.zeros(1, DOCUMENT)
        for name, value in current.items():
            row[name] = value
        self._documents_file.write(row.tobytes())
        self.documents += 1
