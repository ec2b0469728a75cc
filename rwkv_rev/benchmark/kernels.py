"""Time and error of the recurrences alone; ``rwkv-rev bench kernels``.

For each shape: the first call (compilation included), then medians of forward and of forward + backward (on a CUDA
device of queued calls, by CUDA events), the least memory traffic any implementation has (every input read, every
output written, once per direction), and the relative RMS errors of results and gradients against the naive float64
recurrence, on the keys, values and decays of the first layer of the bundled checkpoints; for RWKV-6, 7 on drawn ones.
"""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkv_rev import wkv
from rwkv_rev.bundled import bundled_path
from rwkv_rev.wkv import EMPTY_EXPONENT, choose_kernel, naive

SHAPES: list[tuple[str, tuple[int, ...], torch.dtype]] = [
    ("wkv5", (8, 4096, 32, 64), torch.bfloat16),
    ("wkv5", (1, 32768, 32, 64), torch.bfloat16),
    ("wkv5", (1, 4096, 32, 64), torch.bfloat16),
    ("wkv5", (8, 4096, 32, 64), torch.float32),
    ("wkv6", (8, 4096, 32, 64), torch.bfloat16),
    ("wkv6", (1, 32768, 32, 64), torch.bfloat16),
    ("wkv6", (8, 4096, 32, 64), torch.float32),
    ("wkv7", (8, 4096, 32, 64), torch.bfloat16),
    ("wkv7", (1, 32768, 32, 64), torch.bfloat16),
    ("wkv4", (8, 4096, 2048), torch.float32),
    ("wkv4", (1, 32768, 2048), torch.float32),
    ("wkv4", (1, 4096, 2048), torch.float32),
]
CPU_SHAPES: list[tuple[str, tuple[int, ...], torch.dtype]] = [
    ("wkv5", (1, 4096, 8, 64), torch.float32),
    ("wkv6", (1, 4096, 8, 64), torch.float32),
    ("wkv7", (1, 4096, 8, 64), torch.float32),
    ("wkv4", (1, 4096, 512), torch.float32),
]
REPEATS = 20
CPU_REPEATS = 7


def kernel_rows(
    device: torch.device,
    kernel: str | None = None,
    shapes: list[tuple[str, tuple[int, ...], torch.dtype]] | None = None,
    *,
    profile: bool = False,
    on_row: Callable[[dict[str, Any]], object] = lambda row: None,
) -> list[dict[str, Any]]:
    """Times of each shape, then errors of their recurrences in float32 and bfloat16.

    Args:
        device: CUDA or CPU.
        kernel: one of :data:`rwkv_rev.wkv.KERNELS`; None for what the dispatcher picks.
        shapes: (function, shape, dtype); :data:`SHAPES` on CUDA and :data:`CPU_SHAPES` elsewhere when None.
        profile: also the time of every kernel launched (CUDA only).
        on_row: called with each row as soon as it is there.
    """
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    kernel = choose_kernel(kernel, torch.empty(0, device=device))
    rows: list[dict[str, Any]] = []
    shapes = shapes or (SHAPES if cuda else CPU_SHAPES)
    for function, shape, dtype in shapes:
        rows.append(measure(function, shape, dtype, kernel, profile and cuda, device))
        on_row(rows[-1])
        if cuda:
            torch.cuda.empty_cache()
    for function in dict.fromkeys(function for function, *_ in shapes):
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(errors(function, dtype, kernel, device))
            on_row(rows[-1])
    return rows


