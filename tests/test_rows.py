"""Documents to rows."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import make_store

from rwkv_rev.best_fit import best_fit
from rwkv_rev.errors import DataError
from rwkv_rev.training.draws import permutation
from rwkv_rev.training.objectives.objectives import objectives_of
from rwkv_rev.training.rows import EMPTY_ROW, IGNORED, RowDataset
from rwkv_rev.training.token_cache import load_tokens

PERMUTATION_8 = [4, 0, 1, 7, 6, 2, 5, 3]


def contents(rows: RowDataset) -> list[list[int]]:
    return [rows[i]["input_ids"].tolist() for i in range(len(rows))]


def test_documents_stay_whole_or_are_cut(tmp_path: Path) -> None:
    rows = RowDataset(make_store(tmp_path, [3, 9, 8, 1, 5]), 4)
    assert contents(rows) == [
        [1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],  # token 12 alone predicts nothing
        [13, 14, 15, 16],
        [17, 18, 19, 20],
        [22, 23, 24, 25],
    ]
    assert rows.lengths().tolist() == [3, 4, 4, 4, 4, 4]
    assert not any(rows[i]["continues"] for i in range(len(rows)))
    assert rows[0]["labels"].tolist() == [1, 2, 3]
    assert [rows.locate(i) for i in range(len(rows))] == [(0, 0), (1, 0), (1, 4), (2, 0), (2, 4), (4, 0)]


def test_carry_state_marks_the_rows_that_continue(tmp_path: Path) -> None:
    rows = RowDataset(make_store(tmp_path, [3, 10, 4]), 4, carry_state=True)
    assert contents(rows) == [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    assert [rows[i]["continues"] for i in range(5)] == [False, False, True, True, False]
    assert [found.tolist() for found in rows.chains()] == [[0, 1, 4], [1, 3, 1]]
    assert rows.lengths().tolist() == [3, 4, 4, 2, 4]


def test_prompts_carry_no_loss(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5, 10, 4], [2, 9, 4])
    rows = RowDataset(store, 4)
    assert contents(rows) == [
        [1, 2, 3, 4],
        [14, 15],
    ]  # 5 alone; two rows of prompt only; a document of prompt only
    assert rows[0]["labels"].tolist() == [IGNORED, IGNORED, 3, 4]
    assert rows[1]["labels"].tolist() == [IGNORED, 15]
    statistics = rows.statistics()
    assert statistics.dropped_documents == 1
    assert any(warning.startswith("2 prompts fill the context") for warning in statistics.warnings)
    carried = RowDataset(store, 4, carry_state=True)
    assert contents(carried) == [[1, 2, 3, 4], [6, 7, 8, 9], [10, 11, 12, 13], [14, 15]]
    assert carried[1]["labels"].tolist() == [IGNORED] * 4
    assert carried[3]["labels"].tolist() == [IGNORED, 15]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), min_size=1, max_size=12),
    context=st.integers(2, 12),
    carry=st.booleans(),
)
def test_rows_are_exactly_the_useful_slices(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[int, float]], context: int, carry: bool
) -> None:
    lengths = [length for length, _ in documents]
    prompts = [int(length * share) for length, share in documents]
    if not sum(lengths):
        return
    expected, start = [], 1
    for length, prompt in zip(lengths, prompts, strict=True):
        mine = []
        for row in range(0, length, context):
            end = min(row + context, length)
            useful = any(position >= prompt for position in range(row + 1, end))
            mine.append((useful, end - row, list(range(start + row, start + end)), row > 0 and carry))
        start += length
        if carry:
            keep = [entry for entry in mine if entry[1] > 1] if any(entry[0] for entry in mine) else []
        else:
            keep = [entry for entry in mine if entry[0]]
        expected += [(ids, continues) for _, _, ids, continues in keep]
    store = make_store(tmp_path_factory.mktemp("store"), lengths, prompts)
    if not expected:
        with pytest.raises(DataError, match="no document has a token to predict"):
            RowDataset(store, context, carry_state=carry)
        return
    rows = RowDataset(store, context, carry_state=carry)
    found = [(rows[i]["input_ids"].tolist(), rows[i]["continues"]) for i in range(len(rows))]
    assert found == expected
    assert rows.lengths().tolist() == [len(ids) for ids, _ in expected]
    prompt_ids = {
        first + offset
        for first, prompt in zip(np.cumsum([1, *lengths[:-1]]).tolist(), prompts, strict=True)
        for offset in range(prompt)
    }
    for i, (ids, _) in enumerate(expected):
        assert rows[i]["labels"].tolist() == [IGNORED if token in prompt_ids else token for token in ids]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    context=st.integers(2, 12),
    seed=st.integers(0, 5),
)
def test_pack_holds_every_row_of_the_default_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], context: int, seed: int
) -> None:
    """Whole, behind a border, with its labels but the first: no document is asked for another's beginning."""
    if max(lengths) < 2:
        return
    store = make_store(tmp_path_factory.mktemp("store"), lengths, [min(1, length) for length in lengths])
    plain, rows = RowDataset(store, context), RowDataset(store, context, pack=True, seed=seed)
    found = []
    for index in range(len(rows)):
        row = rows[index]
        assert len(row["input_ids"]) <= context and row["borders"][0] and not row["continues"]
        starts = [*row["borders"].nonzero()[:, 0].tolist(), len(row["borders"])]
        for start, stop in pairwise(starts):
            found.append((row["input_ids"][start:stop].tolist(), row["labels"][start + 1 : stop].tolist()))
            assert row["labels"][start] == IGNORED
    assert sorted(found) == sorted((row["input_ids"].tolist(), row["labels"][1:].tolist()) for row in plain)
    assert rows.lengths().tolist() == [len(row) for row in contents(rows)]
    for count in (1, 3, context):
        borders = [rows[index]["borders"].tolist() for index in range(len(rows))]
        chunks = [row[start : start + count] for row in borders for start in range(0, len(row), count)]
        assert rows.most_pieces(count) == max(sum(chunk[1:]) + 1 for chunk in chunks)
        assert plain.most_pieces(count) == 1
    again = RowDataset(store, context, pack=True, seed=seed)
    assert contents(again) == contents(rows)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_best_fit(lengths: list[int], seed: int) -> None:
    """Rows as full as by the plain rule: each piece, longest first, into the fullest row with room for it."""
    pieces, starts = best_fit(np.array(lengths), 30, permutation(len(lengths), seed, 0))
    assert sorted(pieces.tolist()) == list(range(len(lengths)))
    rows = [pieces[start:stop].tolist() for start, stop in pairwise(starts.tolist())]
    plain: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in plain if sum(row) + length <= 30]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            plain.append([length])
    assert sorted(sum(lengths[piece] for piece in row) for row in rows) == sorted(map(sum, plain))


