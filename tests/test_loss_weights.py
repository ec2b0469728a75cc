"""Weights of tokens in the loss against the independent oracle, and what they stand beside: masks, labels, trainers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    Outcome,
    assert_agree,
    assert_same_bits,
    differentiate,
    random_tokens,
    relative_error,
    tiny_model,
)
from oracle_cases import (
    FLOAT32,
    FLOAT64,
    LABELS,
    LENGTH,
    MASKS,
    STATES,
    Question,
    Subject,
    ask,
    case_of,
    make,
    seeded,
)
from test_borders import borders_of, cut
from torch import Tensor
from transformers import Trainer, TrainingArguments

from rwkv_rev import loss as loss_module
from rwkv_rev.errors import StrategyError
from rwkv_rev.loss import IGNORE

VERSIONS = ("4", "5.2", "6", "7")
STRATEGIES = ("full", "checkpoint", "reversible", "truncated", "auto")
CHUNKS = (7, 8, 16, LENGTH - 1, LENGTH, LENGTH + 1)


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("oracle"))
        return made[name]

    return get


def random_weights(shape: torch.Size | tuple[int, ...], seed: int = 9) -> Tensor:
    """From 0 to 3, a fifth of them 0; in values that float32 holds."""
    weights = 3 * torch.rand(shape, generator=seeded(seed))
    return torch.where(torch.rand(shape, generator=seeded(seed + 1)) < 0.2, 0, weights)


# --- against the oracle -------------------------------------------------------------------------------------------

TABLE = [
    (name, mask, STATES[(i + j) % 3], LABELS[(2 * i + j) % len(LABELS)], i // 2 + j // 2 + 2 * (i + j))
    for i, name in enumerate(VERSIONS)
    for j, mask in enumerate(MASKS)
    if (i + j) % 2 == 0
]


@pytest.mark.parametrize(("name", "mask", "state", "labels", "turn"), TABLE)
def test_gradients(
    subject: Callable[[str], Subject], name: str, mask: str, state: str, labels: str, turn: int
) -> None:
    """Two strategies each in float32, and all but one in float64 in turn; with masks, states, embeddings, divisors."""
    one = subject(name)
    case = case_of(one, mask, labels, state, embedded=turn % 2 == 1, divisor=(None, 7.0)[turn % 2])
    question = Question(one, replace(case, weights=random_weights(case.labels.shape)))
    plain = ask(one.float64, case, "full", LENGTH).loss
    assert labels == "one" or abs(question.answer.loss - plain) > 1e-4 * plain
    chunks = [CHUNKS[(turn + step) % len(CHUNKS)] for step in range(4)]
    for number, strategy in enumerate(("full", "checkpoint", "auto", "reversible")):
        if (turn + number) % 2 == 0:
            question.check(strategy, chunks[number], FLOAT32)
    question.check("full", chunks[0], FLOAT64, torch.float64)
    strategy = ("reversible", "checkpoint")[turn % 2]
    question.check(strategy, chunks[3], FLOAT64, torch.float64)
    if turn % 2 == 0:
        truncated = Question(one, replace(question.case, cut=7))
        truncated.check("truncated", 7, FLOAT64, torch.float64)


@pytest.mark.parametrize("at_once", [1, 256 * 5])
def test_whatever_part_of_the_logits_is_made_at_once(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    one = subject("7")
    case = case_of(one, "holes", "scattered", "given")
    question = Question(one, replace(case, weights=random_weights(case.labels.shape)))
    for strategy in ("full", "reversible"):
        question.check(strategy, 8, FLOAT64, torch.float64)


# --- what weights mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_stands_where_its_label_stands(strategy: str) -> None:
    """One token counts: its own cross-entropy, from the tokens before it, whatever its weight."""
    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(30)
    labels = torch.full_like(ids, IGNORE)
    labels[0, 20] = ids[0, 20]
    expected = differentiate(model, strategy, 8, input_ids=ids, labels=labels)
    for weight in (1.0, 0.25):
        weights = torch.zeros(1, 30)
        weights[0, 20] = weight
        found = differentiate(model, strategy, 8, input_ids=ids, loss_weights=weights)
        assert_agree(found, expected, 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_one_kind_are_none(strategy: str) -> None:
    model, ids = tiny_model("7", dtype=torch.float64), random_tokens(30, batch=2)
    expected = differentiate(model, strategy, 8, input_ids=ids)
    for weights in (torch.ones(2, 30), 0.3 * torch.ones(2, 30), torch.ones(2, 30, dtype=torch.bool)):
        assert_agree(differentiate(model, strategy, 8, input_ids=ids, loss_weights=weights), expected, 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_of_zero_is_no_label(strategy: str) -> None:
    """To the bit: no chunk computes what does not count, and nothing that stands there is looked at."""
    model, ids = tiny_model("5.2"), random_tokens(30, batch=2)
    left_out = torch.rand(2, 30, generator=seeded(0)) < 0.4
    labels = ids.masked_fill(left_out, IGNORE)
    ones = torch.ones(2, 30)
    expected = differentiate(model, strategy, 8, input_ids=ids, labels=labels, loss_weights=ones)
    weights = ones.masked_fill(left_out, 0)
    assert_same_bits(differentiate(model, strategy, 8, input_ids=ids, loss_weights=weights), expected)
    junk = ones.masked_fill(left_out, torch.nan)  # beside labels of -100
    found = differentiate(model, strategy, 8, input_ids=ids, labels=labels, loss_weights=junk)
    assert_same_bits(found, expected)


def test_masked_places_do_not_count() -> None:
    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(30)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[0, 11:17] = 0
    weights = random_weights((1, 30))
    kept = mask[0].bool()
    expected = differentiate(
        model, "full", input_ids=ids[:, kept], loss_weights=weights[:, kept]
    )  # the row without its holes
    junk = weights.masked_fill(mask == 0, -torch.inf)
    for strategy in ("full", "checkpoint", "reversible"):
        found = differentiate(model, strategy, 8, input_ids=ids, attention_mask=mask, loss_weights=junk)
        assert_agree(found, expected, 1e-11)


def test_no_weight_at_all_is_no_label_at_all() -> None:
    model, ids = tiny_model("5.2"), random_tokens(30)
    for strategy in STRATEGIES:
        found = differentiate(model, strategy, 8, input_ids=ids, loss_weights=torch.zeros(1, 30))
        assert found.loss == 0 and all(not gradient.any() for gradient in found.gradients.values())
        assert found.gradients


def test_beside_targets_that_are_shifted() -> None:
    """``shift_labels``: beside the position that predicts."""
    model, ids, weights = tiny_model("5.2"), random_tokens(30), random_weights((1, 30))
    expected = differentiate(model, "reversible", 8, input_ids=ids, loss_weights=weights)
    targets, shifted = ids.roll(-1, 1), weights.roll(-1, 1)
    targets[:, -1] = IGNORE
    model.zero_grad()
    with model.set_bptt("reversible", chunk_length=8):
        loss = model(ids, shift_labels=targets, loss_weights=shifted).loss
    loss.backward()
    assert loss.item() == expected.loss.item()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected.gradients[name])


@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_packed_documents(strategy: str) -> None:
    """Each as alone; a document's first token is predicted by nothing, whatever it weighs."""
    lengths, model = [13, 1, 22, 7, 17], tiny_model("7", dtype=torch.float64)
    ids, weights = random_tokens(60), random_weights((1, 60))
    divisor, loss = 11.0, torch.zeros(())
    found = differentiate(
        model,
        strategy,
        8,
        input_ids=ids,
        borders=borders_of(lengths),
        loss_weights=weights,
        num_items_in_batch=divisor,
    )
    model.zero_grad()
    for document, its_weights in zip(cut(ids, lengths), cut(weights, lengths), strict=True):
        if document.shape[1] > 1:
            part = model(document, labels=document, loss_weights=its_weights, num_items_in_batch=divisor).loss
            part.backward()
            loss = loss + part.detach()
    assert relative_error(found.loss, loss) < 1e-12
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or relative_error(found.gradients[name], parameter.grad) < 1e-10, name


