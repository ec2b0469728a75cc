"""The long recall example at a distance a CPU can afford: exact gradients learn, truncated ones guess."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "long_recall" / "long_recall.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_recall", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_recall"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("distance", "chunk_length", "pairs"), [(64, 16, 2), (192, 32, 4), (8192, 1024, 4)])
def test_answers_lie_behind_every_statement_by_the_distance(example, distance, chunk_length, pairs):
    task = example.Task(distance, chunk_length, pairs)
    ids, labels = task.rows(8, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (8, distance + distance // 2)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        first_question = task.length - pairs - 1
        stated: dict[int, list[int]] = {}
        for place in range(first_question):
            if row[place] < pairs:
                stated.setdefault(row[place], []).append(place)
        counts = {key: len(places) for key, places in stated.items()}
        assert counts == dict.fromkeys(range(pairs), task.repeats)
        last_value = max(max(places) for places in stated.values()) + 1
        assert first_question - last_value >= distance
        asked = row[first_question:-1]
        assert sorted(asked) == list(range(pairs))
        # each question is the last token before its label; values appear in the statement alone
        for key, answer in zip(asked, wanted[first_question + 1 :], strict=True):
            assert pairs <= answer < pairs + task.values
            assert {row[place + 1] for place in stated[key]} == {answer}
        assert [place for place, label in enumerate(wanted) if label != -100] == list(
            range(first_question + 1, task.length)
        )
        assert min(row[last_value + 1 : first_question]) >= pairs + task.values
        assert row[-1] >= pairs + task.values


def test_impossible_tasks_are_refused(example):
    with pytest.raises(ValueError, match="even number of chunks"):
        example.Task(distance=100, chunk_length=32)
    with pytest.raises(ValueError, match="need more than 16 tokens"):
        example.Task(distance=32, chunk_length=8, pairs=8)


@pytest.mark.parametrize("architecture", ["5.2", "6", "7"])
def test_slow_channels_remember_over_the_distance(example, architecture):
    task = example.Task()
    model = example.build_model(task, example.Run(architecture=architecture), seed=0)
    found = 0
    for name, decay in model.named_parameters():
        if name.endswith(("time_decay", "decay_base")):
            decay = decay.detach().double()
            rate = math.exp(-0.5) * torch.sigmoid(decay) if architecture == "7" else decay.exp()
            bits = rate / math.log(2) * task.length
            assert (bits < 1).sum() == decay.numel() // 2
            found += 1
    assert found == 2


@pytest.mark.parametrize("architecture", ["5.2", "7"])
def test_truncated_training_never_sees_the_values(example, architecture):
    task = example.Task(distance=64, chunk_length=16)
    model = example.build_model(task, example.Run(architecture=architecture), seed=0)
    model.set_bptt("truncated", chunk_length=task.chunk_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    ids, labels = task.rows(4, torch.Generator().manual_seed(0))
    for _ in range(3):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    other = torch.where((ids >= task.pairs) & (ids < task.pairs + task.values), task.pairs, ids)
    assert not torch.equal(other, ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(other).logits)


def test_rwkv_7_learns_it(example):
    """From guessing to nearly all answers."""
    run = example.Run(architecture="7", steps=20, batch_size=16, evaluate_every=20, held_out_rows=64)
    task = example.Task(distance=32, chunk_length=16)
    found = example.train("reversible", task, run, 0, quiet=True)
    assert found["curve"][0]["accuracy"] < task.chance + 0.15
    assert found["accuracy"] > 0.9 and found["tape_bytes"] > 0


def test_exact_gradients_learn_what_truncated_ones_cannot(example, tmp_path, monkeypatch, capsys):
    options = {
        "device": "cpu", "distance": 32, "chunk-length": 16, "pairs": 2, "values": 4, "width": 64, "head-size": 16,
        "steps": 28, "batch-size": 8, "evaluate-every": 28, "held-out-rows": 64,
    }  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    outputs = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    monkeypatch.setattr(sys, "argv", ["long_recall.py", *arguments, *outputs])
    example.main()
    report = json.loads((tmp_path / "out.json").read_text())
    by_strategy = {row["strategy"]: row for row in report["results"]}
    exact, truncated = by_strategy["reversible"], by_strategy["truncated"]
    # the same start: what differs is the gradient
    assert exact["curve"][0] == pytest.approx(truncated["curve"][0], rel=1e-5)
    assert exact["accuracy"] > 0.9
    assert truncated["accuracy"] < report["task"]["chance"] + 0.15
    assert truncated["loss"] > 0.9 * math.log(report["task"]["values"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| reversible | 0 |" in printed and "| guessing | | 0.250 | 1.386 |" in printed
