"""Objectives of fine-tuning: what each makes of a document, token by token; how they are named, resumed and split."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from token_data import make_store

from rwkv_rev.errors import CheckpointError, ConfigError, DataError
from rwkv_rev.training.batches import BatchOrder, RowLoader
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.draws import uniform
from rwkv_rev.training.objectives.objective import Row
from rwkv_rev.training.objectives.objectives import KINDS, Objectives, objectives_of
from rwkv_rev.training.objectives.recall import AFTER, MARKER, Recall
from rwkv_rev.training.planning import plan
from rwkv_rev.training.rows import EMPTY_ROW, IGNORED, RowDataset
from rwkv_rev.training.trainer import RwkvRevTrainer

GOOD: dict[str, Any] = {"model": "m", "data": ["d.txt"], "output": "o"}
M, A = [9001, 9002, 9003], [9004]
"""Ids of marker and what stands after a question, in these tests."""


def asked(text: str) -> Objectives:
    """With short marks."""
    return objectives_of(text).read_by(lambda mark: M if mark == MARKER else A)


def dataset(
    folder: Path, lengths: list[int], length: int, text: str, prompts: list[int] | None = None, **more: Any
) -> RowDataset:
    return RowDataset(make_store(folder, lengths, prompts), length, objectives=asked(text), **more)


def lists(row: dict[str, torch.Tensor]) -> tuple[list[int], list[int], list[float]]:
    return row["input_ids"].tolist(), row["labels"].tolist(), row["loss_weights"].tolist()


# --- what rows become -----------------------------------------------------------------------------------------------


def test_next_token_is_what_rows_were(tmp_path: Path) -> None:
    rows = dataset(tmp_path, [5, 9], 6, "next-token")
    assert set(rows[0]) == {"input_ids", "labels", "continues"} and rows.objectives.plain
    assert RowDataset(rows.store, 6)[1]["input_ids"].tolist() == rows[1]["input_ids"].tolist()


def test_position_weighted(tmp_path: Path) -> None:
    """w_t = first + (1 - first) (t / (T - 1))^power, from the beginning of the document in its row."""
    rows = dataset(tmp_path, [5, 12], 9, "position-weighted:power=2:first=0.5")
    assert [lists(row)[0] for row in rows] == [[1, 2, 3, 4, 5], list(range(6, 15)), [15, 16, 17]]
    for row in rows:
        ids, labels, weights = lists(row)
        assert labels == ids
        assert weights == pytest.approx([0.5 + 0.5 * (t / 8) ** 2 for t in range(len(ids))])
    carried = dataset(tmp_path, [5, 12], 9, "position-weighted:power=1:first=0", carry_state=True)
    assert lists(carried[2])[2] == [1.0] * 3  # positions 9 to 11 of the document: as at the end of a context
    assert lists(carried[1])[1][0] == IGNORED, "a label of weight 0 is none"
    packed = dataset(tmp_path, [4, 5, 3], 9, "position-weighted:first=0.1", pack=True)
    for row in packed:
        _, _, weights = lists(row)
        begins = row["borders"].nonzero()[:, 0].tolist()
        for start, stop in zip(begins, [*begins[1:], len(weights)], strict=True):
            assert weights[start:stop] == pytest.approx([0.1 + 0.9 * t / 8 for t in range(stop - start)])


def test_second_pass(tmp_path: Path) -> None:
    """Twice, loss at the second reading, and never on the first token."""
    rows = dataset(tmp_path, [3, 7], 8, "second-pass", prompts=[1, 0])
    assert rows.lengths().tolist() == [6, 8, 6]
    I = IGNORED  # noqa: E741
    assert lists(rows[0]) == ([1, 2, 3, 1, 2, 3], [I, I, I, I, 2, 3], [0.0] * 3 + [1.0] * 3)
    assert lists(rows[1])[:2] == ([4, 5, 6, 7] * 2, [I] * 5 + [5, 6, 7])
    assert lists(rows[2])[:2] == ([8, 9, 10] * 2, [I] * 4 + [9, 10])
    both = dataset(tmp_path, [3], 8, "second-pass:first=0.25")
    assert lists(both[0]) == ([1, 2, 3, 1, 2, 3], [1, 2, 3, I, 2, 3], [0.25] * 3 + [1.0] * 3)
    odd = dataset(tmp_path, [9], 7, "second-pass")
    assert [lists(row)[0] for row in odd] == [[1, 2, 3] * 2, [4, 5, 6] * 2, [7, 8, 9] * 2]
    packed = dataset(tmp_path, [3, 4, 2], 12, "second-pass", pack=True)
    found = sorted(tuple(lists(row)[0]) for row in packed)
    assert sum(map(len, found)) == 18 and max(map(len, found)) <= 12
    assert packed.lengths().tolist() == [len(lists(row)[0]) for row in packed]
    assert sum(int(row["borders"].sum()) for row in packed) == 3, "the state goes on into the second reading"


def test_recall_asks_for_what_was_read(tmp_path: Path) -> None:
    """Each question: marker, cue, the rest with loss, then the text goes on where it had stopped."""
    span, cue, length = 6, 2, 400
    rows = dataset(tmp_path, [3000], length, f"recall:span={span}:cue={cue}:share=0.25:weight=2")
    block = len(M) + span + len(A)
    assert rows.lengths().tolist()[:-1] == [length] * (len(rows) - 1)
    text, distances = [], []
    for index, row in enumerate(rows):
        ids, labels, weights = lists(row)
        assert len(ids) == rows.lengths()[index]
        read: list[int] = []
        at = questions = 0
        while at < len(ids):
            if ids[at] != M[0]:
                assert labels[at] == ids[at] and weights[at] == 1
                read.append(ids[at])
                at += 1
                continue
            assert ids[at : at + len(M)] == M
            answer = ids[at + len(M) : at + len(M) + span]
            begin = read.index(answer[0])
            assert read[begin : begin + span] == answer, "it has been read, whole, before"
            distances.append(len(read) - begin)
            silent = len(M) + cue
            assert labels[at : at + silent] == [IGNORED] * silent
            assert labels[at + silent : at + block] == [*answer[cue:], IGNORED]
            assert weights[at + silent : at + block - 1] == [2.0] * (span - cue)
            at += block
            questions += 1
        text += read
        assert questions == (10 if len(ids) == length else 300 * len(read) // 300 * 10 // 300)
    assert text == list(range(1, 3001)), "nothing of the document is lost"
    assert min(distances) >= span and max(distances) > 150
    logarithms = np.log(distances) / np.log(300)
    assert 0.25 < np.mean(logarithms < (1 + np.log(span) / np.log(300)) / 2) < 0.8, "near and far ones"


def test_distances_follow_the_equation() -> None:
    """d = span (p / span)^v of numbers that are known."""
    recall = Recall(span=4, cue=1, share=0.5, marker=(901,), after=())
    assert recall.block == 5 and recall.room(40) == 20 and recall.questions(40) == 4
    ids = np.arange(100, 120)
    drawn = np.array([0.0, 0.5, 0.5, 0.9, 0.0, 0.0, 0.5, 0.99])  # places, then distances
    row = recall.change(Row.of(ids, ids), 40, lambda count: drawn[:count])
    places = [max(4, int(20 * (j + u) / 4)) for j, u in enumerate(drawn[:4])]
    assert places == [4, 7, 12, 19]
    found = row.ids.tolist()
    for number, (place, v) in enumerate(zip(places, drawn[4:], strict=True)):
        at = place + 5 * number
        distance = int(4 * (place / 4) ** v)
        assert (
            found[at] == 901
            and found[at + 1 : at + 5] == ids[place - distance : place - distance + 4].tolist()
        )


def test_recall_keeps_prompts_silent(tmp_path: Path) -> None:
    """What had no loss where it stood has none where it is asked for."""
    rows = dataset(tmp_path, [300], 400, "recall:span=6:cue=2:share=0.25", prompts=[290])
    for row in rows:
        ids, labels, _ = lists(row)
        assert any(token == M[0] for token in ids)
        assert {label for label in labels if label != IGNORED} <= set(range(291, 301))


def test_adapt(tmp_path: Path) -> None:
    """Segments of different documents, the last part of each; every part once an epoch."""
    lengths = [80, 48, 28, 33, 96]
    first = np.cumsum([0, *lengths])
    rows = dataset(tmp_path, lengths, 48, "adapt:segments=3:last=0.5")
    seen: list[int] = []
    for index, row in enumerate(rows):
        ids, labels, weights = lists(row)
        assert len(ids) == rows.lengths()[index] <= 48 and "borders" not in row
        documents = np.searchsorted(first, np.array(ids) - 1, side="right")
        cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
        segments = [ids[a:b] for a, b in pairwise(cuts)]
        assert len(segments) <= 3 and len(set(documents[cuts[:-1]])) == len(segments)
        for begin, segment in zip(cuts, segments, strict=False):
            n, half = len(segment), -(-len(segment) // 2)
            assert weights[begin : begin + n] == [0.0] * (n - half) + [1.0] * half
            assert labels[begin : begin + n] == [IGNORED] * (n - half) + segment[n - half :]
        seen += ids
    assert sorted(seen) == sorted(
        token
        for a, n in zip(first, lengths, strict=False)
        for token in range(a + 1, a + n + 1 - (n % 16 == 1))
    ), "but for a last token alone, which predicts nothing"
    other = dataset(tmp_path, lengths, 48, "adapt:segments=3:last=0.5", seed=1)
    assert [lists(row)[0] for row in other] != [lists(row)[0] for row in rows]


def test_adapt_tells_of_a_document_that_fills_rows(tmp_path: Path) -> None:
    found = dataset(tmp_path, [320, 32], 48, "adapt:segments=3").statistics()
    assert found.notes == ("adapt: a row holds 3 parts of up to 16 tokens each",)
    assert found.warnings[0] == (
        "adapt: 12 of 22 parts share a row with another part of the same document: from one to the other there is no "
        "change to learn (it takes more documents of that length, or fewer segments)"
    )
    assert "share a row" not in str(
        dataset(tmp_path, [80, 96, 80], 48, "adapt:segments=3").statistics().warnings
    )


def test_adapt_needs_several_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="objective adapt needs several documents"):
        dataset(tmp_path, [400], 64, "adapt")


def test_several_at_once(tmp_path: Path) -> None:
    """Weights multiply; questions are put into rows of segments, and positions are those of the whole row."""
    lengths, text = (
        [300, 200, 250],
        "position-weighted:first=0,recall:span=6:cue=2:share=0.2,adapt:segments=2",
    )
    rows = dataset(tmp_path, lengths, 200, text)
    assert str(rows.objectives).split(",")[0].startswith("adapt:")
    assert max(rows.lengths()) <= 200 and rows.lengths().tolist() == [len(row["input_ids"]) for row in rows]
    for row in rows:
        ids, labels, weights = lists(row)
        assert M[0] in ids
        for t, (label, weight) in enumerate(zip(labels, weights, strict=True)):
            assert weight == pytest.approx(0) or weight == pytest.approx(t / 199)
            assert (label != IGNORED) <= (weight > 0)
    twice = dataset(tmp_path, [4], 8, "second-pass,position-weighted:first=0")
    assert lists(twice[0])[2] == pytest.approx([0, 0, 0, 0, 4 / 7, 5 / 7, 6 / 7, 1])


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_draws_are_the_same_everywhere() -> None:
    """By their values: another platform or numpy would change every run."""
    found = uniform(3, 5, 1, 7)
    assert found.tolist() == pytest.approx(DRAWN, abs=0) and found.min() >= 0 and found.max() < 1
    assert uniform(2, 5, 1, 7).tolist() == DRAWN[:2]
    assert len({tuple(uniform(1, *keys)) for keys in ((5, 1, 7), (1, 5, 7), (5, 7, 1), (6, 1, 7))}) == 4
    many = uniform(10_000, 0)
    assert abs(many.mean() - 0.5) < 0.01 and abs((many < 0.1).mean() - 0.1) < 0.01


DRAWN = [0.22603668187830306, 0.15243896626722442, 0.6775386659277968]


@pytest.mark.parametrize(
    "text", ["recall:span=6:cue=2:share=0.25", "adapt:segments=2,recall:span=4:cue=1:share=0.3"]
)
def test_an_epoch_draws_anew_and_a_resumed_one_the_same(tmp_path: Path, text: str) -> None:
    def order() -> BatchOrder:
        return BatchOrder(dataset(tmp_path, [900, 700, 800], 200, text), 2)

    def read(order: BatchOrder, epoch: int) -> list[list[list[int]]]:
        loader = RowLoader(order)
        loader.set_epoch(epoch)
        return [batch["input_ids"].tolist() for batch in loader]

    first = order()
    epochs = [read(first, epoch) for epoch in (0, 1)]
    assert sorted(map(str, epochs[0])) != sorted(map(str, epochs[1])), "other questions"
    again = order()
    again.load_state_dict(json.loads(json.dumps(first.state_dict(0) | {"epoch": 1, "position": 2})))
    assert read(again, 1) == epochs[1][2:]
    with pytest.raises(DataError, match=r"objective was .* and is now next-token"):
        BatchOrder(RowDataset(first.rows.store, 200), 2).load_state_dict(first.state_dict(0))


def test_a_step_is_divided_by_its_weights(tmp_path: Path) -> None:
    """Of all batches; by 1 where nothing counts."""
    (batch,) = RowLoader(BatchOrder(dataset(tmp_path, [5, 12], 9, "position-weighted"), 4))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=1), tokens=0)

    def items(*batches: dict[str, torch.Tensor]) -> float:
        return RwkvRevTrainer._get_num_items_in_batch(trainer, list(batches), torch.device("cpu")).item()

    counts = (batch["labels"] != IGNORED)[:, 1:]
    weights = batch["loss_weights"][:, 1:][counts].sum().item()
    assert items(batch, batch) == pytest.approx(2 * weights) and weights < 0.8 * int(counts.sum())
    assert trainer.tokens == 2 * (5 + 12)
    plain = {name: tensor for name, tensor in batch.items() if name != "loss_weights"}
    assert items(plain) == int(counts.sum())
    assert items(plain | {"labels": torch.full_like(batch["labels"], IGNORED)}) == 1


def test_batches_hold_weights(tmp_path: Path) -> None:
    order = BatchOrder(dataset(tmp_path, [5, 12], 9, "position-weighted"), 4)
    (batch,) = RowLoader(order)
    assert (
        batch["loss_weights"].shape == batch["labels"].shape and batch["loss_weights"].dtype == torch.float32
    )
    padding = batch["attention_mask"] == 0
    assert padding.any() and not batch["loss_weights"][padding].any()
    assert set(order.rows[EMPTY_ROW]) == set(order.rows[0])


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recal", r"objective 'recal' does not exist; did you mean recall\?"),
        ("xyz", "does not exist; choose of next-token, adapt, second-pass, recall, position-weighted"),
        ("", "does not exist"),
        ("recall,", "does not exist"),
        ("recall,recall", "objective recall is named twice"),
        ("next-token,recall", "next-token is what every other one begins with; leave it out"),
        (
            "second-pass,recall",
            "second-pass and recall exclude each other: the second reading asks for everything",
        ),
        ("adapt,second-pass", "objectives second-pass and adapt exclude each other"),
        ("recall:spam=3", "objective recall has no setting 'spam'; it has span, cue, share, weight"),
        ("recall:marker=3", "objective recall has no setting 'marker'"),
        ("next-token:a=1", "has no setting 'a'; it has none"),
        ("recall:span=3:span=4", "span is given twice"),
        ("recall:span=x", "objective recall: span = 'x' is not a plain whole number"),
        ("recall:span", "objective recall: span = '' is not"),
        ("recall:span=1", "objective recall: span = 1 must be at least 2"),
        (
            "recall:span=4",
            "recall: span = 4 leaves no room behind its cue of 8 tokens: span must be at least 9, or set cue to less",
        ),
        ("recall:cue=32", "objective recall: cue = 32 must be from 1 to 31"),
        ("recall:share=0.9", "objective recall: share = 0.9 must be from 0.001 to 0.5"),
        ("recall:weight=nan", "weight = nan must be"),
        ("adapt:segments=1", "segments = 1 must be from 2"),
        ("adapt:last=0", "last = 0 must be"),
        ("position-weighted:power=-1", "power = -1 must be from 0 to 100"),
        ("second-pass:first=2", "first = 2 must be from 0 to 1"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        FinetuneConfig(**GOOD, objective=text).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        ("adapt", {"pack": True}, "adapt and pack=True exclude each other"),
        ("adapt", {"carry_state": True}, "adapt and carry_state=True exclude each other"),
        (
            "second-pass,position-weighted",
            {"carry_state": True},
            "second-pass and carry_state=True exclude each other",
        ),
    ],
)
def test_layouts_that_make_no_sense(text: str, layout: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**GOOD, objective=text, **layout).check()
    FinetuneConfig(**GOOD, objective="recall,position-weighted", **layout).check()


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("second-pass", 3, "needs a context of 4 tokens"),
        (
            "adapt:segments=99",
            512,
            "segments = 99 leaves 5 tokens for each part of a row, fewer than 16: give at most 32 segments, or a",
        ),
        ("adapt:segments=2", 31, "segments = 2 leaves 15 tokens .*, fewer than 16: give a longer context"),
        (
            "recall",
            300,
            "a question takes 44 tokens, more than share = 0.125 of a context of 300; give 352 tokens",
        ),
    ],
)
def test_contexts_that_are_too_short(
    text: str, length: int, message: str, shallow: dict[str, Path], tmp_path: Path
) -> None:
    """Before the data are read: there are none."""
    config = settings(
        shallow["4"], tmp_path / "none.txt", tmp_path / "out", context_length=length, objective=text
    )
    with pytest.raises(ConfigError, match=message):
        plan(config)
    assert objectives_of("recall").room(352) == 308


@pytest.mark.parametrize("text", [*KINDS, "recall:span=64:share=0.3,position-weighted:power=0.12345678901"])
def test_names_are_read_back(text: str) -> None:
    found = objectives_of(text)
    assert objectives_of(str(found)) == found
    assert all(name in str(found) for part in found.parts for name in part.settings())


def test_the_page_tells_every_setting() -> None:
    page = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        for setting, value in kind().settings().items():
            assert f"`{setting}={value!r}`" in line, (name, setting)


# --- runs ------------------------------------------------------------------------------------------------------------


def short_documents(path: Path, *lengths: int) -> Path:
    """Of so many lines each."""
    lines = counting_text(path.with_suffix(".txt"), 200).read_text().splitlines()
    texts = ["\n".join(lines[number : number + length]) for number, length in enumerate(lengths or (30,) * 5)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_dry_run_shows_it(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = short_documents(tmp_path / "data.jsonl")
    config = settings(shallow["4"], data, tmp_path / "out", objective="position-weighted,recall:share=0.4")
    shown = plan(config).to_dict()
    assert shown["settings"]["objective"] == (
        "recall:span=32:cue=8:share=0.4:weight=1.0,position-weighted:power=1.0:first=0.1"
    )
    assert any(
        note.startswith("recall: a full row holds 168 tokens of text and 2 questions")
        for note in shown["data"]["notes"]
    )
    assert shown["data"]["rows"] > plan(settings(shallow["4"], data, tmp_path / "out")).statistics.rows


def test_on_the_command_line(
    cli: Callable[..., tuple[int, str, str]], shallow: dict[str, Path], tmp_path: Path
) -> None:
    data = short_documents(tmp_path / "data.jsonl")
    run = ["finetune", str(shallow["4"]), "--data", str(data), "--output", "out", "--context-length", "512"]
    more = ["--dry-run", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")]
    code, shown, _ = cli(*run, *more, "--objective", "recall,position-weighted:first=0")
    assert code == 0
    full = "recall:span=32:cue=8:share=0.125:weight=1.0,position-weighted:power=1.0:first=0.0"
    assert full in "".join(shown.split()), "wrapped to the width of the terminal"
    code, _, errors = cli(*run, *more, "--objective", "recal")
    assert code == 2 and errors.strip() == "error: objective 'recal' does not exist; did you mean recall?"
    code, _, errors = cli(*run, *more, "--objective", "adapt", "--pack")
    assert code == 2 and "objective adapt and --pack exclude each other" in errors


@pytest.fixture(scope="module")
def plain_run(
    shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[float, float], list[float]]:
    """Data, the held-out losses and those of the steps, where each next token counts as much."""
    folder = tmp_path_factory.mktemp("plain")
    data = short_documents(folder / "data.jsonl")
    plain = finetune(settings(shallow["4"], data, folder / "plain", eval_data=[str(data)], lr=1e-3))
    assert plain.held_out is not None
    return data, plain.held_out, losses(folder / "plain")


@pytest.mark.parametrize("text", ["position-weighted", "second-pass", "recall:share=0.4", "adapt"])
def test_a_run_and_what_is_kept_of_it(
    shallow: dict[str, Path],
    tmp_path: Path,
    text: str,
    plain_run: tuple[Path, tuple[float, float], list[float]],
) -> None:
    data, held_out, steps = plain_run
    result = finetune(
        settings(shallow["4"], data, tmp_path / "out", objective=text, eval_data=[str(data)], lr=1e-3)
    )
    assert result.held_out is not None and result.held_out[1] < result.held_out[0]
    full = str(objectives_of(text))
    summary = json.loads((tmp_path / "out" / "training" / "summary.json").read_text())
    assert summary["plan"]["settings"]["objective"] == full
    assert full in (tmp_path / "out" / "README.md").read_text()
    assert held_out[0] == result.held_out[0], "measured without weights"
    assert losses(tmp_path / "out") != steps


def test_a_resumed_run_is_the_same_run(shallow: dict[str, Path], tmp_path: Path) -> None:
    """Over the border of an epoch, whose questions are others; with another objective it is refused."""
    data = short_documents(tmp_path / "data.jsonl", 30, 30, 20)
    values: dict[str, Any] = {
        "objective": "recall:share=0.4,position-weighted", "max_steps": 5, "save_every": 2, "batch_size": 3,
        "lr_schedule": "constant", "save_total": 5,
    }  # fmt: skip
    finetune(settings(shallow["4"], data, tmp_path / "whole", **values))
    config = settings(shallow["4"], data, tmp_path / "cut", **values)
    assert plan(config).statistics.steps in range(3, 5), "so that an epoch ends on the way"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(config)
    kept = config.working_directory / "checkpoint-2"
    with pytest.raises(CheckpointError, match=r"objective was recall.* and is now next-token"):
        plan(FinetuneConfig(**(config.to_dict() | {"objective": "next-token", "resume": str(kept)})))
    finetune(FinetuneConfig(**(config.to_dict() | {"resume": str(kept)})))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_accumulation_is_the_joined_batch(shallow: dict[str, Path], tmp_path: Path) -> None:
    """Rows of unequal weight: a step is divided by the weights of all its rows."""
    data = short_documents(tmp_path / "data.jsonl", 1, 4, 2, 3)
    found = []
    for batch in (1, 4):
        output = tmp_path / f"by-{batch}"
        finetune(
            settings(
                shallow["5.2"], data, output, objective="second-pass,position-weighted", batch_size=batch,
                grad_accum=4 // batch, lr=1e-3,
            )
        )  # fmt: skip
        found.append(losses(output))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][-1] < found[0][0]


def test_packed_rows_train_as_their_documents(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = short_documents(tmp_path / "data.jsonl", 4, 2, 7, 3)
    found = []
    for pack, batch in ((True, 1), (False, 4)):
        output = tmp_path / f"pack-{pack}"
        more: dict[str, Any] = {"context_length": 1024, "lr": 1e-3, "max_steps": 2}
        text = "position-weighted:power=0.3"
        finetune(settings(shallow["7"], data, output, objective=text, pack=pack, batch_size=batch, **more))
        found.append(losses(output))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_marks_are_text() -> None:
    assert MARKER.isascii() and AFTER.isascii() and Recall().marker == tuple(MARKER.encode())
