"""Seconds, memory and tape of one loss and its gradients, by strategy and context length.

One *step* is ``model(ids, labels=ids).loss.backward()`` without optimizer: what the gradient strategies differ in.
Strategies that are compared take turns within one run, and the median of the repeats is reported.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.benchmark.models import matrix_parameters
from rwkv_rev.modeling import RwkvRevForCausalLM


def random_tokens(model: RwkvRevForCausalLM, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [B, T] on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def step(model: RwkvRevForCausalLM, ids: Tensor) -> tuple[float, dict[str, Any]]:
    """Seconds of one loss and its gradients, and the strategy's report. Gradients are dropped afterwards."""
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = model(ids, labels=ids)
    output.loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    report = dict(output.report or {}) | {"loss": output.loss.item()}
    model.zero_grad(set_to_none=True)
    return seconds, report


def compare(
    model: RwkvRevForCausalLM,
    length: int,
    settings: dict[str, dict[str, Any]],
    *,
    batch_size: int = 1,
    repeats: int = 3,
    warmup: int = 1,
) -> list[dict[str, Any]]:
    """One row per setting (arguments of ``set_bptt``), in turns: seconds, tokens/s, memory, tape.

    Memory is ``max_memory_allocated`` on CUDA (parameters and gradients included), absent on the CPU.
    """
    ids = random_tokens(model, batch_size, length)
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(warmup + repeats):
        for name, setting in settings.items():
            if name in rows and "error" in rows[name]:
                continue
            if ids.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                with model.set_bptt(**setting):
                    seconds, report = step(model, ids)
            except torch.cuda.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                rows[name] = {"setting": name, "tokens": length, "error": "out of memory"}
                continue
            if turn >= warmup:
                times[name].append(seconds)
            rows[name] = {"setting": name, "tokens": length, **report}
            if ids.is_cuda:
                rows[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    flops = 6 * matrix_parameters(model) * batch_size * length
    for name, row in rows.items():
        if times[name]:
            seconds = statistics.median(times[name])
            row.update(
                seconds=seconds, tokens_per_second=batch_size * length / seconds, model_flops=flops / seconds
            )
    return list(rows.values())
