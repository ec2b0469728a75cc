"""Time and error of RWKV-7's recurrence alone, on a CUDA device.

    python -m rwkv_rev.benchmark.kernel_wkv7 [--small] [--profile] [NAME=VALUE ...]

One line for each shape: seconds of the first call (compilation included), medians of forward and of forward + backward
in ms; then the relative RMS errors of results and gradients against the naive float64 recurrence. NAME=VALUE sets a
constant of :mod:`rwkv_rev.wkv.triton_wkv7`, as SCAN_WARPS=2, or LOW=bf16x3 the precision of bfloat16's inner products.
"""

import ast
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.benchmark.kernels import kernel_times, milliseconds
from rwkv_rev.wkv import naive, triton_wkv7, wkv7

SHAPES = [(8, 4096, 32, 64), (1, 32768, 32, 64)]
SMALL_SHAPES = [(1, 4096, 4, 64)]
NAMES = ("out", "state", "d_r", "d_k", "d_v", "d_log_decay", "d_removal", "d_rate", "d_state")


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments as a trained model has them (decays of every strength, rates near 0 and near 1), and what arrives."""
    torch.manual_seed(0)
    batch, _, heads, size = shape
    r, k, v, x = (torch.randn(shape, device="cuda") for _ in range(4))
    rate, decay = (torch.sigmoid(2 * torch.randn(shape, device="cuda") + shift) for shift in (0, -2))
    removal = torch.nn.functional.normalize(x, dim=-1)
    tokens = [r, k / size**0.5, v, -math.exp(-0.5) * decay, removal, rate]
    state = torch.randn(batch, heads, size, size, device="cuda")
    arguments = [x.detach().to(dtype).requires_grad_() for x in tokens] + [state.requires_grad_()]
    return arguments, [torch.randn(shape, device="cuda"), torch.randn_like(state)]


def measure(shape: tuple[int, ...], dtype: torch.dtype, profile: bool) -> dict[str, Any]:
    arguments, arriving = inputs(shape, dtype)

    def forward() -> Any:
        with torch.no_grad():
            return wkv7(*arguments, kernel="triton")

    def both() -> None:
        torch.autograd.grad(wkv7(*arguments, kernel="triton"), arguments, arriving)

    torch.cuda.synchronize()
    start = time.perf_counter()
    both()
    torch.cuda.synchronize()
    row: dict[str, Any] = {"size": shape, "dtype": str(dtype)[6:]}
    row["first_call_s"] = round(time.perf_counter() - start, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row["forward_ms"] = round(milliseconds(forward, torch.device("cuda")), 3)
    row["forward_backward_ms"] = round(milliseconds(both, torch.device("cuda")), 3)
    row["peak_extra_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
    if profile:
        row["kernels_ms"] = kernel_times(both)
    return row


def errors(dtype: torch.dtype, shape: tuple[int, ...] = (2, 1024, 2, 64)) -> dict[str, Any]:
    arguments, arriving = inputs(shape, dtype)

    def run(function: Callable[..., Any], values: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in values]
        results = function(*leaves)
        pulls = [x.to(results[0].dtype) for x in arriving]
        return [*results, *torch.autograd.grad(results, leaves, pulls)]

    found = run(triton_wkv7.wkv7, arguments)
    same = all(map(torch.equal, found, run(triton_wkv7.wkv7, arguments)))
    expected = run(naive.wkv7, [x.double() for x in arguments])
    relative = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)]
    row = {name: f"{error:.1e}" for name, error in zip(NAMES, relative, strict=True)}
    return {"dtype": str(dtype)[6:], "size": shape, "same_bits_twice": same, "errors": row}


def main(arguments: list[str]) -> None:
    for setting in (x for x in arguments if "=" in x):
        name, value = setting.split("=")
        if name == "LOW":
            triton_wkv7.PRECISIONS[torch.bfloat16] = ("bf16x3", value)
        elif hasattr(triton_wkv7, name):
            setattr(triton_wkv7, name, ast.literal_eval(value))
        else:
            raise SystemExit(f"triton_wkv7 has no constant {name}")
    print(
        json.dumps({"device": torch.cuda.get_device_name(), "settings": [x for x in arguments if "=" in x]})
    )
    print(json.dumps(errors(torch.bfloat16)), flush=True)
    for shape in SMALL_SHAPES if "--small" in arguments else SHAPES:
        print(json.dumps(measure(shape, torch.bfloat16, "--profile" in arguments)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
