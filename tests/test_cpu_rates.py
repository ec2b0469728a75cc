"""RWKV-6 and 7 on the CPU against the ``rwkv`` package's sequence mode, and against a loop over tokens in PyTorch.

Both sides in turns, in one run, with the same threads; medians are compared.
"""

import statistics
import time
from pathlib import Path

import pytest
import torch
from bptt_cases import english, load

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.benchmark.cpu_compare import forward_against_rwkv
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.wkv import use_kernel

LENGTH = 1024
FORWARD, TRAINING = {"6": 1.8, "7": 2.8}, {"6": 4.0, "7": 5.0}
"""How many times as fast, at least; one thread gave 2.1 and 3.3, 5.1 and 6.7. The aim is 4 and 10."""


@pytest.mark.timing
@pytest.mark.parametrize("version", ["6", "7"])
def test_forward(version: str) -> None:
    pytest.importorskip("rwkv")
    row = forward_against_rwkv(BenchSettings(shape=f"bundled:rwkv-{version}", repeats=5), LENGTH)
    print(
        f"RWKV-{version}: {row['seconds']:.3f} s, {row['peer']} {row['peer_seconds']:.3f} s, {row['ratio']:.1f}"
    )
    assert row["ratio"] >= FORWARD[version]


def seconds(model: RwkvRevForCausalLM, tokens: torch.Tensor, kernel: str) -> float:
    model.zero_grad()
    start = time.perf_counter()
    with use_kernel(kernel), model.set_bptt("full"):
        model(tokens, labels=tokens).loss.backward()
    return time.perf_counter() - start


@pytest.mark.timing
@pytest.mark.parametrize("version", ["6", "7"])
def test_loss_and_gradients(bundled: dict[str, Path], version: str) -> None:
    model, tokens = load(bundled[version]), english(LENGTH)
    taken: dict[str, list[float]] = {"chunked": [], "naive": []}
    for _ in range(4):
        for kernel, times in taken.items():
            times.append(seconds(model, tokens, kernel))
    ours, loop = (statistics.median(times[1:]) for times in taken.values())
    print(f"RWKV-{version}: {ours:.2f} s, a loop {loop:.2f} s, {loop / ours:.1f}")
    assert loop / ours >= TRAINING[version]
