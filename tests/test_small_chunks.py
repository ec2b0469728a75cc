"""Chunks of up to 32 tokens are run several at once: the same gradient, by fewer and longer chunks."""

from functools import cache
from typing import Any

import pytest
import torch
from bptt_cases import (
    Outcome,
    assert_same_bits,
    differentiate,
    grouped_errors,
    random_like,
    random_state,
    random_tokens,
    relative_errors,
    tiny_model,
)
from test_token_models import model_of

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.forecast import forecast_memory, graph_bytes, tokens_at_once

LENGTH = 135  # the last chunk is shorter, and 8 tokens are the most that a sixteenth of it holds
JOINED = {1: 8, 2: 8, 3: 6, 4: 8}
CASES = [(name, chunk) for name in ("4", "5.2", "linear-attention") for chunk in JOINED]
CASES += [("7", 1), ("7", 4), ("coupled", 1), ("reversible-lstm", 3)]


def model(name: str, dtype: torch.dtype = torch.float32) -> RwkvRevForCausalLM:
    return tiny_model(name, dtype=dtype) if name[0].isdigit() else model_of(name, dtype)


def arguments(of: RwkvRevForCausalLM) -> dict[str, Any]:
    """Holes and padding in a mask, a state to begin with, and an objective of the last one."""
    ids, mask = random_tokens(LENGTH, batch=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9], mask[0, -3:], mask[1, 40:57] = 0, 0, 0
    state = random_state(of, 2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "state": state,
        "final_state_gradient": random_like(state),
    }


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The same with states in float64."""
    states = ("state", "final_state_gradient")
    return {key: value.each(torch.Tensor.double) if key in states else value for key, value in given.items()}


@cache
def reversible(name: str, chunk: int) -> Outcome:
    """What the next tests look at, which do not change it."""
    of = model(name)
    return differentiate(of, "reversible", chunk, **arguments(of))


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_they_are_run_as_longer_chunks_to_the_bit(name: str, chunk: int) -> None:
    of = model(name)
    given, found = arguments(of), reversible(name, chunk)
    assert found.report["chunk_length"] == JOINED[chunk]
    again = differentiate(of, "checkpoint", chunk, **given)
    assert again.report["chunk_length"] == JOINED[chunk]
    assert_same_bits(found, again)
    if JOINED[chunk] > 4:  # asked for by name
        assert_same_bits(found, reversible(name, JOINED[chunk]))


def test_longer_ones_too() -> None:
    of, ids = model("5.2"), random_tokens(520)
    found = differentiate(of, "reversible", 10, input_ids=ids)
    assert found.report["chunk_length"] == 20
    assert_same_bits(found, differentiate(of, "reversible", 20, input_ids=ids))


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_the_gradient_is_that_of_the_whole_context(name: str, chunk: int) -> None:
    of, wide = model(name), model(name, torch.float64)
    given = arguments(of)
    truth = differentiate(wide, "full", **doubled(given)).gradients
    found = reversible(name, chunk).gradients
    full = differentiate(of, "full", **given).gradients
    assert grouped_errors(found, truth)["all"] <= max(1e-5, 1.5 * grouped_errors(full, truth)["all"])


@pytest.mark.parametrize("name", ["linear-attention", "coupled", "reversible-gru", "reversible-lstm"])
def test_in_float64_it_is_that_to_ten_digits(name: str) -> None:
    wide = model(name, torch.float64)
    given = {
        key: value[:, :40] if key in ("input_ids", "attention_mask") else value
        for key, value in arguments(wide).items()
    }
    truth = differentiate(wide, "full", **given).gradients
    found = differentiate(wide, "reversible", 1, **given)
    assert found.report["chunk_length"] == 2
    assert max(relative_errors(found.gradients, truth).values()) < 1e-10


@pytest.mark.parametrize("strategy", ["truncated", "reversible-lossy"])
def test_strategies_whose_gradient_depends_on_chunks_keep_them(strategy: str) -> None:
    of, ids = model("5.2"), random_tokens(32)
    assert differentiate(of, "reversible", 1, input_ids=ids).report["chunk_length"] == 2
    assert differentiate(of, strategy, 1, input_ids=ids).report["chunk_length"] == 1


def test_a_loss_of_ones_own_is_differentiated_in_the_same_pieces() -> None:
    of, ids = model("5.2"), random_tokens(LENGTH)
    seen: list[int] = []

    @position_wise
    def note(_: object, given: tuple[torch.Tensor, ...], __: object) -> None:
        seen.append(given[0].shape[1])

    of.blocks[0].register_forward_hook(note)

    def gradients(chunk: int) -> list[torch.Tensor]:
        of.zero_grad()
        with of.set_bptt("reversible", chunk_length=chunk):
            of.model(ids).last_hidden_state.square().mean().backward()
        return [p.grad.clone() for p in of.parameters() if p.grad is not None]

    joined = gradients(1)
    assert set(seen) == {8, LENGTH % 8}
    assert all(torch.equal(one, other) for one, other in zip(joined, gradients(8), strict=True))


def test_short_contexts_and_longer_chunks_stay_as_they_are() -> None:
    config = model("5.2").config
    assert tokens_at_once(config, 0, 1, 31, 1) == 1
    assert tokens_at_once(config, 0, 1, 32, 1) == 2
    joined = {1: 64, 2: 64, 3: 48, 4: 64, 5: 40, 16: 64, 31: 62, 32: 64, 33: 33, 64: 64, 100: 100}
    assert {chunk: tokens_at_once(config, 0, 1, 2**20, chunk) for chunk in joined} == joined


def test_a_graph_takes_no_more_than_512_mib_or_the_weights_or_the_states() -> None:
    config = model("4").config  # states of three numbers a channel

    def joined(rows: int, weights: int = 0) -> int:
        return tokens_at_once(config, weights, rows, 2**20, 1)

    assert joined(2**14) < joined(2**12) < joined(1) == 64
    alone, most = (graph_bytes(config, 2**14, tokens) for tokens in (1, joined(2**14)))
    assert most - alone <= 2**29 < graph_bytes(config, 2**14, 2 * joined(2**14)) - alone
    assert joined(2**14, 2**31) > joined(2**14)
    assert joined(2**24) <= 2
    large = tiny_model("5.2", hidden_size=64, head_size=64).config  # of 64 numbers
    assert tokens_at_once(large, 0, 2**16, 2**20, 1) >= 8
    assert graph_bytes(large, 2**16, 8) > 2**29


def test_the_forecast_knows_of_it() -> None:
    config = model("5.2").config

    def forecast(chunk: int) -> dict[str, int]:
        found = forecast_memory(
            config,
            [torch.full((2, 8), -0.1)] * 2,
            10**4,
            context_length=LENGTH,
            chunk_length=chunk,
            strategies=("reversible", "truncated"),
        )
        return {one.strategy: one.graph + one.tape for one in found}

    assert forecast(1)["reversible"] == forecast(8)["reversible"]
    assert forecast(1)["truncated"] < forecast(8)["truncated"]
