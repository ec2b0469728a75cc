"""Packed rows in parts of whole documents: the same as the row in one graph, and as the documents alone."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from bptt_cases import (
    VERSIONS,
    Outcome,
    assert_same_bits,
    differentiate,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    relative_errors,
)
from test_borders import OTHERS, alone, assert_near, assert_states, borders_of, cut, model_of, tolerance_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_rev import position_wise
from rwkv_rev.bptt import sweep
from rwkv_rev.bptt.parts import documents_of, laid_out, parts_of
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells import borders
from rwkv_rev.cells.borders import Borders
from rwkv_rev.cells.moved_rows import moved
from rwkv_rev.packed_rows import given_borders
from rwkv_rev.state import ModelState

SHORT = [5, 9, 1, 12, 3, 7, 2, 14, 6, 1]  # 60 tokens, each at most one chunk of 16
APART = [4, 9, 1, 12, 3, 7, 2, 1, 7, 14]  # the first and the last one in other parts
WITH_A_LONG_ONE = [5, 9, 40, 12, 3, 7, 2, 14, 6, 1]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every chunk that all layers are called for, by either sweep."""
    calls: list[int] = []

    def counting(walk: Any) -> Any:
        def count(blocks: Any, x: Tensor, *given: Any, **named: Any) -> Any:
            calls.append(x.shape[1])
            return walk(blocks, x, *given, **named)

        return count

    for name in ("advance_layers", "replay_layers"):
        monkeypatch.setattr(sweep, name, counting(getattr(sweep, name)))
    return calls


@cache
def short_alone(name: str) -> tuple[Outcome, list[ModelState]]:
    return alone(model_of(name), "full", None, cut(random_tokens(60), SHORT), 50)


