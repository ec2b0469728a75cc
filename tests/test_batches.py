"""Order of rows, split over processes, and their collation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import make_store

from rwkv_rev.errors import DataError
from rwkv_rev.training.batches import BatchOrder, Collator, RowLoader
from rwkv_rev.training.rows import EMPTY_ROW, IGNORED, RowDataset

LENGTHS = [5, 3, 30, 7, 2, 9, 14, 6, 21, 4, 3, 8, 12]


def make_rows(folder: Path, carry: bool = False, context: int = 8) -> RowDataset:
    return RowDataset(make_store(folder, LENGTHS), context, carry_state=carry)


@pytest.mark.parametrize("carry", [False, True], ids=["plain", "carry"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled"])
@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_an_epoch_has_every_row_once(tmp_path: Path, carry: bool, shuffle: bool, batch: int) -> None:
    rows = make_rows(tmp_path, carry)
    order = BatchOrder(rows, batch, seed=3, shuffle=shuffle)
    for epoch in range(3):
        order.set_epoch(epoch)
        steps = list(order)
        assert len(steps) == len(order) and {len(step) for step in steps} == {batch}
        assert sorted(row for step in steps for row in step if row != EMPTY_ROW) == list(range(len(rows)))
        assert all(any(row != EMPTY_ROW for row in step) for step in steps)


@pytest.mark.parametrize("carry", [False, True], ids=["plain", "carry"])
def test_two_processes_see_the_rows_of_one(tmp_path: Path, carry: bool) -> None:
    rows = make_rows(tmp_path, carry)
    one = BatchOrder(rows, 4, seed=7)
    two = [BatchOrder(rows, 2, seed=7, rank=rank, world_size=2) for rank in range(2)]
    for epoch in range(2):
        for order in (one, *two):
            order.set_epoch(epoch)
        split = [left + right for left, right in zip(*two, strict=True)]
        assert split == list(one)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=15),
    slots=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_carried_documents_stay_in_their_slot(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], slots: int, epoch: int
) -> None:
    rows = RowDataset(make_store(tmp_path_factory.mktemp("store"), lengths), 8, carry_state=True)
    schedule = BatchOrder(rows, slots, seed=epoch + 1).schedule(epoch)
    for slot in range(slots):
        before = EMPTY_ROW
        for row in schedule[:, slot].tolist():
            if rows[row]["continues"]:
                assert row == before + 1
            before = row
    longest = -(-max(lengths) // 8)
    assert len(schedule) <= len(rows) / slots + longest  # what dealing the longest first guarantees


def test_epochs_and_seeds_differ_and_repeat(tmp_path: Path) -> None:
    for carry in (False, True):
        rows = make_rows(tmp_path, carry)
        first, second = BatchOrder(rows, 2, seed=1), BatchOrder(rows, 2, seed=2)
        schedules = [order.schedule(epoch).tolist() for order in (first, second) for epoch in (0, 1)]
        assert all(schedules[i] != schedules[j] for i in range(4) for j in range(i))
        assert BatchOrder(rows, 2, seed=1).schedule(0).tolist() == schedules[0]


def test_grouping_by_length_saves_padding(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 200, 400).tolist()
    rows = RowDataset(make_store(tmp_path, lengths), 256)
    grouped = BatchOrder(rows, 8).statistics()
    loose = BatchOrder(rows, 8, group_by_length=False).statistics()
    assert grouped.steps == loose.steps == 50
    assert grouped.padding_share < 0.05 < 0.3 < loose.padding_share
    first = [rows.lengths()[step].max() for step in BatchOrder(rows, 8).schedule(0)]
    assert first != sorted(first) and first != sorted(first, reverse=True), "steps themselves are shuffled"


def test_padding_share_is_that_of_the_batches(tmp_path: Path) -> None:
    for carry in (False, True):
        rows = make_rows(tmp_path, carry)
        tokens = positions = 0
        for rank in range(2):
            order = BatchOrder(rows, 2, seed=5, rank=rank, world_size=2)
            for batch in RowLoader(order):
                if batch["attention_mask"].any():
                    tokens += int(batch["attention_mask"].sum())
                    positions += batch["input_ids"].numel()
        assert order.statistics().padding_share == pytest.approx(1 - tokens / positions)


def test_idle_slots_are_reported(tmp_path: Path) -> None:
    rows = RowDataset(make_store(tmp_path, [40, 9]), 8, carry_state=True)
    (warning,) = (text for text in BatchOrder(rows, 3).statistics().warnings if "slots" in text)
    assert warning.startswith("1 of 3 batch slots stay empty") and warning.endswith("there are 2")
    assert not any("slots" in text for text in BatchOrder(rows, 2).statistics().warnings)


@pytest.mark.parametrize("carry", [False, True], ids=["plain", "carry"])
def test_resumes_at_a_position(tmp_path: Path, carry: bool) -> None:
    rows = make_rows(tmp_path, carry)
    order = BatchOrder(rows, 2, seed=5)
    order.set_epoch(1)
    whole = list(order)
    saved = order.state_dict(position=3)
    resumed = BatchOrder(rows, 2, seed=5)
    resumed.load_state_dict(saved)
    resumed.set_epoch(1)
    assert list(resumed) == whole[3:]
    assert list(resumed) == whole, "the position holds for one pass"
    for change in ({"seed": 6}, {"batch_size": 3}, {"shuffle": False}):
        other = BatchOrder(rows, **{"batch_size": 2, "seed": 5, **change})
        with pytest.raises(DataError, match=r"cannot resume: .* the order would differ"):
            other.load_state_dict(saved)
    halves = BatchOrder(rows, 1, seed=5, rank=1, world_size=2)
    halves.load_state_dict(saved)  # two processes go on where one of the double batch stopped
    assert list(halves) == [step[1:] for step in whole[3:]]


def test_collator() -> None:
    rows = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORED, 6, 7]), "continues": True},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([8]), "continues": False},
        {
            "input_ids": torch.zeros(0, dtype=torch.int64),
            "labels": torch.zeros(0, dtype=torch.int64),
            "continues": False,
        },
    ]
    batch = Collator(pad_token_id=9, carry_state=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED], [IGNORED] * 3]
    assert batch["continues"].tolist() == [True, False, False]
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}
    padded = Collator(pad_to_multiple_of=4)(rows)
    assert padded["input_ids"].shape == (3, 4) and "continues" not in padded
    assert Collator()(rows[2:])["input_ids"].shape == (1, 2)
    borders = [torch.tensor([True, False, True]), torch.tensor([True]), torch.zeros(0, dtype=torch.bool)]
    packed = Collator()([row | {"borders": at} for row, at in zip(rows, borders, strict=True)])
    assert packed["borders"].tolist() == [[True, False, True], [True, False, False], [False] * 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader(tmp_path: Path, workers: int) -> None:
    order = BatchOrder(make_rows(tmp_path, carry=True), 2, seed=5)
    loader = RowLoader(order, num_workers=workers)
    loader.set_epoch(1)
    assert len(loader) == len(order)
    for batch, step in zip(loader, order.schedule(1).tolist(), strict=True):
        for slot, row in enumerate(step):
            ids = order.rows[row]["input_ids"]
            assert batch["input_ids"][slot, : len(ids)].tolist() == ids.tolist()
            assert batch["attention_mask"][slot].sum() == len(ids)


def test_refusals(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    with pytest.raises(DataError, match="batch size is 0"):
        BatchOrder(rows, 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        BatchOrder(rows, 1, rank=2, world_size=2)
