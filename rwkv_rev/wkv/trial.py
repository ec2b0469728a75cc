"""A Triton kernel's trial: before its first use for a kind of input it is held against the naive recurrence.

Compilers make wrong code of right kernels: the ptxas of CUDA 12.8 (Triton 3.6) let products with sides of 16 and 32
read outside of shared memory, or gave other numbers in silence. Which one comes with somebody's next version of Triton
nobody knows, so 80 drawn tokens are computed by both, results and gradients, once per process, function, device, head
size, dtypes and whether there is a mask. What wrong code gives is off by its own size, or NaN; rounding is far below.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.wkv import naive

TOKENS, HEADS = 80, 2
LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative RMS error, by the coarsest dtype among the inputs: gradients are rounded to that of their input."""

FUNCTIONS = ("wkv5", "wkv6", "wkv7")

_found: dict[tuple[Any, ...], str] = {}


def wrong(function: str, implementation: Callable[..., Any], arguments: Sequence[Tensor | None]) -> str:
    """What is wrong with ``implementation`` for inputs like ``arguments``, in words; empty if nothing is.

    Looks at their device, dtypes and head size alone; a mask is the last one. No trial where launches are being
    recorded or traced, which does not happen before a first use.
    """
    *inputs, mask = arguments
    key = inputs[0]
    assert key is not None
    if torch.compiler.is_compiling() or type(key) not in (Tensor, torch.nn.Parameter):
        return ""
    if key.is_cuda and torch.cuda.is_current_stream_capturing():
        return ""
    dtypes = tuple(tensor.dtype for tensor in inputs if tensor is not None)
    kind = (function, key.device, key.shape[-1], dtypes, mask is not None)
    if kind not in _found:
        # in a thread of its own there is no autocast, inference mode, or hook on what autograd keeps
        with ThreadPoolExecutor(1) as thread:
            trial = thread.submit(_compare, function, implementation, *kind[2:], key.device)
            _found[kind] = trial.result()
    return _found[kind]


def _compare(
    function: str,
    implementation: Callable[..., Any],
    size: int,
    dtypes: Sequence[torch.dtype],
    masked: bool,
    device: torch.device,
) -> str:
    """Results and gradients against the naive recurrence's."""
    inputs = drawn(function, size, dtypes, device)
    mask = None
    if masked:
        mask = torch.ones(1, TOKENS, dtype=torch.bool, device=device)
        mask[:, :3] = mask[:, 40:44] = mask[:, 66] = False
    largest = max(LARGEST_ERROR[tensor.dtype] for tensor in inputs)
    found = _results(implementation, inputs, mask)
    expected = _results(getattr(naive, function), [tensor.double() for tensor in inputs], mask)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = float((one.double() - other).norm() / other.norm().clamp(min=1e-30))
        if not error <= largest:  # NaN too
            return f"result {number} of its trial is off by {error:.1e}"
    return ""


def drawn(function: str, size: int, dtypes: Sequence[torch.dtype], device: torch.device) -> list[Tensor]:
    """Inputs of ``function`` in the order of its arguments, without a mask: as trained models have them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    tokens, heads = (1, TOKENS, HEADS, size), (HEADS, size)
    inputs = [normal(*tokens) for _ in range(3)]
    if function == "wkv5":
        inputs += [-torch.exp(normal(*heads) - 2), normal(*heads)]
    elif function == "wkv6":
        inputs += [-torch.exp(normal(*tokens) - 2), normal(*heads)]
    else:
        removal = torch.nn.functional.normalize(normal(*tokens), dim=-1)
        inputs += [-0.6 * torch.sigmoid(normal(*tokens)), removal, torch.sigmoid(normal(*tokens))]
    inputs.append(normal(1, HEADS, size, size))
    return [tensor.to(device, dtype) for tensor, dtype in zip(inputs, dtypes, strict=True)]


def _results(function: Callable[..., Any], inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    results = function(*leaves, mask)
    generator = torch.Generator().manual_seed(1)
    arriving = [
        torch.randn(r.shape, generator=generator, device="cpu").to(r.device, r.dtype) for r in results
    ]
    return [r.detach() for r in (*results, *torch.autograd.grad(results, leaves, arriving))]
