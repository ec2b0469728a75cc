"""``set_bptt`` as a statement, as a context manager, and while losses of one's own are open."""

import numpy as np
import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM


def test_numpy_lengths_are_lengths() -> None:
    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(12)
    losses = []
    for length in (np.int64(5), 5):
        with model.set_bptt("reversible", chunk_length=length):
            losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] == losses[1]


def test_settings_may_be_entered_again() -> None:
    model = tiny_model("5.2")
    model.set_bptt("full", chunk_length=100)
    chosen = model.set_bptt("checkpoint", chunk_length=5)
    for strategy in ("full", "reversible"):
        with chosen:
            assert (model.model.bptt.strategy, model.model.bptt.chunk_length) == ("checkpoint", 5)
        model.set_bptt(strategy, chunk_length=100)
    with chosen, model.set_bptt("checkpoint", chunk_length=7):
        assert (model.model.bptt.strategy, model.model.bptt.chunk_length) == ("checkpoint", 7)
    assert (model.model.bptt.strategy, model.model.bptt.chunk_length) == ("reversible", 100)


def gradients(model: RwkvRevForCausalLM, losses: list[Tensor], order: tuple[int, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    for place in order:
        losses[place].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("remnants", [("lifted", "whole"), ("whole", "lifted")], ids=" ".join)
def test_losses_with_other_remnants_may_be_open_at_once(
    remnants: tuple[str, str], order: tuple[int, int]
) -> None:
    model, texts = tiny_model("7", dtype=torch.float64), (random_tokens(29), random_tokens(31, seed=9))

    def read(strategy: str, kind: str) -> Tensor:
        with model.set_bptt(strategy, chunk_length=8, remnants=kind):
            return model(texts[len(losses)]).logits.square().mean()

    losses: list[Tensor] = []
    for kind in remnants:
        losses.append(read("reversible", kind))
    with model.set_bptt("checkpoint", remnants="whole"):
        model(texts[0], labels=texts[0])
    found = gradients(model, losses, order)
    losses = []
    for _ in remnants:
        losses.append(read("full", "auto"))
    for name, expected in gradients(model, losses, order).items():
        assert relative_error(found[name], expected) < 1e-6, name
