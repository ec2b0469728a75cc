"""Token ids of all documents, memory-mapped: what the rows are cut from.

A store is a list of parts behind one document count: at most one part tokenised by
:mod:`rwkv_rev.training.token_cache`, and one per binidx pair, read where it lies. Held in memory: the
borders of binidx documents (8 bytes each), nothing of the rest. Stores can be sent to other processes; they
open the files again there.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_rev.errors import DataError
from rwkv_rev.training.documents import place

# One record a document in documents.bin. start, length, prompt: tokens; text_bytes: UTF-8 bytes of the
# text that carries loss; line: where it begins in its source, from 1; ended: 1 if an end token was put behind it.
DOCUMENT = np.dtype(
    [
        ("start", "<i8"),
        ("length", "<i8"),
        ("prompt", "<i8"),
        ("text_bytes", "<i8"),
        ("line", "<i8"),
        ("source", "<i4"),
        ("ended", "<i4"),
    ]
)

SCANNED_AT_ONCE = 1 << 22


@dataclass
class TokenPart:
    """Documents of one token file, with either ``table_path`` (a documents.bin) or ``borders`` (binidx).

    ``silent_path``: [first, one past the last) of each run of tokens without loss, int64 pairs, in order.
    """

    tokens_path: Path
    dtype: np.dtype
    names: tuple[str, ...]
    units: tuple[str, ...]
    table_path: Path | None = None
    borders: np.ndarray | None = None
    silent_path: Path | None = None
    _maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a pickled memmap would carry the whole file

    @property
    def tokens(self) -> np.ndarray:
        if "tokens" not in self._maps:
            self._maps["tokens"] = np.memmap(self.tokens_path, self.dtype, mode="r")
        return self._maps["tokens"]

    @property
    def table(self) -> np.ndarray:
        assert self.table_path is not None
        if "table" not in self._maps:
            self._maps["table"] = np.memmap(self.table_path, DOCUMENT, mode="r")
        return self._maps["table"]

    @property
    def silent(self) -> np.ndarray:
        """Runs of tokens without loss, int64 [runs, 2]."""
        if "silent" not in self._maps:
            path = self.silent_path
            if path is None or path.stat().st_size == 0:  # which cannot be mapped
                self._maps["silent"] = np.zeros((0, 2), np.int64)
            else:
                self._maps["silent"] = np.memmap(path, np.dtype("<i8"), mode="r").reshape(-1, 2)
        return self._maps["silent"]

    def __len__(self) -> int:
        return len(self.table) if self.borders is None else len(self.borders) - 1

    def starts(self) -> np.ndarray:
        return self.table["start"] if self.borders is None else self.borders[:-1]

    def lengths(self) -> np.ndarray:
        return self.table["length"] if self.borders is None else np.diff(self.borders)

    def first_outside(self, vocab_size: int) -> int | None:
        """Place in the file of the first id below 0 or from ``vocab_size`` on; None without one."""
        limits = np.iinfo(self.dtype)
        if limits.min >= 0 and limits.max < vocab_size:
            return None
        for start in range(0, len(self.tokens), SCANNED_AT_ONCE):
            ids = self.tokens[start : start + SCANNED_AT_ONCE]
            if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
                return start + int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        return None

    def slice_of(self, document: int) -> tuple[int, int]:
        """First token and number of tokens of one document."""
        if self.borders is None:
            row = self.table[document]
            return int(row["start"]), int(row["length"])
        return int(self.borders[document]), int(self.borders[document + 1] - self.borders[document])

    def column(self, name: str) -> np.ndarray:
        return self.table[name] if self.borders is None else np.zeros(len(self), np.int64)

    def place(self, document: int) -> str:
        if self.borders is not None:
            return place(self.names[0], document + 1, self.units[0])
        row = self.table[document]
        source = int(row["source"])
        return place(self.names[source], int(row["line"]), self.units[source])


class TokenStore:
    """All documents as token ids.

    Attributes: ``fingerprint`` (same text, tokenizer and options: same fingerprint), ``end_token`` (the id that every
    tokenised text ends with, or None; what answers may end with another), ``empty_documents`` (left out because they
    hold no text), ``cache`` (folder or None), ``notes`` (one line each, for the user).
    """

    def __init__(
        self,
        parts: list[TokenPart],
        *,
        fingerprint: str,
        end_token: int | None = None,
        empty_documents: int = 0,
        max_token: int = 0,
        cache: Path | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.parts = [part for part in parts if len(part)]
        self.fingerprint = fingerprint
        self.end_token = end_token
        self.empty_documents = empty_documents
        self.max_token = max_token
        self.cache = cache
        self.notes = notes
        self._checked_for: int | None = None
        self._first = [0]
        for part in self.parts:
            self._first.append(self._first[-1] + len(part))
        if not len(self) or not self.total_tokens:
            raise DataError("the data holds no text at all; every document is empty")

    def __len__(self) -> int:
        """Number of documents."""
        return self._first[-1]

    def _find(self, document: int) -> tuple[TokenPart, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        part = bisect_right(self._first, document) - 1
        return self.parts[part], document - self._first[part]

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.concatenate([np.asarray(part.lengths(), np.int64) for part in self.parts])

    def prompt_lengths(self) -> np.ndarray:
        """Leading tokens of each document that carry no loss, int64 [documents]."""
        return np.concatenate([np.asarray(part.column("prompt"), np.int64) for part in self.parts])

    def text_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text of each document that carries loss; 0 for binidx, int64 [documents]."""
        return np.concatenate([np.asarray(part.column("text_bytes"), np.int64) for part in self.parts])

    def loss(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of the tokens ``start:stop`` of one document carry loss, bool."""
        part, at = self._find(document)
        first, length = part.slice_of(at)
        start, stop, _ = slice(start, stop).indices(length)
        counts = np.ones(max(0, stop - start), bool)
        if part.borders is None:
            counts[: max(0, int(part.table["prompt"][at]) - start)] = False
            runs, begin = part.silent, first + start
            for run in range(int(np.searchsorted(runs[:, 1], begin, side="right")), len(runs)):
                if runs[run, 0] >= first + stop:
                    break
                counts[max(0, int(runs[run, 0]) - begin) : int(runs[run, 1]) - begin] = False
        return counts

    def loss_tokens(self) -> int:
        """Tokens of all documents that carry loss."""
        return self.total_tokens - sum(
            int(np.diff(part.silent, axis=1).sum() if part.silent_path else part.column("prompt").sum())
            for part in self.parts
        )

    def ends_added(self) -> np.ndarray:
        """End tokens put behind each document, 0 or 1, int64 [documents]; binidx documents bring their own."""
        return np.concatenate([np.asarray(part.column("ended"), np.int64) for part in self.parts])

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """One id of each document, -1 where it has none there, int64 [documents]."""
        found = []
        for part, first in zip(self.parts, self._first, strict=False):
            at = positions[first : first + len(part)]
            there = (at >= 0) & (at < np.asarray(part.lengths(), np.int64))
            places = np.asarray(part.starts(), np.int64) + at
            ids = part.tokens[np.clip(places, 0, len(part.tokens) - 1)].astype(np.int64)
            found.append(np.where(there, ids, -1))
        return np.concatenate(found)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids ``start:stop`` of one document as int64; only this slice is read from disk."""
        part, at = self._find(document)
        first, length = part.slice_of(at)
        start, stop, _ = slice(start, stop).indices(length)
        return part.tokens[first + start : first + max(start, stop)].astype(np.int64)

    @property
    def total_tokens(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    def source(self, document: int) -> str:
        """The file that a document comes from."""
        part, at = self._find(document)
        return part.names[0 if part.borders is not None else int(part.table["source"][at])]

    def place(self, document: int) -> str:
        """``file:line`` where the document begins."""
        part, at = self._find(document)
        return part.place(at)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a document holds an id the model has no embedding for, naming file, document and position.

        Reads a binidx pair whole, unless its integers cannot hold such an id; tokenised text only where it does.
        """
        if self._checked_for == vocab_size:
            return
        for part, first in zip(self.parts, self._first, strict=False):
            if part.borders is None and self.max_token < vocab_size:
                continue
            if (at := part.first_outside(vocab_size)) is None:
                continue
            ends = np.asarray(part.starts(), np.int64) + np.asarray(part.lengths(), np.int64)
            document = int(np.searchsorted(ends, at, side="right"))
            position = at - int(part.starts()[document])
            raise DataError(
                f"{self.place(first + document)}: token id {int(part.tokens[at])} at position {position:,} is outside "
                f"the model's vocabulary of {vocab_size:,}; tokenise with the model's own tokenizer"
            )
        self._checked_for = vocab_size
