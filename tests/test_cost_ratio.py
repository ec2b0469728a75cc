"""What ``reversible`` costs: forward and backward pass against ``full`` at the same context, in one run.

One more forward pass without head is 4/3 of ordinary training where products dominate. Both strategies are timed in
turns, so that other work on the machine meets both alike, and their medians compared.
"""

import statistics
import time
from pathlib import Path

import pytest
import torch
from bptt_cases import english, load, tiny_model

from rwkv_rev import RwkvRevForCausalLM

MOST = 1.40
REPEATS = 7


def seconds(model: RwkvRevForCausalLM, strategy: str, tokens: torch.Tensor, chunk: int) -> float:
    model.zero_grad()
    start = time.process_time()
    with model.set_bptt(strategy, chunk_length=chunk):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return time.process_time() - start


def ratio(model: RwkvRevForCausalLM, length: int, chunk: int) -> float:
    """Median processor seconds of ``reversible`` over those of ``full``."""
    tokens = english(length)
    taken: dict[str, list[float]] = {"full": [], "reversible": []}
    for _ in range(REPEATS + 1):
        for strategy, times in taken.items():
            times.append(seconds(model, strategy, tokens, chunk))
    full, reversible = (statistics.median(times[1:]) for times in taken.values())
    print(
        f"T={length} C={chunk}: full {full:.2f} s, reversible {reversible:.2f} s, ratio {reversible / full:.3f}"
    )
    return reversible / full


@pytest.mark.timing
@pytest.mark.parametrize("chunk", [512, 1024])
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_cost_on_the_bundled_checkpoints(bundled: dict[str, Path], version: str, chunk: int) -> None:
    """Width 128, where everything but the products weighs most."""
    assert ratio(load(bundled[version]), 4096, chunk) <= MOST


@pytest.mark.timing
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_cost_at_a_usual_width(version: str) -> None:
    """Width 512, where products weigh as they do in larger models."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1792, "vocab_size": 4096}
    if version != "4":
        sizes["head_size"] = 64
    assert ratio(tiny_model(version, **sizes), 2048, 512) <= MOST
