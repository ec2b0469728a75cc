"""Every strategy on every version against the independent oracle, over a table of masks, labels, states, chunk lengths.

The oracle (``oracle.py``) is float64, token by token, on the original tensors; the model is what the converter made of
the same file. Compared are the loss, the gradient of every parameter, of the initial state and of ``inputs_embeds``,
and the final state. Model, mask, state, labels, strategy and what goes round with a number (chunk lengths, the kind of
input, the divisor) are not combined in every way, but every two values of any two of them meet. `reversible` sees each
case.
"""

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import oracle
import pytest
import torch
from oracle import logits
from oracle_cases import (
    FLOAT32,
    FLOAT64,
    LABELS,
    LENGTH,
    LOSSY,
    MASKS,
    STATES,
    Question,
    Subject,
    ask,
    case_of,
    make,
    peer_path,
)

RANDOM = ("4", "5.0", "5.0 time_faaaa", "5.1", "5.2", "6", "7")
TRAINED = ("bundled 4", "bundled 5.2", "bundled 6", "bundled 7", "peer 4", "peer 5.2", "peer 7")
DEPTH = 3
"""Of the trained models, the lowest layers: the first, one above it, and one that is neither first nor second."""
CHUNKS = (5, 6, 12, LENGTH - 1, LENGTH, LENGTH + 1)


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Models by name, each made once; skips where a peer's file is not there."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("oracle"))
        return made[name]

    return get


CUT = ("none", "holes", "documents")
"""Masks of ``truncated``: two of them for each model."""


# --- the table --------------------------------------------------------------------------------------------------


