"""RWKV-6 and 7 on the CPU against the ``rwkv`` package's sequence mode, and against loops over tokens in PyTorch.

Both sides in turns, in one run, on one thread each, by the least processor time of several runs: other work on the
machine changes that least. A second thread helps us alone: the package's loop over tokens has nothing for it.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bptt_cases import english, load

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.benchmark.cpu_compare import forward_against_rwkv
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.wkv import use_kernel

LENGTH = 1024
FORWARD = {"6": 3.0, "7": 4.0}
"""How many times as fast, at least. RWKV-6's is a floor below the 3.2 to 3.8 that one thread gave; the aim is 4."""
TRAINING_FLOOR = {"6": 6.0, "7": 6.5}
"""Floors as well, below 6.8 to 7.4 and 7.5 to 8.5: against a loop over the recurrence alone. The aim is 10."""
WHOLE_LOOP = 10.0
"""Of a loop in which the whole model takes a token at a time; measured were 57 to 158."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timing
@pytest.mark.parametrize("version", FORWARD)
def test_forward(version: str) -> None:
    pytest.importorskip("rwkv")
    row = forward_against_rwkv(BenchSettings(shape=f"bundled:rwkv-{version}", repeats=7), LENGTH)
    ours, theirs = row["processor_seconds"], row["peer_processor_seconds"]
    print(f"RWKV-{version}: {ours:.3f} s, {row['peer']} {theirs:.3f} s, {theirs / ours:.1f}")
    assert theirs / ours >= FORWARD[version]


def seconds(model: RwkvRevForCausalLM, tokens: torch.Tensor, kernel: str) -> float:
    model.zero_grad()
    start = time.process_time()
    with use_kernel(kernel), model.set_bptt("full"):
        model(tokens, labels=tokens).loss.backward()
    return time.process_time() - start


def token_by_token(model: RwkvRevForCausalLM, tokens: torch.Tensor) -> float:
    model.zero_grad()
    start = time.process_time()
    state, logits = None, []
    with model.set_bptt("full"):
        for token in tokens.split(1, dim=1):
            out = model(token, state=state)
            state, logits = out.state, [*logits, out.logits]
        torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1], tokens[0, 1:]).backward()
    return time.process_time() - start


@pytest.mark.timing
@pytest.mark.parametrize("version", ["6", "7"])
def test_loss_and_gradients_against_the_whole_model_token_by_token(
    bundled: dict[str, Path], version: str
) -> None:
    model, tokens = load(bundled[version]), english(LENGTH)
    ours = min(seconds(model, tokens, "chunked") for _ in range(4))
    loop = token_by_token(model, tokens)
    print(f"RWKV-{version}: {ours:.2f} s, token by token {loop:.2f} s, {loop / ours:.1f}")
    assert loop / ours >= WHOLE_LOOP


@pytest.mark.timing
@pytest.mark.parametrize("version", ["6", "7"])
def test_loss_and_gradients_stay_above_their_floor(bundled: dict[str, Path], version: str) -> None:
    """Against a loop over the tokens of the recurrence alone."""
    model, tokens = load(bundled[version]), english(LENGTH)
    taken: dict[str, list[float]] = {"chunked": [], "naive": []}
    for _ in range(4):
        for kernel, times in taken.items():
            times.append(seconds(model, tokens, kernel))
    ours, loop = (min(times[1:]) for times in taken.values())
    print(f"RWKV-{version}: {ours:.2f} s, a loop {loop:.2f} s, {loop / ours:.1f}")
    assert loop / ours >= TRAINING_FLOOR[version]