def inputs(
    function: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Random arguments with decays as in the official initialisation, and the gradients arriving at the results.

    Those of RWKV-6 are drawn around it for each token; of RWKV-7 as they may be, rates of every strength too.
    """
    batch, _, *width = shape
    if function == "wkv7":
        return _drawn_with_rates(shape, dtype, device)
    channels = width[-1] if function == "wkv4" else width[0] * width[1]
    place = torch.arange(channels, device=device) / (channels - 1)
    time_decay = (-6 + 5 * place**0.9).view(*width)
    if function == "wkv6":
        time_decay = time_decay + 0.5 * torch.randn(*shape, device=device)
    log_decay = -torch.exp(time_decay)
    bonus = torch.randn(*width, device=device)
    tokens = [torch.randn(*shape, device=device).to(dtype) for _ in range(_token_tensors(function))]
    state = torch.zeros(batch, *width, width[-1], device=device)
    if function == "wkv4":
        state = torch.zeros(batch, 3, *width, device=device)
        state[:, 2] = EMPTY_EXPONENT
    arguments = [x.requires_grad_() for x in (*tokens, log_decay, bonus, state)]
    arriving = [torch.randn(*shape, device=device), torch.randn_like(state)]
    if function == "wkv6":
        arriving.append(torch.randn_like(state[..., 0], dtype=torch.float64))
    return arguments, arriving


def _drawn_with_rates(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    batch, _, heads, size = shape
    r, k, v, x, y, z = (torch.randn(*shape, device=device) for _ in range(6))
    log_decay = -math.exp(-0.5) * torch.sigmoid(2 * y - 2)
    gates = (log_decay, torch.nn.functional.normalize(x, dim=-1), torch.sigmoid(2 * z))
    tokens = [t.to(dtype) for t in (r, k / size**0.5, v, *gates)]
    state = torch.zeros(batch, heads, size, size, device=device)
    arguments = [t.requires_grad_() for t in (*tokens, state)]
    return arguments, [torch.randn(*shape, device=device), torch.randn_like(state)]


def _token_tensors(function: str) -> int:
    """How many of the first arguments are in the dtype asked for."""
    return {"wkv4": 2, "wkv7": 6}.get(function, 3)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of one of many calls; on CUDA they are all queued before the device is waited for."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(CPU_REPEATS):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
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
    function: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel: str,
    profile: bool,
    device: torch.device,
) -> dict[str, Any]:
    """First call, forward and forward + backward in ms, memory beyond the inputs in GB (CUDA) and least traffic."""
    arguments, arriving = inputs(function, shape, dtype, device)
    recurrence = getattr(wkv, function)

    def forward() -> Any:
        with torch.no_grad():
            return recurrence(*arguments, kernel=kernel)

    def both() -> None:
        torch.autograd.grad(recurrence(*arguments, kernel=kernel), arguments, arriving)

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    both()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    result: dict[str, Any] = {
        "function": function, "size": list(shape), "dtype": str(dtype)[6:], "kernel": kernel,
        "first_call_s": round(first, 2), "forward_ms": round(milliseconds(forward, device), 3),
        "forward_backward_ms": round(milliseconds(both, device), 3),
        "least_traffic_gb": round(least_traffic(function, arguments) / 1e9, 3),
    }  # fmt: skip
    if cuda:
        result["peak_extra_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
    if profile:
        result["kernels_ms"] = kernel_times(both)
    return result


def least_traffic(function: str, arguments: list[Tensor]) -> float:
    """Bytes: forward reads the tokens and writes float32 outputs; backward reads both kinds, writes gradients."""
    tokens = arguments[: _token_tensors(function) + (function == "wkv6")]
    read = sum(x.numel() * x.element_size() for x in tokens)
    return 3 * read + 2 * 4 * tokens[0].numel()


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of every CUDA kernel that a call launches, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    times = {event.key[:60]: event.device_time_total / 5000 for event in profiled.key_averages()}
    return {name: round(ms, 3) for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0.005}


def trained_inputs(
    function: str, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """What block 0 of a bundled checkpoint hands to its recurrence for random tokens."""
    path = bundled_path("rwkv-5.2" if function == "wkv5" else "rwkv-4")
    weights = {key: x.float().to(device) for key, x in torch.load(path, weights_only=True).items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weights["emb.weight"].shape[0], (2, tokens), generator=generator).to(device)
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
        state = torch.zeros(2, 3, k.shape[-1], device=device)
        state[:, 2] = EMPTY_EXPONENT
        arguments = [k, v, log_decay, weights["blocks.0.att.time_first"], state]
    else:
        heads, size = log_decay.shape
        r, k, v = (z.view(2, tokens, heads, size) for z in (project("r", "receptance"), k, v))
        state = torch.randn(2, heads, size, size, generator=generator).to(device)
        arguments = [r, k, v, log_decay, weights["blocks.0.att.time_faaaa"], state]
    arriving = [torch.randn(z.shape, generator=generator).to(device) for z in (k, state)]
    if function == "wkv4":
        arriving[1][:, 2] = 0.0
    return arguments, arriving


def errors(
    function: str, dtype: torch.dtype, kernel: str, device: torch.device, tokens: int = 1024
) -> dict[str, Any]:
    """Relative RMS errors against float64; gradients of tokens include their rounding to ``dtype``."""
    if function in ("wkv6", "wkv7"):
        arguments, arriving = inputs(function, (2, tokens, 2, 64), dtype, device)
        arguments[-1].data.normal_()
    else:
        arguments, arriving = trained_inputs(function, tokens, dtype, device)

    def run(call: Callable[..., Any], values: list[Tensor], **options: Any) -> list[Tensor]:
        values = [x.detach().requires_grad_() for x in values]
        results = call(*values, **options)
        pulls = [x.to(result.dtype) for x, result in zip(arriving, results, strict=True)]
        gradients = torch.autograd.grad(results, values, pulls)
        return [results[0], *gradients]

    actual = run(getattr(wkv, function), arguments, kernel=kernel)
    expected = run(getattr(naive, function), [x.double() for x in arguments])
    names = ["out", "d_r", "d_k", "d_v", "d_log_decay", "d_bonus", "d_state"]
    if function == "wkv4":
        names.remove("d_r")
    elif function == "wkv7":
        names[5:6] = ["d_removal", "d_rate"]
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
