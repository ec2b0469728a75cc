"""Strategies under autocast and in models that are half precision throughout, on the CPU.

Half precision gradients cannot agree with ``full`` closely, since chunks round differently; so ``reversible`` is held
to the bits of ``checkpoint``, and to a distance from float64 not much beyond that of ``full``.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from bptt_cases import (
    AS_CLOSE,
    VERSIONS,
    Outcome,
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    english,
    grouped_errors,
    load,
    random_like,
    random_state,
    random_tokens,
    tiny_model,
)

HALVES = [torch.bfloat16, torch.float16]
TRAINED_LENGTH = 140
FARTHEST = {torch.bfloat16: 0.1, torch.float16: 0.01}
"""Relative RMS distance from float64 of the whole gradient: some 10 units of the format's rounding."""


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


@cache
def truth_of_random(version: str) -> Outcome:
    """In float64."""
    tokens = random_tokens(70, batch=3)
    return differentiate(tiny_model(version, dtype=torch.float64), "full", input_ids=tokens)


@pytest.fixture(scope="module")
def truth_of_trained(shallow: dict[str, Path]) -> Callable[[str], Outcome]:
    """In float64, on the text of the tests that take it."""
    return cache(
        lambda version: differentiate(
            load(shallow[version], torch.float64), "full", input_ids=english(TRAINED_LENGTH)
        )
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("version", VERSIONS)
def test_autocast(version: str, dtype: torch.dtype) -> None:
    """Equal bits from both exact tapes, as near to float64 as ``full`` under the same autocast."""
    model, tokens = tiny_model(version), random_tokens(70, batch=3)
    truth = truth_of_random(version)
    with autocast(dtype):
        full = differentiate(model, "full", input_ids=tokens)
        checkpoint = differentiate(model, "checkpoint", 16, input_ids=tokens)
        reversible = differentiate(model, "reversible", 16, input_ids=tokens)
    assert_same_bits(reversible, checkpoint)
    assert reversible.loss.dtype == torch.float32
    least = grouped_errors(full.gradients, truth.gradients)["all"]
    error = grouped_errors(reversible.gradients, truth.gradients)["all"]
    assert error <= max(AS_CLOSE * least, FARTHEST[dtype] / 10)
    assert error <= FARTHEST[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_autocast_on_the_bundled_checkpoints(
    shallow: dict[str, Path], truth_of_trained: Callable[[str], Outcome], version: str, dtype: torch.dtype
) -> None:
    model, tokens = load(shallow[version]), english(TRAINED_LENGTH)
    truth = truth_of_trained(version)
    with autocast(dtype):
        full = differentiate(model, "full", input_ids=tokens)
        checkpoint = differentiate(model, "checkpoint", 64, input_ids=tokens)
        reversible = differentiate(model, "reversible", 64, input_ids=tokens)
    assert_same_bits(reversible, checkpoint)
    least = grouped_errors(full.gradients, truth.gradients)["all"]
    assert grouped_errors(reversible.gradients, truth.gradients)["all"] <= AS_CLOSE * least


@pytest.mark.parametrize("dtype", HALVES)
def test_everything_at_once(dtype: torch.dtype) -> None:
    """Masks with holes, an initial state, a gradient at the final state and checkpointed blocks under autocast."""
    model, tokens = tiny_model("5.2"), random_tokens(40, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :9], mask[1, 12:19] = 0, 0
    outcomes = []
    for strategy, recompute in (("checkpoint", False), ("reversible", False), ("reversible", True)):
        state = random_state(model, 2, learned=True)
        model.model.gradient_checkpointing = False
        if recompute:
            checkpoint_blocks(model)
        with autocast(dtype):
            found = differentiate(
                model,
                strategy,
                8,
                input_ids=tokens,
                attention_mask=mask,
                state=state,
                final_state_gradient=random_like(state),
            )
        outcomes.append((found, [tensor.grad for tensor in state.tensors()]))
    for found, state_gradients in outcomes[1:]:
        assert_same_bits(found, outcomes[0][0])
        for gradient, expected in zip(state_gradients, outcomes[0][1], strict=True):
            assert torch.equal(gradient, expected)


@pytest.mark.parametrize("strategy", ["full", "auto", "checkpoint", "reversible"])
def test_float16_gradients_do_not_underflow(strategy: str) -> None:
    """A loss so small that its float16 gradients would vanish without a scale inside; there is no GradScaler."""
    model, tokens = tiny_model("5.2"), random_tokens(60)
    inputs = {"input_ids": tokens, "num_items_in_batch": 60_000_000}
    truth = differentiate(model, "full", **inputs)
    with autocast(torch.float16):
        found = differentiate(model, strategy, 16, **inputs)
    error = grouped_errors(found.gradients, truth.gradients)["all"]
    assert error < FARTHEST[torch.float16]


def test_float16_gradients_do_not_overflow() -> None:
    """Gradients beyond 65504 under the inner scale: it is lowered until they are finite."""
    model, tokens = tiny_model("5.2"), random_tokens(60)
    inputs = {"input_ids": tokens, "num_items_in_batch": 1}
    truth = differentiate(model, "full", **inputs)
    with autocast(torch.float16):
        checkpoint = differentiate(model, "checkpoint", 16, **inputs)
        found = differentiate(model, "reversible", 16, **inputs)
    assert grouped_errors(found.gradients, truth.gradients)["all"] < FARTHEST[torch.float16]
    assert_same_bits(found, checkpoint)


@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_grad_scaler(strategy: str) -> None:
    """float16 training with PyTorch's GradScaler: unscaled gradients and a step that lowers the loss."""
    model, tokens = tiny_model("5.2"), random_tokens(60)
    truth = differentiate(model, "full", input_ids=tokens)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.set_bptt(strategy, chunk_length=16)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        with autocast(torch.float16):
            loss = model(tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            assert grouped_errors(gradients, truth.gradients)["all"] < FARTHEST[torch.float16]
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_pure_bfloat16(
    shallow: dict[str, Path], truth_of_trained: Callable[[str], Outcome], version: str
) -> None:
    """A model loaded in bfloat16: decays stay float32, gradients have their parameters' dtype."""
    model, tokens = load(shallow[version], torch.bfloat16), english(TRAINED_LENGTH)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.blocks[0].time_mix.time_decay.dtype == torch.float32
    truth = truth_of_trained(version)
    full = differentiate(model, "full", input_ids=tokens)
    checkpoint = differentiate(model, "checkpoint", 64, input_ids=tokens)
    reversible = differentiate(model, "reversible", 64, input_ids=tokens)
    assert_same_bits(reversible, checkpoint)
    for name, parameter in model.named_parameters():
        assert reversible.gradients[name].dtype == parameter.dtype
    least = grouped_errors(full.gradients, truth.gradients)["all"]
    assert grouped_errors(reversible.gradients, truth.gradients)["all"] <= AS_CLOSE * least


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_of_a_half_model(shallow: dict[str, Path], dtype: torch.dtype) -> None:
    """Half weights under autocast of the same format, as some trainers do."""
    model, tokens = load(shallow["5.2"], dtype), english(TRAINED_LENGTH)
    with autocast(dtype):
        checkpoint = differentiate(model, "checkpoint", 64, input_ids=tokens)
        reversible = differentiate(model, "reversible", 64, input_ids=tokens)
    assert_same_bits(reversible, checkpoint)
    assert all(torch.isfinite(gradient).all() for gradient in reversible.gradients.values())