def test_accumulation_is_the_joined_batch() -> None:
    """A trainer that divides by the weights of all parts; and one that divides by the number of labels."""
    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(30, batch=4)
    weights = random_weights((4, 30))
    total = weights[:, 1:].sum()
    joined = differentiate(model, "reversible", 8, input_ids=ids, loss_weights=weights)
    model.zero_grad()
    loss = torch.zeros(())
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(ids[rows], labels=ids[rows], loss_weights=weights[rows], num_items_in_batch=total).loss
        part.backward()
        loss = loss + part.detach()
    assert relative_error(loss, joined.loss) < 1e-6
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, joined.gradients[name]) < 1e-6
    by_count = model(ids, labels=ids, loss_weights=weights, num_items_in_batch=4 * 29).loss
    assert by_count.item() == pytest.approx(joined.loss.item() * total.item() / (4 * 29), rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_gradient(strategy: str) -> None:
    """The same loss, and logits at their first use that are held to it."""
    model, ids, weights = tiny_model("5.2"), random_tokens(30), random_weights((1, 30))
    expected = differentiate(model, strategy, 8, input_ids=ids, loss_weights=weights).loss
    model.eval()
    with torch.no_grad(), model.set_bptt(strategy, chunk_length=8):
        found = model(ids, labels=ids, loss_weights=weights)
        logits = model(ids).logits
        beside = model(ids, labels=ids, loss_weights=weights, return_logits=True)
    for loss in (found.loss, beside.loss):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(found.logits + 0, logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_autocast(strategy: str, dtype: torch.dtype) -> None:
    """Weights stay in float32, where 16 bits would round them: 1 + 1/4096 and 1 are two weights."""
    model, ids = tiny_model("5.2"), random_tokens(30)
    weights = 1 + torch.arange(30)[None] / 4096
    truth = differentiate(tiny_model("5.2", dtype=torch.float64), "full", input_ids=ids, loss_weights=weights)
    with torch.autocast("cpu", dtype):
        found = differentiate(model, strategy, 8, input_ids=ids, loss_weights=weights)
        plain = differentiate(model, strategy, 8, input_ids=ids)
    assert found.loss.dtype == torch.float32 and found.loss != plain.loss
    near = 3e-3 if dtype == torch.float16 else 3e-2
    assert relative_error(found.gradients["head.weight"], truth.gradients["head.weight"]) < near


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(1, 29), r"loss_weights have shape \[1, 29\], the labels \[1, 30\]: give each label its weight"),
        (torch.ones(30), r"have shape \[30\]"),
        ([1.0] * 30, "have shape of a list"),
        (torch.ones(1, 30, dtype=torch.complex64), "complex64: give real numbers"),
        (torch.ones(1, 30).index_fill(1, torch.tensor([7]), -0.5), "loss_weights hold -0.5 at a token"),
        (torch.ones(1, 30).index_fill(1, torch.tensor([29]), torch.nan), "loss_weights hold nan at a token"),
        (torch.ones(1, 30).index_fill(1, torch.tensor([1]), torch.inf), "loss_weights hold inf at a token"),
        (torch.ones(1, 30).requires_grad_(), r"hand over loss_weights.detach\(\)"),
        (torch.ones(1, 30).to_sparse(), r"torch.sparse_coo: hand over loss_weights.to_dense\(\)"),
    ],
)  # fmt: skip
def test_no_weights(weights: Any, message: str) -> None:
    model, ids = tiny_model("5.2"), random_tokens(30)
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match=message) as error, model.set_bptt(strategy, chunk_length=8):
            model(ids, labels=ids, loss_weights=weights)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [
        *(
            (torch.float32, weight) for weight in (1e37, 1e30, 1e-30, 1e-44, 1e-60)
        ),  # in float32 the last are all 0
        *((torch.float64, weight) for weight in (1e308, 1e200, 1e-200, 1e-320)),
    ],
    ids=str,
)
def test_sums_out_of_range(dtype: torch.dtype, weight: float) -> None:
    """Their inverse, or their products with nats, would be infinite or 0, and the gradient 0 without a word."""
    model, ids = tiny_model("5.2", dtype=dtype), random_tokens(39)
    weights = torch.full((1, 39), weight, dtype=torch.float64)
    for strategy in STRATEGIES:
        with model.set_bptt(strategy, chunk_length=8):
            with pytest.raises(
                ValueError, match=r"the sum of loss_weights is .* by the largest of them"
            ) as error:
                model(ids, labels=ids, loss_weights=weights)
            assert "\n" not in str(error.value)
            for total in (38 * weight, torch.tensor(38 * weight, dtype=torch.float64)):
                with pytest.raises(ValueError, match=r"of loss_weights is|num_items_in_batch is"):
                    model(ids, labels=ids, loss_weights=weights, num_items_in_batch=total)
    nothing = model(ids, labels=ids, loss_weights=torch.zeros(1, 39)).loss
    assert nothing.item() == 0 and nothing.requires_grad


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [(torch.float32, 1e17), (torch.float32, 1e-20), (torch.float64, 1e150), (torch.float64, 1e-150)],
    ids=str,
)
def test_sums_in_range(dtype: torch.dtype, weight: float) -> None:
    """Weights are a ratio; those of one process may be next to nothing beside those of the others."""
    model, ids = tiny_model("5.2", dtype=dtype), random_tokens(39)
    weights = random_weights((1, 39)).double()
    expected = differentiate(model, "reversible", 8, input_ids=ids, loss_weights=weights)
    near = 1e-5 if dtype == torch.float32 else 1e-12
    assert_agree(
        differentiate(model, "reversible", 8, input_ids=ids, loss_weights=weight * weights), expected, near
    )
    small = 1e-60 * weights
    found = differentiate(model, "reversible", 8, input_ids=ids, loss_weights=small, num_items_in_batch=38.0)
    assert found.loss.item() < 1e-55 and all(
        gradient.isfinite().all() for gradient in found.gradients.values()
    )


