"""The order of rows, split over processes, and their collation into padded batches.

A *step* fills G = ``world_size * batch_size`` slots; process p takes slots [p*b, (p+1)*b). The order
depends on seed, epoch and G alone, so that 2 processes of batch b see exactly the rows of 1 process of
batch 2b, step by step, and a run resumes by its position. A slot without a row (end of an epoch) holds an
empty row: all masked, no label.

- Without carried state: rows are shuffled, and sorted by length within windows of ``WINDOW`` steps so that
  the rows of a step are of like length; then the steps are shuffled.
- With carried state: a document's rows follow one another in one slot. Documents are dealt to slots once,
  the longest first to the emptiest slot (LPT: the tail of idle slots stays short), and shuffled within
  their slot each epoch: every epoch has the same number of steps. Short documents beside long ones are
  padded; with one slot there is no padding.
"""

import heapq
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from rwkv_rev.device import is_here
from rwkv_rev.errors import DataError
from rwkv_rev.training.draws import permutation
from rwkv_rev.training.rows import EMPTY_ROW, IGNORED, RowDataset, RowStatistics

WINDOW = 64
UNSAID = {"objective": "next-token"}
"""What a setting is where an identity does not hold it."""


class BatchOrder(Sampler[list[int]]):
    """Batch sampler over a :class:`RowDataset`: yields the row indices of this process's slots, step by step.

    ``position`` counts the steps of this epoch already taken; iteration begins there. ``set_epoch`` begins
    another epoch (from its first step, unless it is the current one). Attributes ``seed``, ``epoch``,
    ``batch_size``, ``rank``, ``world_size``.
    """

    def __init__(
        self,
        rows: RowDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        group_by_length: bool = True,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"the batch size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        self.rows = rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.epoch = 0
        self.position = 0
        self._slots = self._deal() if rows.carry_state else None
        self._schedule: tuple[int, np.ndarray] | None = None

    @property
    def slots(self) -> int:
        """Slots of one step over all processes, G."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        if self._slots is not None:
            return max(sum(int(count) for _, count in slot) for slot in self._slots)
        return -(-len(self.rows) // self.slots)

    def __iter__(self) -> Iterator[list[int]]:
        schedule = self.schedule(self.epoch)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        begin, self.position = self.position, 0
        for step in range(begin, len(schedule)):
            yield schedule[step, mine].tolist()

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0
        self.rows.epoch = epoch

    def schedule(self, epoch: int) -> np.ndarray:
        """Row of every slot at every step of an epoch, int64 [steps, G]; EMPTY_ROW where there is none."""
        if self._schedule is None or self._schedule[0] != epoch:
            self._schedule = (
                epoch,
                self._carried(epoch) if self._slots is not None else self._shuffled(epoch),
            )
        return self._schedule[1]

    def _shuffled(self, epoch: int) -> np.ndarray:
        steps, count = len(self), len(self.rows)
        order = np.full(steps * self.slots, EMPTY_ROW, np.int64)
        order[:count] = permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)
        if not self.shuffle:
            return order.reshape(steps, self.slots)
        if self.group_by_length:
            lengths = np.append(self.rows.lengths(), 0)  # index -1, the empty row, has length 0
            for start in range(0, len(order), WINDOW * self.slots):
                window = order[start : start + WINDOW * self.slots]
                window[:] = window[np.argsort(-lengths[window], kind="stable")]
        return order.reshape(steps, self.slots)[permutation(steps, self.seed + 1, epoch)]

    def _deal(self) -> list[list[tuple[int, int]]]:
        """Documents (first row, rows) of each slot."""
        first, counts = self.rows.chains()
        order = permutation(len(first), self.seed, 0) if self.shuffle else np.arange(len(first))
        order = order[np.argsort(-counts[order], kind="stable")]
        slots: list[list[tuple[int, int]]] = [[] for _ in range(self.slots)]
        load = [(0, slot) for slot in range(self.slots)]
        for document in order.tolist():
            filled, slot = load[0]
            slots[slot].append((int(first[document]), int(counts[document])))
            heapq.heapreplace(load, (filled + int(counts[document]), slot))
        return slots

    def _carried(self, epoch: int) -> np.ndarray:
        assert self._slots is not None
        schedule = np.full((len(self), self.slots), EMPTY_ROW, np.int64)
        for slot, documents in enumerate(self._slots):
            if not documents:
                continue
            order = (
                permutation(len(documents), self.seed + 1 + slot, epoch)
                if self.shuffle
                else range(len(documents))
            )
            rows = np.concatenate([np.arange(documents[i][0], sum(documents[i])) for i in order])
            schedule[: len(rows), slot] = rows
        return schedule

    def statistics(self) -> RowStatistics:
        """Figures of the data and of the first epoch's batches."""
        lengths = np.append(self.rows.lengths(), 0)[self.schedule(0)]  # [steps, G]
        local = lengths.reshape(len(lengths), self.world_size, self.batch_size)
        positions = int(local.max(axis=2).sum()) * self.batch_size
        share = 1.0 - float(lengths.sum()) / positions
        found = self.rows.statistics()
        warnings = found.warnings
        if self._slots is not None and (idle := sum(not slot for slot in self._slots)):
            warnings += (
                f"{idle} of {self.slots} batch slots stay empty: a carried document keeps to one slot, "
                f"and there are {self.slots - idle}",
            )
        return replace(found, padding_share=share, steps=len(self), warnings=warnings)

    def state_dict(self, position: int) -> dict[str, Any]:
        """What a checkpoint needs to go on after ``position`` steps of the current epoch."""
        return {"epoch": self.epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position; DataError when data, seed or batch differ from the saved run's."""
        mine = self._identity()
        for name in dict.fromkeys([*mine, *state]):
            was, now = (there.get(name, UNSAID.get(name)) for there in (state, mine))
            if name not in ("epoch", "position") and was != now:
                raise DataError(f"cannot resume: {name} was {was} and is now {now}; the order would differ")
        self.epoch = self.rows.epoch = int(state["epoch"])
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        objectives = {} if self.rows.objectives.plain else {"objective": str(self.rows.objectives)}
        return objectives | {
            "data": self.rows.store.fingerprint,
            "context_length": self.rows.context_length,
            "pack": "best fit" if self.rows.pack else False,
            "carry_state": self.rows.carry_state,
            "seed": self.seed,
            "rows_per_step": self.slots,
            "shuffle": self.shuffle,
            "group_by_length": self.group_by_length,
        }


class Collator:
    """Rows to a batch, padded on the right.

    Gives int64 [B, T]: ``input_ids`` (``pad_token_id`` on padding), ``attention_mask`` (1 on tokens),
    ``labels`` (-100 on padding and prompts), with ``carry_state`` also bool [B] ``continues``, of packed rows bool
    [B, T] ``borders``, and where rows have them float32 [B, T] ``loss_weights``. T is the longest row, at least 2,
    rounded up to ``pad_to_multiple_of``.
    """

    def __init__(
        self, *, pad_token_id: int = 0, pad_to_multiple_of: int = 1, carry_state: bool = False
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.carry_state = carry_state

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(2, *(len(row["input_ids"]) for row in rows))
        shape = len(rows), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for at, row in enumerate(rows):
            n = len(row["input_ids"])
            batch["input_ids"][at, :n] = row["input_ids"]
            batch["attention_mask"][at, :n] = 1
            batch["labels"][at, :n] = row["labels"]
        for name, dtype in (("borders", torch.bool), ("loss_weights", torch.float32)):
            if name in rows[0]:
                batch[name] = torch.zeros(shape, dtype=dtype)
                for at, row in enumerate(rows):
                    batch[name][at, : len(row[name])] = row[name]
        if self.carry_state:
            batch["continues"] = torch.tensor([row["continues"] for row in rows])
        return batch


class RowLoader(DataLoader):
    """DataLoader of collated batches in the given order; already split over processes, do not shard it."""

    def __init__(
        self, order: BatchOrder, *, pad_token_id: int = 0, pad_to_multiple_of: int = 1, num_workers: int = 0
    ) -> None:
        collate = Collator(
            pad_token_id=pad_token_id,
            pad_to_multiple_of=pad_to_multiple_of,
            carry_state=order.rows.carry_state,
        )
        super().__init__(
            order.rows,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=is_here(torch.device("cuda")),
        )
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)