@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
@pytest.mark.parametrize("name", [*VERSIONS, *OTHERS])
def test_documents_shorter_than_a_chunk_are_computed_once(
    name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to 1e-12 in chunks, too: no memory is on a grid in between."""
    model, ids = model_of(name), random_tokens(60)
    expected, states = short_alone(name)
    calls = counted(monkeypatch)
    found = differentiate(model, strategy, 16, input_ids=ids, borders=borders_of(SHORT))
    assert sorted(calls) == [12, 16, 16, 16]
    assert found.report["tape_bytes"] == 0
    assert_near(found, expected, 1e-12)
    assert_states(found.state, states[-1], 1e-12)


@pytest.mark.parametrize("lengths", [SHORT, APART, WITH_A_LONG_ONE], ids=["short", "apart", "a long one"])
@pytest.mark.parametrize("name", [*VERSIONS, "reversible-gru", "coupled-5.2"])
def test_masks_states_embeddings_and_weights(name: str, lengths: list[int]) -> None:
    """Left padding, a hole, padding behind; a row that goes on, and hands its end on."""
    total = sum(lengths)
    model, at = model_of(name, tuned=True), borders_of(lengths)
    at[0, 0] = False
    mask = torch.ones(1, total, dtype=torch.long)
    mask[0, :2], mask[0, 20:23], mask[0, -4:] = 0, 0, 0
    embeds = torch.randn(1, total, model.config.hidden_size, dtype=torch.float64).requires_grad_()
    state = random_state(model, 1, learned=True)
    given = {
        "inputs_embeds": embeds,
        "labels": random_tokens(total),
        "attention_mask": mask,
        "borders": at,
        "state": state,
        "final_state_gradient": random_like(state),
        "loss_weights": torch.linspace(0.1, 1, total, dtype=torch.float64)[None],
    }

    def outcome(strategy: str) -> tuple[Any, list[Tensor]]:
        leaves = [embeds, *state.tensors()]
        for leaf in leaves:
            leaf.grad = None
        found = differentiate(model, strategy, 16, **given)
        return found, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    full, to_full = outcome("full")
    parts = parts_of(_inputs(at, mask.bool()), 16)
    assert len(parts) > 1
    assert any(part.holds_first and part.holds_last for part in parts) == (lengths is not APART)
    for strategy in ("reversible",) if lengths is SHORT else ("checkpoint", "reversible"):
        found, to_found = outcome(strategy)
        # the state that is given is put on its grid, and a long document's between its chunks
        tolerance = tolerance_of(name, strategy)
        assert_near(found, full, tolerance)
        assert_states(found.state, full.state, tolerance)
        for one, other in zip(to_found, to_full, strict=True):
            assert relative_error(one, other) <= tolerance


def _inputs(at: Tensor, valid: Tensor | None) -> LossInputs:
    ids = torch.zeros(at.shape, dtype=torch.long)
    found = given_borders({}, at, valid, *at.shape, fresh=True)
    borders = None if found is None else Borders(found, valid, [])
    return LossInputs(ids, None, valid, ids, 1.0, None, borders=borders)  # type: ignore[arg-type]


def test_what_is_drawn_is_drawn_once() -> None:
    """Dropout: each part has numbers of its own, whoever draws next has others, the gradient is that of the loss."""
    model, ids = model_of("5.2"), random_tokens(60)
    drawn: list[Tensor] = []

    model.model.ln_out = nn.Sequential(model.model.ln_out, nn.Dropout(0.5))
    model.model.ln_out.register_forward_hook(lambda module, given, out: drawn.append((out == 0).flatten()))
    for hook in model.model.ln_out._forward_hooks.values():
        position_wise(hook)
    torch.manual_seed(0)
    found = differentiate(model, "reversible", 16, input_ids=ids, borders=borders_of(SHORT))
    after = torch.rand(8)
    torch.manual_seed(0)
    again = differentiate(model, "checkpoint", 16, input_ids=ids, borders=borders_of(SHORT))
    assert_same_bits(found, again)
    assert torch.equal(torch.rand(8), after)
    masks = drawn[: len(drawn) // 2]
    assert not any(torch.equal(one[:64], other[:64]) for one, other in pairwise(masks))


def test_the_layout() -> None:
    assert laid_out([5, 9, 1, 12], 16) == [[3], [0, 1, 2]]
    assert laid_out([5, 40, 12, 4], 16) == [[1], [2, 3], [0]]
    at = borders_of([3, 4, 5])
    assert documents_of(Borders(at, None, [])) == [(0, 3), (3, 7), (7, 12)]
    at[0, 0] = False
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, 10:] = False
    assert documents_of(Borders(at, valid, [])) == [(0, 3), (3, 7), (7, 10)]


def test_rows_that_gain_nothing_stay_as_they_are() -> None:
    rows = borders_of([60]), borders_of([10, 50]), borders_of([9, 9, 9, 9, 9, 9, 6])
    for at in rows[:2]:
        assert len(parts_of(_inputs(at, None), 64)) == 1
    assert len(parts_of(_inputs(rows[2], None), 16)) == 1  # of seven chunks, half empty, instead of four
    assert len(parts_of(_inputs(borders_of([30, 30], [20, 40]), None), 32)) == 1


def test_gradients_of_a_row_of_many_parts() -> None:
    model, lengths = model_of("7"), [1 + (7 * each) % 13 for each in range(60)]
    ids = random_tokens(sum(lengths))
    full = differentiate(model, "full", input_ids=ids, borders=borders_of(lengths))
    found = differentiate(model, "reversible", 16, input_ids=ids, borders=borders_of(lengths))
    assert max(relative_errors(found.gradients, full.gradients).values()) < 1e-12


@position_wise
class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.count += 1
        return function(*given, **(named or {}))


@pytest.mark.parametrize("strategy", ["full", "reversible"])
@pytest.mark.parametrize("name", ["5.2", "7"])
def test_operations_do_not_grow_with_documents(
    name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call of a cell, 3 documents or 24 of them; 20 operations are allowed for all layers."""
    monkeypatch.setattr(borders, "call_cost", lambda device, width: 10**9)  # one call, as on a GPU
    model, ids = model_of(name), random_tokens(48)
    counts = []
    for lengths in ([10, 20, 18], [2] * 20 + [1, 1, 3, 3]):
        with _Count() as count:
            differentiate(model, strategy, 64, input_ids=ids, borders=borders_of(lengths))
        counts.append(count.count)
    assert counts[1] <= counts[0] + 20


@pytest.mark.parametrize("unread", [True, False])
def test_rows_moved_and_back(unread: bool) -> None:
    """As a gather's own gradient, twice."""
    to, back = torch.tensor([2, 0, 3, 0]), torch.tensor([1, 0, 0, 2])  # the second 0 is padding, 1 is nowhere
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    nowhere = torch.tensor([False, True, False, False])
    padding = torch.tensor([False, False, False, True])
    weights = torch.randn(4, 3, dtype=torch.float64)
    if unread:
        found = moved(x, to, back, None, nowhere)
        expected = x.index_select(0, to)
        weights = weights.masked_fill(padding[:, None], 0)
    else:
        found = moved(x, back, to, nowhere, padding)
        expected = x.index_select(0, back).masked_fill(nowhere[:, None], 0)
    assert torch.equal(found, expected)
    results = []
    for function in (found, expected):
        (gradient,) = torch.autograd.grad((function.square() * weights).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        results.append((gradient, second))
    torch.testing.assert_close(*results)
