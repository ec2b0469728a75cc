"""One-shot faults: every number that both sweeps compute is compared, whatever module, call and sweep it comes from."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from bptt_cases import (
    AGREE,
    assert_agree,
    differentiate,
    random_like,
    random_state,
    random_tokens,
    tiny_model,
)
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.cells.token_shift import Border
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.foreign import search
from rwkv_rev.foreign.declared_code import position_wise

CHUNK = 6
LAYERS = 2
EXACT = ("checkpoint", "reversible")


def targets(model: RwkvRevForCausalLM) -> list[str]:
    """Modules whose output is a tensor that the context's loss depends on."""
    kinds = (nn.Linear, nn.LayerNorm, nn.Embedding)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def calls(model: RwkvRevForCausalLM, names: list[str], strategy: str, inputs: dict[str, Any]) -> Counter[str]:
    """How often each module is called in one loss."""
    heard: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(
                hooked(model, name, lambda module, given, output, name=name: heard.update([name]))
            )
        differentiate(model, strategy, CHUNK, **inputs)
    return heard


@contextmanager
def hooked(model: RwkvRevForCausalLM, name: str, hook: Any) -> Iterator[None]:
    handle = model.get_submodule(name).register_forward_hook(position_wise(hook))
    try:
        yield
    finally:
        handle.remove()


