"""Documents to rows: the slices of token ids that a model is trained on, at most T = ``context_length``
tokens each.

Three ways to lay a document of n tokens out:

- default: rows [kT, min((k+1)T, n)), each beginning from an empty state; short documents are rows of their
  own, padded with a mask when batched, so that no state leaks from one document into another;
- ``carry_state``: the same rows, but row k > 0 has ``continues = True``: the trainer begins it with the
  state row k-1 ended in. :class:`~rwkv_rev.training.batches.BatchOrder` keeps the rows of a document in one
  batch slot, in order. The gradient is cut there;
- ``pack``: the rows of the default, several of them in one row of at most T tokens, by best fit
  (:mod:`rwkv_rev.training.best_fit`; ``seed`` decides between equal lengths). ``borders`` say where each begins; state
  and token shift start there anew, so the loss is that of the default.

Labels are ``input_ids`` with -100 on prompts (Hugging Face convention: the model shifts them), so the first
token of a document is not predicted: one prediction in T. Rows without a single prediction are left out, except
under ``carry_state`` where a long prompt's rows build the state.

Memory: rows are found by binary search, not listed; 8 to 24 bytes per document, no token. Under ``pack`` 16 more for
each row of the default.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rwkv_rev.errors import DataError
from rwkv_rev.training.best_fit import best_fit
from rwkv_rev.training.token_store import TokenStore

IGNORED = -100
EMPTY_ROW = -1  # index of a batch slot with nothing in it: a row without tokens


@dataclass(frozen=True)
class RowStatistics:
    """Figures about the data. Lengths in tokens; ``padding_share`` of all positions in an epoch's batches
    (0 without batches).

    ``empty_documents`` hold no text, ``dropped_documents`` nothing to predict. ``warnings``: one line each,
    for the user.
    """

    documents: int
    tokens: int
    longest: int
    shortest: int
    rows: int
    empty_documents: int
    dropped_documents: int
    padding_share: float = 0.0
    steps: int = 0
    warnings: tuple[str, ...] = ()


class RowDataset(Dataset):
    """Rows of a token store. ``rows[i]`` is a dict of ``input_ids`` and ``labels`` (int64 [n], n <= T) and
    ``continues`` (bool); under ``pack`` also ``borders`` (bool [n]), true where a document begins.

    ``vocab_size`` (None: unchecked) refuses ids the model has no embedding for. Raises DataError for options that
    exclude each other and when no row is left.
    """

    def __init__(
        self,
        store: TokenStore,
        context_length: int,
        *,
        pack: bool = False,
        carry_state: bool = False,
        vocab_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if context_length < 2:
            raise DataError(f"the context length is {context_length}; it must be at least 2 tokens")
        if pack and carry_state:
            raise DataError(
                "pack and carry_state exclude each other: a packed row begins every document anew; choose one"
            )
        if vocab_size is not None:
            store.check_vocabulary(vocab_size)
        self.store = store
        self.context_length = context_length
        self.pack = pack
        self.carry_state = carry_state
        self.vocab_size = vocab_size
        self._lay_out_rows()
        if not int(self._first_row[-1]):
            raise DataError(
                "no document has a token to predict; a row needs at least two tokens, one of them not prompt"
            )
        if pack:
            lengths = self._lengths()
            self._pieces, self._starts = best_fit(lengths, context_length, permutation(len(lengths), seed, 0))

    def _lay_out_rows(self) -> None:
        T = self.context_length
        lengths, prompts = self.store.lengths(), self.store.prompt_lengths()
        counts = lengths // T + (lengths % T > 1)  # a last row of one token predicts nothing
        skipped = prompts // T  # rows that are prompt to their last token
        useful = np.where(prompts < lengths, np.maximum(counts - skipped, 0), 0)
        self._skipped = np.zeros_like(skipped) if self.carry_state else skipped
        rows = np.where(useful > 0, counts, 0) if self.carry_state else useful
        self._first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])

    def __len__(self) -> int:
        return len(self._starts) - 1 if self.pack else int(self._first_row[-1])

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        lengths = self._lengths()
        return np.add.reduceat(lengths[self._pieces], self._starts[:-1]) if self.pack else lengths

    def _lengths(self) -> np.ndarray:
        """Tokens of each row of the default."""
        T = self.context_length
        lengths = np.full(int(self._first_row[-1]), T, np.int64)
        rows = np.diff(self._first_row)
        kept = rows > 0
        last = self._first_row[1:][kept] - 1
        lengths[last] = np.minimum(T, self.store.lengths()[kept] - (self._skipped + rows - 1)[kept] * T)
        return lengths

    def chains(self) -> tuple[np.ndarray, np.ndarray]:
        """(first row, number of rows) of each document that has rows; carry_state needs them in one slot."""
        rows = np.diff(self._first_row)
        return self._first_row[:-1][rows > 0], rows[rows > 0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == EMPTY_ROW:
            nothing = torch.zeros(0, dtype=torch.int64)
            row = {"input_ids": nothing, "labels": nothing, "continues": False}
            return row | ({"borders": nothing.bool()} if self.pack else {})
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self.pack:
            return self._packed_row(index)
        ids, labels, continues = self._document_row(index)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "continues": continues,
        }

    def locate(self, index: int) -> tuple[int, int]:
        """(document, position of the first token in it) of a row; under ``pack`` of a row of the default."""
        document = int(np.searchsorted(self._first_row, index, side="right")) - 1
        k = index - int(self._first_row[document]) + int(self._skipped[document])
        return document, k * self.context_length

    def _document_row(self, index: int) -> tuple[np.ndarray, np.ndarray, bool]:
        document, start = self.locate(index)
        ids, labels = self._slice(document, start, start + self.context_length)
        return ids, labels, self.carry_state and start > 0

    def _packed_row(self, index: int) -> dict[str, Any]:
        ids, labels, borders = [], [], []
        for piece in self._pieces[self._starts[index] : self._starts[index + 1]].tolist():
            tokens, label, _ = self._document_row(piece)
            label[0] = IGNORED  # no document predicts it
            ids.append(tokens)
            labels.append(label)
            borders.append(np.arange(len(tokens)) == 0)
        parts = {"input_ids": ids, "labels": labels, "borders": borders}
        return {name: torch.from_numpy(np.concatenate(part)) for name, part in parts.items()} | {
            "continues": False
        }

    def _slice(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.store.tokens(document, start, stop)
        if self.vocab_size is not None and len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DataError(
                f"{self.store.place(document)}: token id {bad} is outside the vocabulary, {self.vocab_size}"
            )
        labels = ids.copy()
        labels[~self.store.loss(document, start, stop)] = IGNORED
        return ids, labels

    def statistics(self) -> RowStatistics:
        """Figures without batches; :meth:`BatchOrder.statistics` adds padding and steps."""
        lengths = self.store.lengths()
        lengths, longest = lengths[lengths > 0], int(lengths.max())
        dropped = int((np.diff(self._first_row) == 0).sum())
        return RowStatistics(
            documents=len(self.store),
            tokens=int(lengths.sum()),
            longest=longest,
            shortest=int(lengths.min()),
            rows=len(self),
            empty_documents=self.store.empty_documents,
            dropped_documents=dropped,
            warnings=tuple(self._warnings(lengths, dropped)),
        )

    def _warnings(self, lengths: np.ndarray, dropped: int) -> list[str]:
        T, found = self.context_length, []
        if self.pack:
            full = float(self._lengths().sum()) / (len(self) * T)
            found.append(
                f"pack: {len(self._pieces):,} pieces of documents in {len(self):,} rows, {full:.1%} full; state starts "
                "anew in each"
            )
        if lengths.max() < T and not self.pack:
            found.append(
                f"the context length of {T} is longer than any document (longest: {lengths.max()} tokens)"
            )
        longer = int((lengths > T).sum())
        if longer and self.carry_state:
            found.append(
                f"{_documents(longer)} longer than the context: state carried on, gradient cut every {T} tokens"
            )
        elif longer:
            found.append(
                f"{_documents(longer)} longer than the context: cut into rows of {T} tokens, each without the "
                "state before (--carry-state hands it on)"
            )
        prompts = int((self.store.prompt_lengths() >= T).sum())
        if prompts and not self.carry_state:
            found.append(
                "1 prompt fills the context: its completion is trained without the whole prompt"
                if prompts == 1
                else f"{prompts:,} prompts fill the context: their completions are trained without the whole prompt"
            )
        if dropped:
            found.append(
                "1 document has no token to predict and is left out"
                if dropped == 1
                else f"{dropped:,} documents have no token to predict and are left out"
            )
        return found


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n]; the same on every platform and numpy version, by sorting hashed
    indices.

    Hash: splitmix64 (Steele, Lea, Flood 2014).
    """
    key = _splitmix64(_splitmix64(np.array([seed % 2**64], np.uint64)) + np.array([epoch % 2**64], np.uint64))
    return np.argsort(_splitmix64(np.arange(n, dtype=np.uint64) + key), kind="stable").astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _documents(count: int) -> str:
    return "1 document is" if count == 1 else f"{count:,} documents are"