OTHERS, PRECISE = ("full", "checkpoint", "auto"), ("full", "checkpoint", "reversible")
TABLE = [
    (
        *(name, mask, STATES[(i + j) % 3], LABELS[(i + 3 * j) % 5]),
        *(OTHERS[(j + 2 * (i // 3)) % 3], PRECISE[(i + j + i // 3) % 3], i + 5 * j),
    )
    for (i, name), (j, mask) in product(*map(enumerate, (RANDOM, MASKS)))
]
"""Model, mask, state, labels, strategies in float32 beside ``reversible`` and in float64, a number that goes round."""


def chunks_of(turn: int) -> list[int]:
    """Chunk lengths for ``full``, ``checkpoint``, ``reversible`` and ``auto``."""
    return [CHUNKS[(turn + step) % len(CHUNKS)] for step in range(4)]


def test_every_two_values_meet() -> None:
    """What goes round is as if there were six values of it: chunk lengths, two kinds of input, three divisors."""
    values = (RANDOM, MASKS, STATES, LABELS, OTHERS, PRECISE, range(6))
    rows = [(*row, turn % 6) for *row, turn in TABLE]
    for a, b in combinations(range(len(values)), 2):
        expected = set(product(values[a], values[b]))
        assert {(row[a], row[b]) for row in rows} == expected
    for strategy in range(4):
        assert {chunks_of(turn)[strategy] for turn in range(6)} == set(CHUNKS)


@pytest.mark.parametrize(("name", "mask", "state", "labels", "other", "precise", "turn"), TABLE)
def test_random_models(
    subject: Callable[[str], Subject],
    name: str,
    mask: str,
    state: str,
    labels: str,
    other: str,
    precise: str,
    turn: int,
) -> None:
    """Strategies that give the gradient of the whole context, in float32 and in float64."""
    one = subject(name)
    divisor = (None, 7.0, 1e4)[turn % 3]
    question = Question(one, case_of(one, mask, labels, state, embedded=turn % 2 == 1, divisor=divisor))
    chunks = dict(zip(("full", "checkpoint", "reversible", "auto"), chunks_of(turn), strict=True))
    for strategy in ("reversible", other):
        question.check(strategy, chunks[strategy], FLOAT32)
    question.check(precise, chunks["auto"], FLOAT64, torch.float64)


@pytest.mark.parametrize("name", ["4", "5.0", "5.2", "6", "7"])
def test_single_steps(subject: Callable[[str], Subject], name: str) -> None:
    """Chunks of one token, among them chunks that are masked altogether."""
    question = Question(
        subject(name), case_of(subject(name), "documents", "all", "given, with objective", length=12)
    )
    question.check("reversible", 1, FLOAT32)


PLAIN, HARD = ("none", "none", "all"), ("documents", "given, with objective", "scattered")
SOME = [
    (
        name,
        *case,
        (("full", 8), ("checkpoint", 7), ("auto", LENGTH - 1))[(i + j) % 3],
        PRECISE[(i + 2 * j) % 3],
    )
    for (i, name), (j, case) in product(enumerate(TRAINED), enumerate((PLAIN, HARD)))
    if name.startswith("bundled") or case is HARD
]


@pytest.mark.parametrize(("name", "mask", "state", "labels", "other", "precise"), SOME)
def test_trained_models(
    subject: Callable[[str], Subject],
    name: str,
    mask: str,
    state: str,
    labels: str,
    other: tuple[str, int],
    precise: str,
) -> None:
    """Trained decays, mixes outside [0, 1], and another GroupNorm; strategies go round, but for ``reversible``."""
    one = subject(f"{name}, {DEPTH} layers")
    question = Question(one, case_of(one, mask, labels, state))
    for strategy, chunk in (("reversible", 8), other):
        question.check(strategy, chunk, FLOAT32)
    question.check(precise, 16 if precise == "reversible" else 8, FLOAT64, torch.float64)


def test_a_longer_context(subject: Callable[[str], Subject]) -> None:
    """The two lowest layers of a trained model, over more tokens than most of their channels remember."""
    one = subject("bundled 5.2, 2 layers")
    question = Question(one, case_of(one, "holes", "all", "given, with objective", length=100))
    for strategy, chunk in (("full", 100), ("checkpoint", 32), ("reversible", 32)):
        question.check(strategy, chunk, FLOAT32)


@pytest.mark.parametrize(
    ("name", "mask"), [(name, mask) for i, name in enumerate(RANDOM) for mask in (CUT[i % 3], CUT[i % 3 - 1])]
)
def test_truncated(subject: Callable[[str], Subject], name: str, mask: str) -> None:
    """``truncated`` is the gradient that stops at chunk borders, to the same precision."""
    one = subject(name)
    case = case_of(one, mask, "all", "given, with objective")
    question = Question(one, replace(case, cut=7))
    question.check("truncated", 7, FLOAT32)
    if mask == "documents":
        question.check("truncated", 7, FLOAT64, torch.float64)


@pytest.mark.parametrize("name", ["5.0", "5.1", "bundled 5.2, 2 layers"])
def test_lossy(subject: Callable[[str], Subject], name: str) -> None:
    """``reversible-lossy`` where plain division keeps enough bits; its own tolerance."""
    one = subject(name)
    question = Question(one, case_of(one, "holes", "scattered", "given, with objective"))
    question.check("reversible-lossy", 7, LOSSY)


# --- the oracle and the comparison themselves -------------------------------------------------------------------


def test_the_oracle_knows_nothing_of_the_package() -> None:
    source = Path(oracle.__file__).read_text(encoding="utf-8")
    assert "rwkv_rev" not in source
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"collections.abc", "dataclasses", "math", "torch", "torch.nn.functional"}


@pytest.mark.parametrize("version", ["4", "5.2", "7"])
def test_the_oracle_gives_the_logits_of_others(subject: Callable[[str], Subject], version: str) -> None:
    """Logits that another implementation published for a trained model."""
    one = subject(f"peer {version}")
    expected = json.loads(peer_path(version).with_suffix(".expected.json").read_text(encoding="utf-8"))
    found = logits(one.tensors, torch.tensor([expected["prompt_bytes"]]), one.group_norm)[0]
    truth = torch.tensor(expected["logits_after_last_byte"], dtype=torch.float64)
    assert (found - truth).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "change", ["one gradient", "a sign", "an index", "the loss", "the state", "by state"]
)
def test_the_comparison_notices(subject: Callable[[str], Subject], change: str) -> None:
    """An answer that is wrong in one place does not pass."""
    one = subject("4")
    question = Question(one, case_of(one, "holes", "all", "given"))
    found = ask(one.float32, question.case, "full", LENGTH)
    question.compare(found, FLOAT32)
    decay = found.gradients["blocks.1.att.time_decay"]
    if change == "one gradient":
        decay *= 1 + 5e-5
    elif change == "a sign":
        decay[decay.abs().argsort()[len(decay) // 2]] *= -1
    elif change == "an index":
        decay.copy_(decay.roll(1, 0).clone())
    elif change == "the loss":
        found.loss *= 1 + 2e-6
    elif change == "the state":
        found.state.time_shift[1, 2] *= 1 + 1e-4
    else:
        found.by_state["memory"] *= 1 + 5e-5
    with pytest.raises(AssertionError):
        question.compare(found, FLOAT32)