def test_weights_without_labels() -> None:
    model, ids = tiny_model("5.2"), random_tokens(30)
    with pytest.raises(ValueError, match="loss_weights changes the model's own loss: give labels"):
        model(ids, loss_weights=torch.ones(1, 30))
    with pytest.raises(TypeError, match="the model with an output layer takes it"):
        model.model(ids, loss_weights=torch.ones(1, 30))
    with pytest.raises(StrategyError, match="full"), model.set_bptt("reversible", chunk_length=8):
        model(ids, labels=ids, loss_weights=torch.ones(1, 30), return_logits=True)  # as without weights


# --- in trainers -----------------------------------------------------------------------------------------------------


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(**(values | changes))


def rows_of_trainer() -> list[dict[str, Tensor]]:
    ids, weights = random_tokens(24, batch=4), random_weights((4, 24))
    return [{"input_ids": i, "labels": i, "loss_weights": w} for i, w in zip(ids, weights, strict=True)]


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """A column ``loss_weights`` reaches the model; Trainer divides by the number of labels, whatever they weigh."""
    given, rows = arguments(tmp_path, per_device_train_batch_size=2, max_steps=1), rows_of_trainer()
    trainer = Trainer(tiny_model("5.2", chunk_length=8), given, train_dataset=rows)
    trainer.train()
    (found,) = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = tiny_model("5.2")(**joined, num_items_in_batch=4 * 23).loss
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_label_smoothing_of_trainer_is_refused(tmp_path: Path) -> None:
    """Its loss is not the model's, and knows no weights."""
    given = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(tiny_model("5.2"), given, train_dataset=rows_of_trainer())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()


def test_outcomes_differ() -> None:
    """The comparison above would notice weights without effect."""
    model, ids = tiny_model("5.2"), random_tokens(30)
    found: list[Outcome] = [
        differentiate(model, "reversible", 8, input_ids=ids, **given)
        for given in ({}, {"loss_weights": random_weights((1, 30))})
    ]
    assert relative_error(found[1].gradients["head.weight"], found[0].gradients["head.weight"]) > 0.05
