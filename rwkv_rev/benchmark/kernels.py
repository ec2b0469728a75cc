"""Time and error of the recurrences on this machine's CUDA device.

    python benchmarks/kernels.py [--json FILE] [--kernel triton] [--profile]

For each shape: the first call (compilation included), then medians of queued calls by CUDA events of forward and of
forward + backward, the least memory traffic any implementation has (every input read, every output written, once
per direction), and the relative RMS errors of results and gradients against the naive float64 recurrence, on the
keys, values and decays of the first layer of the bundled checkpoints.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkv_rev.bundled
from rwkv_rev import wkv
from rwkv_rev.wkv import EMPTY_EXPONENT, naive

SHAPES: list[tuple[str, tuple[int, ...], torch.dtype]] = [
    ("wkv5", (8, 4096, 32, 64), torch.bfloat16),
    ("wkv5", (1, 32768, 32, 64), torch.bfloat16),
    ("wkv5", (1, 4096, 32, 64), torch.bfloat16),
    ("wkv5", (8, 4096, 32, 64), torch.float32),
    ("wkv4", (8, 4096, 2048), torch.float32),
    ("wkv4", (1, 32768, 2048), torch.float32),
    ("wkv4", (1, 4096, 2048), torch.float32),
]
REPEATS = 20


def inputs(function: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Random arguments with decays as in the official initialisation, and the gradients arriving at the results."""
    batch, _, *width = shape
    channels = width[-1] if function == "wkv4" else width[0] * width[1]
    place = torch.arange(channels, device="cuda") / (channels - 1)
    log_decay = -torch.exp(-6 + 5 * place**0.9).view(*width)
    bonus = torch.randn(*width, device="cuda")
    tokens = [torch.randn(*shape, device="cuda").to(dtype) for _ in range(3 if function == "wkv5" else 2)]
    state = torch.zeros(batch, *width, width[-1], device="cuda")
    if function == "wkv4":
        state = torch.zeros(batch, 3, *width, device="cuda")
        state[:, 2] = EMPTY_EXPONENT
    arguments = [x.requires_grad_() for x in (*tokens, log_decay, bonus, state)]
    return arguments, [torch.randn(*shape, device="cuda"), torch.randn_like(state)]


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of one of many calls that are all queued before the device is waited for."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)] for _ in range(3)]
    times = []
    for row in events:
        row[0].record()
        for event in row[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) for start, end in pairwise(row)]
    return statistics.median(times)


def measure(
    function: str, shape: tuple[int, ...], dtype: torch.dtype, kernel: str, profile: bool
) -> dict[str, Any]:
    arguments, arriving = inputs(function, shape, dtype)
    recurrence = getattr(wkv, function)

    def forward() -> Any:
        with torch.no_grad():
            return recurrence(*arguments, kernel=kernel)

    def both() -> None:
        torch.autograd.grad(recurrence(*arguments, kernel=kernel), arguments, arriving)

    torch.cuda.synchronize()
    start = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = {
        "function": function, "shape": list(shape), "dtype": str(dtype)[6:], "kernel": kernel,
        "first_call_s": round(first, 2), "forward_ms": round(milliseconds(forward), 3),
        "forward_backward_ms": round(milliseconds(both), 3),
        "peak_extra_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 3),
        "least_traffic_gb": round(least_traffic(function, arguments) / 1e9, 3),
    }  # fmt: skip
    if profile:
        result["kernels_ms"] = kernel_times(both)
    return result


def least_traffic(function: str, arguments: list[Tensor]) -> float:
    """Bytes: forward reads the tokens and writes float32 outputs; backward reads both kinds, writes gradients."""
    tokens = arguments[: 3 if function == "wkv5" else 2]
    read = sum(x.numel() * x.element_size() for x in tokens)
    return 3 * read + 2 * 4 * tokens[0].numel()


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    times = {event.key[:60]: event.device_time_total / 5000 for event in record.key_averages()}
    return {name: round(ms, 3) for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0.005}


def trained_inputs(function: str, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What block 0 of a bundled checkpoint hands to its recurrence for random tokens."""
    name = "rwkv-5.2.pth" if function == "wkv5" else "rwkv-4.pth"
    path = Path(rwkv_rev.bundled.__file__).with_name(name)
    weights = {key: x.float().cuda() for key, x in torch.load(path, weights_only=True).items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weights["emb.weight"].shape[0], (2, tokens), generator=generator).cuda()
    x = weights["emb.weight"][ids]
    for norm in ("ln0", "ln1"):
        scale, shift = weights[f"blocks.0.{norm}.weight"], weights[f"blocks.0.{norm}.bias"]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift)
    before = torch.nn.functional.pad(x, (0, 0, 1, -1))

    def project(letter: str, long: str) -> Tensor:
        mix = weights[f"blocks.0.att.time_mix_{letter}"].view(-1)
        return ((mix * x + (1 - mix) * before) @ weights[f"blocks.0.att.{long}.weight"].T).to(dtype)

    log_decay = -torch.exp(weights["blocks.0.att.time_decay"])
    k, v = project("k", "key"), project("v", "value")
    if function == "wkv4":
        state = torch.zeros(2, 3, k.shape[-1], device="cuda")
        state[:, 2] = EMPTY_EXPONENT
        arguments = [k, v, log_decay, weights["blocks.0.att.time_first"], state]
    else:
        heads, size = log_decay.shape
        r, k, v = (z.view(2, tokens, heads, size) for z in (project("r", "receptance"), k, v))
        state = torch.randn(2, heads, size, size, generator=generator).cuda()
        arguments = [r, k, v, log_decay, weights["blocks.0.att.time_faaaa"], state]
    arriving = [torch.randn(z.shape, generator=generator).cuda() for z in (k, state)]
    if function == "wkv4":
        arriving[1][:, 2] = 0.0
    return arguments, arriving


def errors(function: str, dtype: torch.dtype, kernel: str, tokens: int = 1024) -> dict[str, Any]:
    """Relative RMS errors against float64; gradients of tokens include their rounding to ``dtype``."""
    arguments, arriving = trained_inputs(function, tokens, dtype)

    def run(call: Callable[..., Any], values: list[Tensor], **options: Any) -> list[Tensor]:
        values = [x.detach().requires_grad_() for x in values]
        results = call(*values, **options)
        gradients = torch.autograd.grad(results, values, [x.to(results[0].dtype) for x in arriving])
        return [results[0], *gradients]

    actual = run(getattr(wkv, function), arguments, kernel=kernel)
    expected = run(getattr(naive, function), [x.double() for x in arguments])
    tokens_in = ["d_r", "d_k", "d_v"] if function == "wkv5" else ["d_k", "d_v"]
    names = ["out", *tokens_in, "d_log_decay", "d_bonus", "d_state"]
    relative = {
        name: f"{((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item():.1e}"
        for name, x, y in zip(names, actual, expected, strict=True)
    }
    return {
        "function": function,
        "dtype": str(dtype)[6:],
        "kernel": kernel,
        "tokens": tokens,
        "errors": relative,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="triton", choices=wkv.KERNELS)
    parser.add_argument("--profile", action="store_true", help="also print the time of every kernel launched")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "times": [], "errors": [],
    }  # fmt: skip
    for function, shape, dtype in SHAPES:
        report["times"].append(measure(function, shape, dtype, options.kernel, options.profile))
        print(json.dumps(report["times"][-1]), flush=True)
        torch.cuda.empty_cache()
    for function in ("wkv5", "wkv4"):
        for dtype in (torch.float32, torch.bfloat16):
            report["errors"].append(errors(function, dtype, options.kernel))
            print(json.dumps(report["errors"][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
