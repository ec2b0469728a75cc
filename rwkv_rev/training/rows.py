"""Documents to rows: the slices of token ids that a model is trained on, at most T = ``context_length``
tokens each.

Three ways to lay a document of n tokens out:

- default: rows [kT, min((k+1)T, n)), each beginning from an empty state; short documents are rows of their
  own, padded with a mask when batched, so that no state leaks from one document into another;
- ``carry_state``: the same rows, but row k > 0 has ``continues = True``: the trainer begins it with the
  state row k-1 ended in. :class:`~rwkv_rev.training.batches.BatchOrder` keeps the rows of a document in one
  batch slot, in order. The gradient is cut there;
- ``pack``: the rows of the default, several of them in one row of at most T tokens, by best fit
  (:mod:`rwkv_rev.best_fit`; ``seed`` decides between equal lengths). ``borders`` say where each begins; state
  and token shift start there anew, so the loss is that of the default.

An objective (:mod:`rwkv_rev.training.objectives`) may put more into a row than the document's own tokens, or lay parts
of several documents into one without a border. Slices are as long as what is made of them fits into T, then.

Labels are ``input_ids`` with -100 on prompts (Hugging Face convention: the model shifts them), so the first
token of a document is not predicted: one prediction in T. Rows without a single prediction are left out, except
under ``carry_state`` where a long prompt's rows build the state.

Memory: rows are found by binary search, not listed; 8 to 24 bytes per document, no token. Under ``pack`` 16 more for
each row of the default.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rwkv_rev.best_fit import best_fit
from rwkv_rev.errors import DataError
from rwkv_rev.training.draws import permutation
from rwkv_rev.training.objectives.objective import IGNORED, Row
from rwkv_rev.training.objectives.objectives import Objectives
from rwkv_rev.training.token_store import TokenStore

EMPTY_ROW = -1  # index of a batch slot with nothing in it: a row without tokens


@dataclass(frozen=True)
class RowStatistics:
    """Figures about the data. Lengths in tokens; ``loss_tokens`` carry loss in their document;
    ``padding_share`` of all positions in an epoch's batches (0 without batches).

    ``empty_documents`` hold no text, ``dropped_documents`` nothing to predict. One line each for the user: ``notes``
    on what rows look like, ``warnings`` of what is lost.
    """

    documents: int
    tokens: int
    loss_tokens: int
    longest: int
    shortest: int
    rows: int
    empty_documents: int
    dropped_documents: int
    padding_share: float = 0.0
    steps: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class RowDataset(Dataset):
    """Rows of a token store. ``rows[i]`` is a dict of ``input_ids`` and ``labels`` (int64 [n], n <= T) and
    ``continues`` (bool); under ``pack`` also ``borders`` (bool [n]), true where a document begins, and of objectives
    other than the next token ``loss_weights`` (float32 [n]).

    ``vocab_size`` (None: unchecked) refuses ids the model has no embedding for. ``epoch`` counts for what an objective
    draws. Raises DataError for options that exclude each other and when no row is left.
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
        objectives: Objectives | None = None,
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
        self.seed = seed
        self.epoch = 0
        self.objectives = objectives or Objectives()
        self.objectives.refuse_layout(pack=pack, carry_state=carry_state)
        self._room = self.objectives.room(context_length)  # tokens of a document in a row
        self._lay_out_rows()
        if not int(self._first_row[-1]):
            raise DataError(
                "no document has a token to predict; a row needs at least two tokens, one of them not prompt"
            )
        self._starts: np.ndarray | None = None
        lengths = self._lengths()
        order = permutation(len(lengths), seed, 0)
        if pack:
            lengths = self.objectives.grown(lengths, context_length)
            self._pieces, self._starts = best_fit(lengths, context_length, order)
        elif (adapt := self.objectives.adapt) is not None:
            self._pieces, self._starts = adapt.dealt(self._documents(), order)

    def _lay_out_rows(self) -> None:
        T = self._room
        lengths, prompts = self.store.lengths(), self.store.prompt_lengths()
        counts = lengths // T + (lengths % T > 1)  # a last row of one token predicts nothing
        skipped = prompts // T  # rows that are prompt to their last token
        useful = np.where(prompts < lengths, np.maximum(counts - skipped, 0), 0)
        self._skipped = np.zeros_like(skipped) if self.carry_state else skipped
        rows = np.where(useful > 0, counts, 0) if self.carry_state else useful
        self._first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])

    def __len__(self) -> int:
        return int(self._first_row[-1]) if self._starts is None else len(self._starts) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        lengths = self._lengths()
        if self._starts is None:
            return self.objectives.grown(lengths, self.context_length)
        if self.pack:
            lengths = self.objectives.grown(lengths, self.context_length)
        lengths = np.add.reduceat(lengths[self._pieces], self._starts[:-1])
        return lengths if self.pack else self.objectives.grown(lengths, self.context_length)

    def most_pieces(self, count: int) -> int:
        """The most pieces of documents among the tokens of a row that a chunk of ``count`` tokens holds."""
        if not self.pack or self._starts is None:
            return 1
        lengths = self.objectives.grown(self._lengths(), self.context_length)[self._pieces]
        ends = np.cumsum(lengths)
        row = np.repeat(np.arange(len(self)), np.diff(self._starts))
        begins = ends - lengths - (ends - lengths)[self._starts[:-1]][row]
        first, last = begins // count, (begins + lengths - 1) // count  # chunks that it begins and ends in
        chunks = row * (1 + int(last.max()))
        # whatever lies between is of one piece
        held = np.concatenate([chunks + first, (chunks + last)[last > first]])
        return int(np.unique(held, return_counts=True)[1].max())

    def _lengths(self) -> np.ndarray:
        """Tokens of each row of the default, or of what is laid into rows."""
        T = self._room
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
            row |= {} if self.objectives.plain else {"loss_weights": nothing.float()}
            return row | ({"borders": nothing.bool()} if self.pack else {})
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self.pack:
            return self._packed_row(index)
        if (adapt := self.objectives.adapt) is not None:
            given = Row.joined([adapt.segment(self._slice(*self.locate(piece))) for piece in self._in(index)])
        else:
            given = self._slice(*self.locate(index))
        return self._as_tensors(self._asked(given, index)) | {
            "continues": self.carry_state and given.start > 0
        }

    def locate(self, index: int) -> tuple[int, int]:
        """(document, position of the first token in it) of a row of the default, of which several may be one row."""
        document = int(np.searchsorted(self._first_row, index, side="right")) - 1
        k = index - int(self._first_row[document]) + int(self._skipped[document])
        return document, k * self._room

    def _documents(self) -> np.ndarray:
        """The document of each row of the default."""
        return np.repeat(np.arange(len(self.store)), np.diff(self._first_row))

    def _in(self, index: int) -> list[int]:
        """What of the default a row is made of."""
        assert self._starts is not None
        return self._pieces[self._starts[index] : self._starts[index + 1]].tolist()

    def _packed_row(self, index: int) -> dict[str, Any]:
        found, borders = [], []
        for piece in self._in(index):
            row = self._asked(self._slice(*self.locate(piece)), piece)
            row.labels[0] = IGNORED  # no document predicts it
            found.append(row)
            borders.append(np.arange(len(row.ids)) == 0)
        more = {"borders": torch.from_numpy(np.concatenate(borders)), "continues": False}
        return self._as_tensors(Row.joined(found)) | more

    def _asked(self, given: Row, index: int) -> Row:
        """What the objectives make of a row."""
        if not self.carry_state:
            given = replace(given, start=0)
        return self.objectives.row(given, self.context_length, self.seed, self.epoch, index)

    def _as_tensors(self, row: Row) -> dict[str, Any]:
        found = {"input_ids": torch.from_numpy(row.ids), "labels": torch.from_numpy(row.labels)}
        return found if self.objectives.plain else found | {"loss_weights": torch.from_numpy(row.weights)}

    def _slice(self, document: int, start: int) -> Row:
        stop = start + self._room
        ids = self.store.tokens(document, start, stop)
        if self.vocab_size is not None and len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DataError(
                f"{self.store.place(document)}: token id {bad} is outside the vocabulary, {self.vocab_size}"
            )
        labels = ids.copy()
        labels[~self.store.loss(document, start, stop)] = IGNORED
        return Row.of(ids, labels, start)

    def statistics(self) -> RowStatistics:
        """Figures without batches; :meth:`BatchOrder.statistics` adds padding and steps."""
        lengths = self.store.lengths()
        lengths, longest = lengths[lengths > 0], int(lengths.max())
        dropped = int((np.diff(self._first_row) == 0).sum())
        return RowStatistics(
            documents=len(self.store),
            tokens=int(lengths.sum()),
            loss_tokens=self.store.loss_tokens(),
            longest=longest,
            shortest=int(lengths.min()),
            rows=len(self),
            empty_documents=self.store.empty_documents,
            dropped_documents=dropped,
            notes=tuple(self._notes(lengths)),
            warnings=tuple(self._warnings(lengths, dropped)),
        )

    def _notes(self, lengths: np.ndarray) -> list[str]:
        found = self.objectives.notes(self.context_length)
        if self.pack:
            full = float(self.lengths().sum()) / (len(self) * self.context_length)
            found.append(
                f"pack: {len(self._pieces):,} pieces of documents in {len(self):,} rows, {100 * full:.1f} % full; "
                "state starts anew in each"
            )
        if lengths.max() < self._room and self._starts is None:
            found.append(
                f"the context length of {self.context_length:,} is longer than any document (longest: "
                f"{lengths.max():,} tokens)"
            )
        return found

    def _warnings(self, lengths: np.ndarray, dropped: int) -> list[str]:
        T, found, limit = self._room, list[str](), "the context"
        if self.context_length != T:
            limit = f"the {T:,} tokens of a document that a row holds"
        if self._starts is not None and not self.pack:
            rows = np.repeat(np.arange(len(self)), np.diff(self._starts))
            apart = len(np.unique(rows * len(self.store) + self._documents()[self._pieces]))
            if doubled := len(rows) - apart:
                found.append(
                    f"adapt: {doubled:,} of {len(rows):,} parts share a row with another part of the same document: "
                    "from one to the other there is no change to learn (it takes more documents of that length, or "
                    "fewer segments)"
                )
        if longer := int((lengths > T).sum()):
            found.append(
                f"{_documents(longer)} longer than {limit}: "
                + (
                    f"state carried on, gradient cut every {T:,} tokens"
                    if self.carry_state
                    else f"cut into pieces of {T:,} tokens, each without the state before"
                    + (" (--carry-state hands it on)" if self.objectives.carries and not self.pack else "")
                )
            )
        prompts = int((self.store.prompt_lengths() >= T).sum())
        if prompts and not self.carry_state:
            found.append(
                f"1 prompt fills {limit}: its completion is trained without the whole prompt"
                if prompts == 1
                else f"{prompts:,} prompts fill {limit}: their completions are trained without the whole prompt"
            )
        if dropped:
            found.append(
                "1 document has no token to predict and is left out"
                if dropped == 1
                else f"{dropped:,} documents have no token to predict and are left out"
            )
        return found


def _documents(count: int) -> str:
    return "1 document is" if count == 1 else f"{count:,} documents are"
