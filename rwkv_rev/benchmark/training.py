"""Seconds, memory and tape of one loss and its gradients, by strategy and context length.

One *step* is ``model(ids, labels=ids).loss.backward()`` without optimizer: what the gradient strategies differ in.
Strategies that are compared take turns within one run, and the median of the repeats is reported.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.benchmark.models import matrix_parameters
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.modeling import RwkvRevForCausalLM


def random_tokens(model: RwkvRevForCausalLM, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [B, T] on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def step(model: RwkvRevForCausalLM, ids: Tensor) -> tuple[float, dict[str, Any]]:
    """Seconds of one loss and its gradients, and the strategy's report. Gradients are dropped afterwards.

    ``cpu_seconds`` of the report are those the process computed, whatever else ran on the machine: with one thread,
    the time to compare on a machine that is shared.
    """
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    output = model(ids, labels=ids)
    output.loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    report = dict(output.report or {}) | {"cpu_seconds": time.process_time() - start_cpu}
    report["loss"] = output.loss.item()
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

    On CUDA each timed step follows two like it, as every step of a run but its first ones does: recordings of
    launches are made in the second.
    Memory is ``max_memory_allocated`` and ``max_memory_reserved`` on CUDA (parameters and gradients included),
    absent on the CPU.
    """
    ids = random_tokens(model, batch_size, length)
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in settings}
    cpu_times: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(warmup + repeats):
        for name, setting in settings.items():
            if name in rows and "error" in rows[name]:
                continue
            if ids.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                with model.set_bptt(**setting):
                    # or the driver's handing out of memory would be timed, and recordings
                    for _ in range(2 if ids.is_cuda else 0):
                        step(model, ids)
                    seconds, report = step(model, ids)
            except torch.cuda.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                limit = torch.cuda.get_device_properties(ids.device).total_memory
                rows[name] = {
                    "setting": name, "tokens": length, "error": "out of memory", "limit_bytes": limit,
                }  # fmt: skip
                continue
            if turn >= warmup:
                times[name].append(seconds)
                cpu_times[name].append(report["cpu_seconds"])
            rows[name] = {"setting": name, "tokens": length, **report}
            if ids.is_cuda:
                rows[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
                rows[name]["reserved_bytes"] = torch.cuda.max_memory_reserved()
    flops = 6 * matrix_parameters(model) * batch_size * length
    for name, row in rows.items():
        if times[name]:
            seconds = statistics.median(times[name])
            row["cpu_seconds"] = statistics.median(cpu_times[name])
            row.update(
                seconds=seconds, tokens_per_second=batch_size * length / seconds, model_flops=flops / seconds
            )
    return list(rows.values())


def matrix_product_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a large square matrix product: what utilisation is measured by."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for turn in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn > 1:
            times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def training_rows(
    settings: BenchSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """:func:`compare` at every context length, with ratios.

    Adds to each row ``ratio_to_full`` (seconds over those of ``full`` at the same length, where that fits),
    ``cpu_ratio_to_full`` (the same of the process's own seconds) and
    ``matmul_utilisation``: model operations per second (6 per weight and token; what is computed twice counts once)
    over the rate of one large matrix product in the same run. With low-rank additions the weights' own gradients are
    not computed, so there it is 4 per weight and token, and the additions are not counted.
    """
    model = settings.model()
    rate = matrix_product_rate(settings.device, settings.dtype)
    left = settings.bptt()
    rows = []
    for length in settings.lengths:
        found = compare(model, length, left, batch_size=settings.batch_size, repeats=settings.repeats)
        full = next((row for row in found if row["setting"] == "full" and "seconds" in row), None)
        for row in found:
            asked = left[row["setting"]]
            row.update({name: asked.get(name) for name in ("strategy", "tape")})
            if asked.get("chunk_length") != AUTO:  # else what it came to is there
                row["chunk_length"] = asked.get("chunk_length")
            if "seconds" in row:
                if settings.lora_rank:
                    row["model_flops"] *= 4 / 6
                row["matmul_utilisation"] = row["model_flops"] / rate
                if full is not None:
                    row["ratio_to_full"] = row["seconds"] / full["seconds"]
                    row["cpu_ratio_to_full"] = row["cpu_seconds"] / full["cpu_seconds"]
            on_row(row)
        left = {row["setting"]: left[row["setting"]] for row in found if "error" not in row}
        rows += found
    return rows
