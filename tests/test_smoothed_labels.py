"""Label smoothing in transformers' Trainer: what labels and logits may be, and what is refused."""

from pathlib import Path

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from test_label_smoothing import FORMS, IDS, LABELS, NEXT, OfHidden, gradients, smoothed, trainer
from torch import Tensor

from rwkv_rev.errors import ConfigError

STRATEGIES = ["full", "checkpoint", "reversible"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_head_of_ones_own_on_a_base_model_is_refused(form: str, strategy: str, tmp_path: Path) -> None:
    """As on the base model inside of the whole model; tags, of other sizes, are not shifted."""
    whole = tiny_model("5.2", dtype=torch.float64, bptt=strategy, chunk_length=8)
    made, base = trainer(whole, tmp_path), whole.model
    for mode in (True, False):
        with pytest.raises(ConfigError, match=r"take RwkvRevForCausalLM .* compute_loss_func"):
            made.compute_loss(OfHidden(base, 32, form).train(mode), {"input_ids": IDS, "labels": LABELS})
    model, tags = OfHidden(base, 5, form), random_tokens(23, batch=2).remainder(5)
    with whole.set_bptt("full", chunk_length=1000):
        truth = gradients(model, smoothed(model.tags(base(IDS).last_hidden_state), tags))
    found = gradients(model, made.compute_loss(model, {"input_ids": IDS, "labels": tags}))
    assert found.keys() == truth.keys()
    for name, gradient in truth.items():
        assert relative_error(found[name], gradient) <= 1e-6, name


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_out_of_the_vocabulary_are_refused(name: str, version: str, tmp_path: Path) -> None:
    """By the words of the model's own loss."""
    model = tiny_model(version, bptt="reversible", chunk_length=8)
    made = trainer(model, tmp_path)
    for wrong in (-1, 32, 99, -101):
        labels = LABELS.clone()
        labels[1, 4] = wrong
        said = []
        for smoothing in (True, False):
            with pytest.raises(
                ValueError, match=rf"^{name} hold {wrong}, the vocabulary has ids 0 to 31, "
            ) as error:
                batch = {"input_ids": IDS, name: labels}
                made.compute_loss(model, batch) if smoothing else model(**batch)
            said.append(str(error.value))
        assert said[0] == said[1]
    with pytest.raises(ValueError, match=r"are torch\.float32: give token ids"):
        made.compute_loss(model, {"input_ids": IDS, name: LABELS.float()})


@pytest.mark.parametrize("number", [None, torch.tensor(0), torch.tensor(9)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_predict(strategy: str, number: Tensor | None, tmp_path: Path) -> None:
    """The loss is 0, and so is its gradient, as of the model's own."""
    model = tiny_model("5.2", bptt=strategy, chunk_length=8)
    made, missing = trainer(model, tmp_path), torch.full_like(IDS, -100)
    for batch in (
        {"labels": missing},
        {"shift_labels": missing},
        {"labels": LABELS, "attention_mask": torch.eye(2, 23)},
    ):
        given = {"input_ids": IDS, **batch}
        loss = made.compute_loss(model, dict(given), num_items_in_batch=number)
        assert loss.item() == 0 == model(**given).loss.item()
        found = gradients(model, loss)
        assert found
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_of_some_positions_are_refused(strategy: str, tmp_path: Path) -> None:
    model = tiny_model("5.2", bptt=strategy, chunk_length=8)
    batch = {"input_ids": IDS, "labels": LABELS, "logits_to_keep": 5}
    with pytest.raises(
        ConfigError, match=r"\[2, 5, 32\] and labels \[2, 23\].*prompt learning, or .*logits_to_keep"
    ):
        trainer(model, tmp_path).compute_loss(model, batch)


def test_labels_of_other_models_are_taken_as_they_are(tmp_path: Path) -> None:
    """Of tags -1 stands for none elsewhere: they are the smoother's matter."""
    base = tiny_model("5.2", dtype=torch.float64)
    model, labels = OfHidden(base.model, 5, "dict"), NEXT.clamp(max=4)
    expected = smoothed(model.tags(base.model(IDS).last_hidden_state), labels)
    found = trainer(base, tmp_path).compute_loss(model, {"input_ids": IDS, "labels": labels})
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
