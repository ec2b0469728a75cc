"""Chunks of up to 32 tokens are run several at once: the same gradient, by fewer and longer chunks."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
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

from rwkv_rev import RwkvRevForCausalLM, forecast, position_wise
from rwkv_rev.forecast import forecast_memory, graph_bytes, tokens_at_once

LENGTH = 135  # the last chunk is shorter, and 8 tokens are the most that a sixteenth of it holds
JOINED = {1: 64, 2: 64, 3: 48, 4: 64}
CASES = [("5.2", chunk) for chunk in JOINED]
CASES += [("4", 1), ("4", 3), ("linear-attention", 2), ("linear-attention", 3)]
CASES += [("7", 1), ("7", 4), ("coupled", 1), ("reversible-lstm", 3)]


@pytest.fixture(scope="module", autouse=True)
def tiny_chunks_are_joined() -> Iterator[None]:
    """As they are outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "TINY_CHUNK", 4)
        yield


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


@cache
def as_one_graph(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of ``full`` in float64 and in float32."""
    of, wide = model(name), model(name, torch.float64)
    given = arguments(of)
    truth = differentiate(wide, "full", **doubled(given)).gradients
    return truth, differentiate(of, "full", **given).gradients


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_they_are_run_as_longer_chunks_to_the_bit(name: str, chunk: int) -> None:
    of = model(name)
    given, found = arguments(of), reversible(name, chunk)
    assert found.report["chunk_length"] == JOINED[chunk]
    again = differentiate(of, "checkpoint", chunk, **given)
    assert again.report["chunk_length"] == JOINED[chunk]
    assert_same_bits(found, again)
    assert_same_bits(found, reversible(name, JOINED[chunk]))  # asked for by name


def test_longer_ones_too() -> None:
    of, ids = model("5.2"), random_tokens(330)
    found = differentiate(of, "reversible", 10, input_ids=ids)
    assert found.report["chunk_length"] == 20
    assert_same_bits(found, differentiate(of, "reversible", 20, input_ids=ids))


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_the_gradient_is_that_of_the_whole_context(name: str, chunk: int) -> None:
    truth, full = as_one_graph(name)
    found = reversible(name, chunk).gradients
    assert grouped_errors(found, truth)["all"] <= max(1e-5, 1.5 * grouped_errors(full, truth)["all"])


@pytest.mark.parametrize("name", ["linear-attention", "coupled", "reversible-gru", "reversible-lstm"])
def test_in_float64_it_is_that_to_ten_digits(name: str) -> None:
    wide = model(name, torch.float64)
    given = {
        key: value[:, :80] if key in ("input_ids", "attention_mask") else value
        for key, value in arguments(wide).items()
    }
    truth = differentiate(wide, "full", **given).gradients
    found = differentiate(wide, "reversible", 3, **given)
    assert found.report["chunk_length"] == 48
    assert max(relative_errors(found.gradients, truth).values()) < 1e-10


@pytest.mark.parametrize("name", ["4", "5.2", "7", "linear-attention", "coupled"])
def test_documents_packed_into_rows(name: str) -> None:
    """Borders wherever they are: those of documents shorter than what is run at once, too."""
    of = model(name)
    ends = [0, 3, 61, 64, 100, LENGTH]
    documents = torch.cat([torch.full((stop - start,), n) for n, (start, stop) in enumerate(pairwise(ends))])
    given = {"input_ids": random_tokens(LENGTH, batch=2), "seq_idx": documents.expand(2, -1)}
    found = differentiate(of, "reversible", 2, **given)
    assert found.report["chunk_length"] == 64
    assert_same_bits(found, differentiate(of, "checkpoint", 2, **given))
    assert_same_bits(found, differentiate(of, "reversible", 64, **given))
    truth = differentiate(model(name, torch.float64), "full", **given)
    full = grouped_errors(differentiate(of, "full", **given).gradients, truth.gradients)["all"]
    assert grouped_errors(found.gradients, truth.gradients)["all"] <= max(1e-5, 1.5 * full)


@pytest.mark.parametrize("strategy", ["truncated", "reversible-lossy"])
def test_strategies_whose_gradient_depends_on_chunks_keep_them(strategy: str) -> None:
    of, ids = model("5.2"), random_tokens(32)
    assert differentiate(of, "reversible", 1, input_ids=ids).report["chunk_length"] == 64
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
    assert set(seen) == {64, LENGTH % 64}
    assert all(torch.equal(one, other) for one, other in zip(joined, gradients(64), strict=True))


@pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65])
def test_a_context_shorter_than_what_is_run_at_once(length: int) -> None:
    of, ids = model("5.2"), random_tokens(length)
    found = differentiate(of, "reversible", 1, input_ids=ids)
    assert_same_bits(found, differentiate(of, "checkpoint", 1, input_ids=ids))
    assert_same_bits(found, differentiate(of, "reversible", 64, input_ids=ids))


def test_up_to_4_tokens_in_every_context_and_longer_ones_in_long_ones() -> None:
    config = model("5.2").config
    assert {chunk: tokens_at_once(config, 0, 1, 65, chunk) for chunk in JOINED} == JOINED
    assert tokens_at_once(config, 0, 1, 159, 5) == 5
    assert tokens_at_once(config, 0, 1, 160, 5) == 10
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

    def needed(chunk: int, length: int = LENGTH) -> dict[str, int]:
        found = forecast_memory(
            config,
            [torch.full((2, 8), -0.1)] * 2,
            10**4,
            context_length=length,
            chunk_length=chunk,
            strategies=("reversible", "truncated"),
        )
        return {one.strategy: one.graph + one.tape for one in found}

    assert needed(1)["reversible"] == needed(64)["reversible"]
    assert needed(1, 40)["reversible"] == needed(40, 40)["reversible"] < needed(1)["reversible"]
    assert needed(1)["truncated"] < needed(8)["truncated"]
