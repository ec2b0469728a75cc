"""What stands at masked tokens of packed rows: that of their documents alone, wherever chunks begin.

A loss of somebody's own may look at it: a z-loss over all logits, a mean of hidden states. A masked token belongs to
the document before it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from bptt_cases import random_state, random_tokens, relative_error
from test_borders import model_of
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.state import ModelState

T = 27
IDS = random_tokens(T, batch=2)
BORDERS = ([4, 11, 18], [13])
MASKED: dict[str, tuple[list[int], list[int]]] = {
    "right": ([*range(20, T)], [*range(12, 13), *range(16, T)]),
    "left": ([0, 1, 2], [*range(9)]),
    "holes": ([5, 6, 12, 19, 24], [14, 15, 20]),
    "at borders": ([3, 5, 8, 9, 10, 19], [*range(6, 13), 14]),
    "a whole row": ([10, 20], [*range(T)]),
}
"""Of each row; chunks of 5 tokens hold none, some and only masked ones, with a border and without."""
CHUNK = 5


def valid_of(name: str) -> Tensor:
    valid = torch.ones(2, T, dtype=torch.bool)
    for row, places in enumerate(MASKED[name]):
        valid[row, places] = False
    return valid


def borders_of(valid: Tensor) -> Tensor:
    at = torch.zeros(2, T, dtype=torch.bool)
    for row, places in enumerate(BORDERS):
        at[row, places] = True
    return at & valid


def state_of(model: RwkvRevForCausalLM) -> ModelState:
    return random_state(model, 2).each(lambda t: t.detach().clone().requires_grad_())


def alone(model: RwkvRevForCausalLM, valid: Tensor, state: ModelState) -> tuple[Tensor, list[Tensor]]:
    """Logits and final state, every document with the masked tokens behind it in a row of its own."""
    rows, ends = [], []
    for row, at in enumerate(borders_of(valid)):
        parts, after = [], state.rows(torch.tensor([row]))
        for number, (start, stop) in enumerate(pairwise([0, *at.nonzero().flatten().tolist(), T])):
            if stop > start:
                given = {} if number else {"state": after}
                part = slice(start, stop)
                output = model(IDS[row : row + 1, part], attention_mask=valid[row : row + 1, part], **given)
                parts.append(output.logits)
                after = output.state
        rows.append(torch.cat(parts, dim=1))
        ends.append(after.tensors())
    return torch.cat(rows), [torch.cat(parts, dim=1) for parts in zip(*ends, strict=True)]


def gradients(
    model: RwkvRevForCausalLM, state: ModelState, read: Callable[[], tuple[Tensor, list[Tensor]]]
) -> dict[str, Tensor]:
    """Of a z-loss over all logits and the final state, by the parameters and the state before; and the logits."""
    model.zero_grad()
    for tensor in state.tensors():
        tensor.grad = None
    logits, end = read()
    (logits.logsumexp(-1).square().mean() + sum(part.tanh().mean() for part in end)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    of_state = zip(state.names(), state.tensors(), strict=True)
    return {"logits": logits.detach(), **found, **{f"state.{n}": t.grad.clone() for n, t in of_state}}


@pytest.mark.parametrize("masked", list(MASKED))
@pytest.mark.parametrize("name", ["4", "5.2", "6", "7", "coupled-5.2", "linear-attention", "reversible-gru"])
def test_logits_and_gradients_at_masked_tokens(name: str, masked: str) -> None:
    model, valid = model_of(name), valid_of(masked)
    state, at = state_of(model), borders_of(valid)
    with model.set_bptt("full"):
        expected = gradients(model, state, lambda: alone(model, valid, state))

    def read() -> tuple[Tensor, list[Tensor]]:
        output = model(IDS, attention_mask=valid, borders=at, state=state)
        return output.logits, output.state.tensors()

    for strategy, chunk in (("full", None), ("checkpoint", 14), ("reversible", CHUNK)):
        with model.set_bptt(strategy, chunk_length=chunk):
            found = gradients(model, state, read)
            with torch.no_grad():
                assert relative_error(read()[0], expected["logits"]) < 1e-9
        assert found.keys() == expected.keys()
        for key, wanted in expected.items():
            assert relative_error(found[key], wanted) < 1e-9, (strategy, chunk, key)


@pytest.mark.parametrize("name", ["5.2", "7"])
def test_states_of_documents_that_end_in_padding(name: str) -> None:
    model, valid = model_of(name), valid_of("at borders")
    given: dict[str, Any] = {"attention_mask": valid, "borders": borders_of(valid)}
    found = []
    for chunk in (None, CHUNK, 2):
        with torch.no_grad(), model.set_bptt("reversible", chunk_length=chunk):
            found.append(model(IDS, **given, return_document_states=True).document_states)
    for state in found[1:]:
        for one, other in zip(state.tensors(), found[0].tensors(), strict=True):
            assert relative_error(one, other) < 1e-9


def test_other_names_for_borders() -> None:
    model, valid = model_of("5.2"), valid_of("right")[:1]
    starts = [0, *BORDERS[0], T]
    lengths = [stop - start for start, stop in pairwise(starts)]
    names: dict[str, Tensor] = {
        "borders": borders_of(valid_of("right"))[:1],
        "cu_seq_lens_q": torch.tensor(starts),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
    }
    found = []
    for name, given in names.items():
        for chunk in (None, CHUNK):
            with model.set_bptt("reversible", chunk_length=chunk):
                found.append(model(IDS[:1], attention_mask=valid, **{name: given}).logits.detach())
    for logits in found[1:]:
        assert relative_error(logits, found[0]) < 1e-9