def fault(number: int, change: float = 0.01) -> Any:
    """A hook that changes one element in the ``number``-th call, from 0."""
    count = itertools.count()

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
        if next(count) != number:
            return None
        changed = output.clone()
        with torch.no_grad():
            changed.view(-1)[changed.numel() // 3] += change
        return changed

    return hook


def once_computed(name: str, number: int, chunks: int) -> bool:
    """Whether the second sweep alone computes what this call gives: the last chunk, final norm and head."""
    return name.endswith(("head", "ln_out")) or number == chunks - 1


@pytest.mark.parametrize(
    ("version", "strategy", "chunks"),
    [
        ("4", "checkpoint", 2),
        ("5.2", "reversible", 2),
        ("4", "reversible", 3),
        ("5.2", "checkpoint", 3),
        ("4", "checkpoint", 4),
        ("5.2", "reversible", 4),
    ],
)
def test_every_fault_is_found(version: str, strategy: str, chunks: int) -> None:
    """Or it hits what is computed once, where loss and gradient come from the same numbers.

    Where there are more than two chunks, the layers take turns: each call of each module of a layer is hit in one
    strategy, that of its twin in the other layer in the other strategy. Of four chunks, which have no other kind of
    chunk than three, each call of a third of the modules is hit, and each module in a third of the calls.
    """
    model = tiny_model(version, num_hidden_layers=LAYERS)
    inputs = {"input_ids": random_tokens(CHUNK * chunks, batch=2)}
    clean = differentiate(model, strategy, CHUNK, **inputs)
    found = missed = 0
    for place, (name, count) in enumerate(calls(model, targets(model), strategy, inputs).items()):
        for number in range(count):
            if chunks > 2 and f"blocks.{(number + EXACT.index(strategy)) % LAYERS}." in name:
                continue
            if chunks > 3 and (place + number // LAYERS) % 3:
                continue
            with hooked(model, name, fault(number)):
                try:
                    faulty = differentiate(model, strategy, CHUNK, **inputs)
                except ReversalMismatchError:
                    found += 1
                    continue
            changed = not torch.equal(faulty.loss, clean.loss) or any(
                not torch.equal(faulty.gradients[key], clean.gradients[key]) for key in clean.gradients
            )
            assert not changed or once_computed(name, number, chunks), (name, number)
            missed += changed
    assert found >= {2: 15 * LAYERS, 3: 15 * 2, 4: 15}[chunks] and missed


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("version", ["4", "5.2", "7"])
def test_every_fault_in_what_a_chunk_hands_on_is_found(
    version: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory after a chunk and the carried y before one, wrong once in the first sweep; or it changes nothing.

    RWKV-7's memory is lifted, but for heads that are kept whole.
    """
    model, chunks = tiny_model(version, num_hidden_layers=LAYERS), 3
    model.set_bptt("auto", remnants="lifted" if version == "7" else "auto")
    inputs = {"input_ids": random_tokens(CHUNK * chunks, batch=2)}
    clean = differentiate(model, strategy, CHUNK, **inputs)
    found = 0
    for owner, name, each in (
        (type(model.model.blocks[0].time_mix), "advance_memory", LAYERS),
        (Border, "carry", 2 * LAYERS),
    ):
        for number in range(each * (chunks - 1)):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, position_wise(faulty(getattr(owner, name), number)))
                patch.setattr(search, "is_called_everywhere", lambda *_: True)
                try:
                    outcome = differentiate(model, strategy, CHUNK, **inputs)
                except ReversalMismatchError:
                    found += 1
                    continue
            assert torch.equal(outcome.loss, clean.loss), (name, number)
            assert all(torch.equal(outcome.gradients[key], clean.gradients[key]) for key in clean.gradients)
    assert found >= 3 * LAYERS * (chunks - 1) - 1


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("version", ["4", "5.2", "7"])
def test_nan_of_the_second_sweep_alone_is_found(version: str, strategy: str) -> None:
    """Once, in what a layer computes again of the first chunk; the loss is NaN then, and the model has not diverged."""
    model, chunks = tiny_model(version, num_hidden_layers=LAYERS), 3
    inputs = {"input_ids": random_tokens(CHUNK * chunks, batch=2)}
    name = "model.blocks.0.time_mix.key"
    last = calls(model, [name], strategy, inputs)[name] - 1
    with (
        hooked(model, name, fault(last, torch.nan)),
        pytest.raises(ReversalMismatchError, match=r"layer 0 .* chunk 0"),
    ):
        differentiate(model, strategy, CHUNK, **inputs)


def faulty(original: Any, number: int) -> Any:
    """The function with one number of its result changed in its ``number``-th call, from 0."""
    calls = itertools.count()

    def function(self: Any, *given: Any) -> Any:
        result = original(self, *given)
        return nudged(result) if next(calls) == number else result

    return function


def nudged(result: Any) -> Any:
    """The y, or the memory of a pair (memory, remnant), with one number changed."""
    if isinstance(result, tuple):
        return nudged(result[0]), result[1]
    if hasattr(result, "fingerprint"):  # a memory
        first, *rest = result.tensors()
        return result.like([nudged(first), *rest])
    changed = result.clone()
    changed.view(-1)[3] += 1
    return changed


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_every_fault_in_checkpointed_blocks_is_found(version: str, strategy: str) -> None:
    """The same where blocks are recomputed once more (``gradient_checkpointing_enable``): the first layer's faults."""
    model = tiny_model(version, num_hidden_layers=LAYERS)
    model.model.gradient_checkpointing = True
    inputs = {"input_ids": random_tokens(CHUNK * 3, batch=2)}
    name = "model.blocks.0.time_mix.key"
    clean = differentiate(model, strategy, CHUNK, **inputs)
    found = []
    for number in range(calls(model, [name], strategy, inputs)[name]):
        with hooked(model, name, fault(number)):
            try:
                outcome = differentiate(model, strategy, CHUNK, **inputs)
            except ReversalMismatchError:
                found.append(number)
                continue
        assert all(torch.equal(outcome.gradients[key], clean.gradients[key]) for key in clean.gradients), (
            number
        )
    # two calls in the first sweep; of each chunk three in the second, the last chunk's first of which is without use
    assert len(found) >= 2 + 3 * 3 - 1


@pytest.mark.parametrize("strategy", ["full", *EXACT])
@pytest.mark.parametrize("source", ["Python", "numpy", "a generator of its own"])
def test_draws_in_checkpointed_blocks(source: str, strategy: str) -> None:
    """PyTorch's checkpointing sets back its own generators only: here all known ones are, and others are noticed."""
    model = tiny_model("5.2", num_hidden_layers=LAYERS)
    model.model.gradient_checkpointing = True
    own = random.Random(0)
    draw = {"Python": random.random, "numpy": np.random.rand, "a generator of its own": own.random}[source]
    scales: list[float] = []

    def scaled(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        scales.append(1 + draw())
        return output * scales[-1]

    inputs = {"input_ids": random_tokens(CHUNK, batch=2)}
    with hooked(model, "model.blocks.0.time_mix.key", scaled):
        if source == "a generator of its own":
            with pytest.raises(ReversalMismatchError, match="activation checkpointing"):
                differentiate(model, strategy, CHUNK, **inputs)
            return
        found = differentiate(model, strategy, CHUNK, **inputs)
    assert len(set(scales)) == 1, "one draw, repeated"
    model.model.gradient_checkpointing = False
    with hooked(model, "model.blocks.0.time_mix.key", lambda module, given, output: output * scales[0]):
        assert_agree(found, differentiate(model, "full", **inputs), AGREE)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("strategy", EXACT)
def test_noise_of_a_hidden_generator_is_found(strategy: str, chunks: int) -> None:
    """Noise that no captured generator explains: NEFTune-like, on the embeddings."""
    model = tiny_model("5.2")
    own = torch.Generator().manual_seed(0)

    def noise(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output + 0.1 * torch.rand(output.shape, generator=own)

    with (
        hooked(model, "model.embeddings", noise),
        pytest.raises(ReversalMismatchError, match=r"layer 0 .* chunk \d") as error,
    ):
        differentiate(model, strategy, CHUNK, input_ids=random_tokens(CHUNK * chunks))
    assert "bptt='full'" in str(error.value) and "checkpoint'" not in str(error.value)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("name", ["model.embeddings", "model.blocks.1.channel_mix.key", "head"])
def test_what_a_known_generator_draws_is_drawn_again(name: str, chunks: int) -> None:
    """Any ``torch.rand``, Python's ``random`` and numpy's: the noise is seen once, so noise and gradient fit."""
    import random

    import numpy as np

    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(CHUNK * chunks)
    drawn: list[Tensor] = []

    def noise(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        drawn.append(torch.rand(output.shape, dtype=output.dtype) * random.random() * float(np.random.rand()))
        return output + drawn[-1]

    outcomes = []
    for strategy in EXACT:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        drawn.clear()
        with hooked(model, name, noise):
            outcomes.append(differentiate(model, strategy, CHUNK, input_ids=ids))
        after = torch.rand(()), random.random(), np.random.rand()
        once = drawn[: chunks - 1] + drawn[chunks - 1 : chunks] if name != "head" else drawn[::-1]
        assert len(drawn) == (chunks if name == "head" else 2 * chunks - 1)
    one, other = outcomes
    assert torch.equal(one.loss, other.loss)
    # the same noise, given to the whole context at once
    with hooked(model, name, lambda module, given, output: output + torch.cat(once, dim=output.dim() - 2)):
        full = differentiate(model, "full", input_ids=ids)
    torch.testing.assert_close(one.loss, full.loss, rtol=1e-7, atol=0)
    for key, gradient in full.gradients.items():
        torch.testing.assert_close(one.gradients[key], gradient, rtol=1e-5, atol=1e-8)
    assert len(set(map(float, after))) == 3


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("bits", ["MT19937", "PCG64", "Philox", "SFC64"])
def test_numpy_draws_the_same_whatever_bit_generator_stands_behind_it(bits: str, strategy: str) -> None:
    model, inputs = tiny_model("5.2", num_hidden_layers=LAYERS), {"input_ids": random_tokens(CHUNK * 3)}
    drawn: list[tuple[float, float]] = []

    def scaled(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        drawn.append(
            (float(np.random.rand()), float(np.random.normal()))
        )  # the second keeps one for the next
        return output * (1 + drawn[-1][0])

    usual = np.random.get_bit_generator()  # type: ignore[attr-defined, unused-ignore]
    np.random.set_bit_generator(getattr(np.random, bits)(1))  # type: ignore[attr-defined, unused-ignore]
    try:
        with hooked(model, "model.blocks.0.time_mix.key", scaled):
            differentiate(model, strategy, CHUNK, **inputs)
    finally:
        np.random.set_bit_generator(usual)  # type: ignore[attr-defined, unused-ignore]
    first, second = drawn[:3], drawn[3:]
    assert len(set(first)) == 3 and len(second) >= 2 and set(second) <= set(first)


@pytest.mark.parametrize("strategy", EXACT)
def test_a_diverged_model_ends_in_nan(strategy: str) -> None:
    """NaN in a weight is no mismatch of the sweeps: the loss is NaN, as under ``full``."""
    for name in ("blocks.0.time_mix.key.weight", "blocks.1.channel_mix.value.weight", "ln0.bias"):
        model = tiny_model("5.2")
        with torch.no_grad():
            model.model.get_parameter(name).view(-1)[3] = torch.nan
        outcome = differentiate(model, strategy, CHUNK, input_ids=random_tokens(CHUNK * 4))
        assert outcome.loss.isnan()


def test_the_cost_of_looking(record_property: Any) -> None:
    """States of generators are kept once where nothing is drawn."""
    model, ids = tiny_model("5.2"), random_tokens(CHUNK * 15)  # fewer chunks than are run several at once
    state = random_state(model, 1, learned=True)
    kept: list[Any] = []
    from rwkv_rev.bptt import sweeps

    original = sweeps.backward_sweep

    def watched(sweep: Any, *rest: Any) -> Any:
        kept.extend(sweep.random)
        return original(sweep, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "backward_sweep", watched)
        differentiate(
            model, "reversible", CHUNK, input_ids=ids, state=state, final_state_gradient=random_like(state)
        )
    assert len(kept) == 15 and len({id(states) for states in kept}) <= 2
