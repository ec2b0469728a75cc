"""Two sweeps that compute different numbers are noticed, and named, before any gradient is returned."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, assert_same_bits, differentiate, random_tokens, tiny_model
from torch import Tensor, nn

from rwkv_rev import random_state
from rwkv_rev.cells import time_mix_rwkv4, time_mix_rwkv5, time_mix_rwkv6, time_mix_rwkv7
from rwkv_rev.errors import ReversalMismatchError, StrategyError
from rwkv_rev.foreign.declared_code import position_wise

LAYERS = 3
CHUNKS = 6
CHUNK = 8


def nudged(tensor: Tensor) -> Tensor:
    """One element one unit in the last place away, as a race between threads would leave it."""
    flat = tensor.clone().flatten()
    place = int(flat.detach().abs().argmax())
    with torch.no_grad():
        flat[place] = torch.nextafter(flat[place], torch.tensor(torch.inf))
    return flat.view_as(tensor)


def disturb_call(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, change: Callable[[Any], Any]
) -> None:
    """Change the result of the ``number``-th call, from 0, of ``module.name``."""
    kernel, calls = getattr(module, name), itertools.count()

    def unreliable(*arguments: Any, **options: Any) -> Any:
        result = kernel(*arguments, **options)
        return change(result) if next(calls) == number else result

    monkeypatch.setattr(module, name, unreliable)


def reversed_calls(layer: int, chunk: int) -> int:
    """Calls of one sweep that rebuilds the inner chunks, last to first, before the one of this layer and chunk."""
    return (CHUNKS - 2 - chunk) * LAYERS + layer


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
@pytest.mark.parametrize(("layer", "chunk"), [(0, 4), (1, 2), (2, 1)])
def test_an_unreliable_kernel_rwkv5(
    monkeypatch: pytest.MonkeyPatch, version: str, layer: int, chunk: int
) -> None:
    """The contribution that the state is reversed with, off by one unit in the last place."""
    model, tokens = tiny_model(version, num_hidden_layers=LAYERS), random_tokens(CHUNK * CHUNKS, batch=2)
    number = reversed_calls(layer, chunk)
    disturb_call(monkeypatch, time_mix_rwkv5, "wkv5_contribution", number, nudged)
    with pytest.raises(
        ReversalMismatchError, match=rf"layer {layer} computed .* chunk {chunk} .*non-deterministic"
    ) as e:
        differentiate(model, "reversible", CHUNK, input_ids=tokens)
    assert "\n" not in str(e.value)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("layer", "chunk"), [(0, 4), (1, 2), (2, 1)])
def test_an_unreliable_kernel_rwkv4(monkeypatch: pytest.MonkeyPatch, layer: int, chunk: int) -> None:
    """RWKV-4 keeps its states whole: what is checked is that the recomputed chunk ends where it ended before."""
    model, tokens = tiny_model("4", num_hidden_layers=LAYERS), random_tokens(CHUNK * CHUNKS, batch=2)
    # the forward sweep leaves the last chunk out, the backward sweep begins with it
    number = (CHUNKS - 1) * LAYERS + LAYERS + reversed_calls(layer, chunk)
    disturb_call(monkeypatch, time_mix_rwkv4, "wkv4", number, lambda result: (result[0], nudged(result[1])))
    with pytest.raises(
        ReversalMismatchError, match=rf"layer {layer} computed .* chunk {chunk} .*non-deterministic"
    ):
        differentiate(model, "reversible", CHUNK, input_ids=tokens)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_kernel_that_never_gives_the_same(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Noise in every call, outputs and states alike."""
    model, tokens = tiny_model(version), random_tokens(CHUNK * CHUNKS)
    own_kernels = {
        "4": (time_mix_rwkv4, "wkv4"),
        "6": (time_mix_rwkv6, "wkv6"),
        "7": (time_mix_rwkv7, "wkv7"),
    }
    module, name = own_kernels.get(version, (time_mix_rwkv5, "wkv5"))
    kernel, own = getattr(module, name), torch.Generator()

    def noisy(*arguments: Any, **options: Any) -> Any:
        return tuple(
            part * (1 + 1e-3 * torch.rand((), generator=own)) for part in kernel(*arguments, **options)
        )

    monkeypatch.setattr(module, name, noisy)
    with pytest.raises(ReversalMismatchError, match=r"layer \d+ computed other numbers for chunk \d+"):
        differentiate(model, "reversible", CHUNK, input_ids=tokens)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_weight_changed_between_the_sweeps(version: str, counted: bool) -> None:
    """Something that writes to a weight while the loss is computed; where PyTorch counts that, it is named."""
    model, tokens = tiny_model(version), random_tokens(CHUNK * CHUNKS)
    calls = itertools.count()

    @position_wise
    def meddle(module: nn.Module, inputs: Any) -> None:
        if next(calls) == CHUNKS + 1:
            weight = model.blocks[0].time_mix.key.weight
            with torch.no_grad():
                (weight if counted else weight.data).mul_(1.01)

    handle = model.blocks[0].time_mix.key.register_forward_pre_hook(meddle)
    words = r"model\.blocks\.0\.time_mix\.key\.weight was written to" if counted else "changes weights"
    with pytest.raises(StrategyError if counted else ReversalMismatchError, match=words):
        differentiate(model, "reversible", CHUNK, input_ids=tokens)
    handle.remove()


@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_that_is_not_replayed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Dropout inside the model, and a random generator that is not set back for the second sweep."""
    model, tokens = tiny_model(version), random_tokens(CHUNK * CHUNKS)
    linear = model.blocks[0].time_mix.key
    model.blocks[0].time_mix.key = nn.Sequential(nn.Dropout(0.2), linear)
    torch.manual_seed(0)
    checkpoint = differentiate(model, "checkpoint", CHUNK, input_ids=tokens)
    torch.manual_seed(0)
    assert_same_bits(differentiate(model, "reversible", CHUNK, input_ids=tokens), checkpoint)
    monkeypatch.setattr(random_state, "restore", lambda states: None)
    with pytest.raises(ReversalMismatchError, match="draws from a generator"):
        differentiate(model, "reversible", CHUNK, input_ids=tokens)


def test_the_model_is_usable_after_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error leaves nothing behind: the next call gives the right gradient."""
    model, tokens = tiny_model("5.2"), random_tokens(CHUNK * CHUNKS)
    expected = differentiate(model, "checkpoint", CHUNK, input_ids=tokens)
    with monkeypatch.context() as patch:
        disturb_call(patch, time_mix_rwkv5, "wkv5_contribution", 3, lambda u: u + 1)
        with pytest.raises(ReversalMismatchError):
            differentiate(model, "reversible", CHUNK, input_ids=tokens)
    assert_same_bits(differentiate(model, "reversible", CHUNK, input_ids=tokens), expected)
