"""The final state of every document of packed rows, against the documents alone."""

from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, checkpoint_blocks, random_like, random_state, random_tokens, relative_error
from test_borders import OTHER_ROWS as ROWS
from test_borders import OTHERS, TOKENS, assert_states, borders_of, masked_rows, model_of
from torch import Tensor

from rwkv_rev.document_ends import DocumentEnds
from rwkv_rev.errors import StrategyError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.state import ModelState

STRATEGIES = ("full", "checkpoint", "reversible", "truncated")


def batch(model: RwkvRevForCausalLM) -> dict[str, Any]:
    """Left padding, holes (over a border, too), right padding; a row without borders; rows that go on from a state."""
    at = borders_of(*ROWS)
    at[1, 0] = at[2, 0] = False
    ids, mask = masked_rows()
    return {"input_ids": ids, "attention_mask": mask, "borders": at, "state": random_state(model, 3)}


def documents(given: dict[str, Any]) -> list[tuple[int, Tensor, bool]]:
    """Row, ids [1, n] of what counts, and whether it goes on from the row's state."""
    found = []
    for row, lengths in enumerate(ROWS):
        ids, mask = (given[name][row].split(lengths) for name in ("input_ids", "attention_mask"))
        parts = [one[valid.bool()][None] for one, valid in zip(ids, mask, strict=True) if valid.any()]
        found += [(row, part, row > 0 and number == 0) for number, part in enumerate(parts)]
    return found


def alone(model: RwkvRevForCausalLM, given: dict[str, Any]) -> list[ModelState]:
    return [
        model(ids, state=given["state"].rows(torch.tensor([row])) if goes_on else None, use_cache=False).state
        for row, ids, goes_on in documents(given)
    ]


def assert_each(found: ModelState, expected: list[ModelState], tolerance: float) -> None:
    assert found.batch_size == len(expected)
    for number, state in enumerate(expected):
        assert_states(found.rows(torch.tensor([number])), state, tolerance)


@pytest.mark.parametrize("name", [*VERSIONS, *OTHERS])
def test_every_documents_final_state(name: str) -> None:
    """Reading, in pieces and at once; beside a loss, under every strategy; tuned states."""
    model = model_of(name, tuned=True)
    given = batch(model)
    with torch.no_grad():
        expected = alone(model, given)
    for length in (14, TOKENS):
        with torch.no_grad(), model.set_bptt("auto", chunk_length=length):
            assert_each(model(**given, return_document_states=True).document_states, expected, 1e-12)
            beside = model(**given, labels=given["input_ids"], return_document_states=True)
            assert_each(beside.document_states, expected, 1e-12)
            assert_each(model.model(**given, return_document_states=True).document_states, expected, 1e-12)
    for strategy in STRATEGIES:
        with model.set_bptt(strategy, chunk_length=16):
            output = model(**given, labels=given["input_ids"], return_document_states=True)
        on_a_grid = strategy in ("checkpoint", "reversible") and name in OTHERS
        assert_each(output.document_states, expected, 1e-10 if on_a_grid else 1e-12)
        lasts = torch.tensor([5, 6, 8])
        for one, other in zip(
            output.document_states.rows(lasts).tensors(), output.state.tensors(), strict=True
        ):
            assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
@pytest.mark.parametrize("name", [*VERSIONS, "coupled", "coupled-5.2"])
def test_a_row_in_parts(name: str, strategy: str) -> None:
    lengths = [5, 9, 1, 12, 3, 7, 2, 14, 6, 1]
    model, ids = model_of(name), random_tokens(60)
    expected = [model(part).state for part in ids.split(lengths, dim=1)]
    with model.set_bptt(strategy, chunk_length=16):
        found = model(ids, labels=ids, borders=borders_of(lengths), return_document_states=True)
    assert found.report["tape_bytes"] == 0
    assert_each(found.document_states, expected, 1e-12)


@pytest.mark.parametrize("name", ["4", "5.2", "6", "7"])
def test_in_float32(name: str) -> None:
    lengths, ids = ROWS[0], random_tokens(TOKENS)
    model = model_of(name, torch.float32)
    with torch.no_grad():
        expected = [model(part).state for part in ids.split(lengths, dim=1)]
    for strategy in ("full", "reversible"):
        with model.set_bptt(strategy, chunk_length=8):
            found = model(ids, labels=ids, borders=borders_of(lengths), return_document_states=True)
        assert_each(found.document_states, expected, 1e-5)


@pytest.mark.parametrize("name", ["4", "5.2", "6", "7", "reversible-gru"])
def test_a_loss_on_final_states(name: str) -> None:
    """Without labels they are in the graph, however many chunks there are."""
    model = model_of(name, tuned=True)
    given = batch(model)
    parameters = list(model.parameters())
    expected_states = alone(model, given)
    weights = [random_like(state, seed=number) for number, state in enumerate(expected_states)]
    total = sum(state.inner(weight) for state, weight in zip(expected_states, weights, strict=True))
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    with model.set_bptt("reversible", chunk_length=8):
        states = model(**given, return_document_states=True).document_states
    found_total = sum(
        states.rows(torch.tensor([number])).inner(weight) for number, weight in enumerate(weights)
    )
    found = torch.autograd.grad(found_total, parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or relative_error(one, other) <= 1e-12


def test_their_gradient_beside_a_loss_is_refused() -> None:
    model, ids = model_of("5.2"), random_tokens(TOKENS)
    for strategy in STRATEGIES:
        with model.set_bptt(strategy, chunk_length=16):
            output = model(ids, labels=ids, borders=borders_of(ROWS[0]), return_document_states=True)
        with pytest.raises(StrategyError, match="document_states beside a loss have no gradient: detach"):
            (output.loss + output.document_states.wkv.sum()).backward()
        output.loss.backward()
    checkpoint_blocks(model)
    with pytest.raises(StrategyError, match="no gradient through checkpointed blocks"):
        model(ids, borders=borders_of(ROWS[0]), return_document_states=True)
    with model.set_bptt("reversible", chunk_length=16):
        again = model(ids, labels=ids, borders=borders_of(ROWS[0]), return_document_states=True)
    assert_states(again.document_states.detach(), output.document_states.detach(), 1e-6)


def test_rows_without_borders_are_documents() -> None:
    model, ids = model_of("7"), random_tokens(20, batch=3)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, 15:], mask[1] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "return_document_states": True}
    for labels in (None, ids):
        for strategy in ("full", "reversible"):
            with model.set_bptt(strategy, chunk_length=8):
                found = model(**given, labels=labels)
            assert_states(found.document_states, found.state.rows(torch.tensor([0, 2])), 0)
    assert model(ids).document_states is None
    with torch.no_grad():
        assert type(dict(model(**given).items())["document_states"]) is list  # as trainers want a state
        assert len(model(**given, return_dict=False)) == 3


def test_where_documents_end() -> None:
    at = torch.zeros(3, 8, dtype=torch.bool)
    at[0, [0, 3, 5]], at[1, 4] = True, True
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[2], valid[1, :2], valid[1, 7], valid[0, 4] = False, False, False, False
    assert DocumentEnds.of(at, valid).numbers.tolist() == [
        [-1, -1, 0, 1, -1, -1, -1, 2],
        [-1, -1, -1, 3, -1, -1, 4, -1],
        [-1] * 8,
    ]