def test_refusals(tmp_path: Path) -> None:
    store = make_store(tmp_path, [3, 9])
    with pytest.raises(DataError, match="must be at least 2"):
        RowDataset(store, 1)
    with pytest.raises(DataError, match="exclude each other"):
        RowDataset(store, 4, pack=True, carry_state=True)
    with pytest.raises(DataError, match=r"d\.jsonl:2: token id 12 at position 8 is outside"):
        RowDataset(store, 4, vocab_size=12)
    store.max_token = 0  # as where the file changes later
    rows = RowDataset(store, 4, vocab_size=10)
    assert rows[1]["input_ids"].tolist() == [4, 5, 6, 7]
    with pytest.raises(DataError, match=r"d\.jsonl:2: token id 11 is outside the vocabulary"):
        rows[2]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_statistics_and_warnings(tmp_path: Path) -> None:
    store = make_store(tmp_path, [3, 9, 8])
    statistics = RowDataset(store, 100).statistics()
    assert (statistics.documents, statistics.tokens, statistics.longest, statistics.shortest) == (3, 20, 9, 3)
    assert (statistics.rows, statistics.dropped_documents) == (3, 0)
    assert statistics.warnings == (), "nothing is lost"
    assert statistics.notes == ("the context length of 100 is longer than any document (longest: 9 tokens)",)
    whole = RowDataset(store, 9).statistics()
    assert whole.warnings == whole.notes == ()
    assert "2 documents are longer than the context: cut" in RowDataset(store, 4).statistics().warnings[0]
    carried = RowDataset(store, 4, carry_state=True).statistics().warnings
    assert carried == (
        "2 documents are longer than the context: state carried on, gradient cut every 4 tokens",
    )
    packed = RowDataset(store, 20, pack=True).statistics()
    assert packed.rows == 1
    assert packed.warnings == ()
    assert packed.notes == ("pack: 3 pieces of documents in 1 rows, 100.0 % full; state starts anew in each",)


@pytest.mark.parametrize(
    ("objective", "layout", "limit", "pieces", "hint"),
    [
        ("next-token", {}, "the context", 64, " (--carry-state hands it on)"),
        ("next-token", {"pack": True}, "the context", 64, ""),
        ("adapt:segments=2", {}, "the 32 tokens of a document that a row holds", 32, ""),
        ("second-pass", {}, "the 32 tokens of a document that a row holds", 32, ""),
        (
            "recall:span=4:cue=1:share=0.25",
            {},
            "the 48 tokens of a document that a row holds",
            48,
            " (--carry-state hands it on)",
        ),
    ],
)
def test_the_limit_of_a_document_is_the_room_that_a_row_has(
    tmp_path: Path, objective: str, layout: dict[str, bool], limit: str, pieces: int, hint: str
) -> None:
    """--carry-state is named only where it may be given."""
    store = make_store(tmp_path, [100, 100], [70, 0])
    rows = RowDataset(store, 64, objectives=objectives_of(objective), **layout)
    assert rows.statistics().warnings[-2:] == (
        f"2 documents are longer than {limit}: cut into pieces of {pieces} tokens, each without the state before{hint}",
        f"1 prompt fills {limit}: its completion is trained without the whole prompt",
    )


def test_rows_are_read_from_disk_one_at_a_time(tmp_path: Path) -> None:
    rows = RowDataset(make_store(tmp_path, [3000, 50_000]), 1024)
    rows[5]
    assert len(pickle.dumps(rows)) < 4000
    assert pickle.loads(pickle.dumps(rows))[5]["input_ids"].tolist() == rows[5]["input_ids"].tolist()
    assert rows[EMPTY_ROW]["input_ids"].tolist() == [] and rows[EMPTY_ROW]["continues"] is False


def test_permutation_is_fixed_forever() -> None:
    """These values may never change: a resumed run must see the order the interrupted one saw."""
    assert permutation(8, 0, 0).tolist() == PERMUTATION_8
    assert permutation(8, 0, 1).tolist() != PERMUTATION_8 and permutation(8, 1, 0).tolist() != PERMUTATION_8
    assert sorted(permutation(1000, 3, 4).tolist()) == list(range(1000))
    assert permutation(0, 0, 0).tolist() == [] and permutation(3, -1, 0).shape == (3,)


def test_from_a_file_to_rows(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    class Bytes:
        eos_token_id = 0

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    rows = RowDataset(load_tokens(tmp_path / "a.jsonl", Bytes(), cache_dir=tmp_path / "cache"), 16)
    assert contents(rows) == [[*b"abcd", 0], [*b"ef", 0]]
    assert rows[0]["labels"].tolist() == [IGNORED, IGNORED, *b"cd", 0]
