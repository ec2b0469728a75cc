"""One entry per recurrence; picks the kernel that computes it.

Kernels: ``naive`` (token by token, the truth), ``chunked`` (parallel in time, PyTorch operators, any device)
and ``triton`` (CUDA). The argument ``kernel`` decides, then :func:`use_kernel`, then the environment variable
``RWKV_REV_KERNEL``, then the default: triton on CUDA where it can be imported, else chunked. ``triton`` falls back
to ``chunked`` for tensors it cannot take (another device, float64, heads above 128) and where triton is missing;
:func:`choose_kernel` tells what would run.

All kernels: inputs in bfloat16, float16, float32 or float64; arithmetic and results in float32 (float64 where
the keys are float64), whatever autocast says; the same call gives the same bits, with gradients enabled or
not. Masked tokens change nothing and get output 0; masks may have holes.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import refuse_transforms
from rwkv_rev.errors import KernelError
from rwkv_rev.wkv import trial
from rwkv_rev.wkv.chunked_wkv5 import wkv5_plan as chunked_plan
from rwkv_rev.wkv.handover import Handover as Wkv5Handover
from rwkv_rev.wkv.limits import LARGEST_TRITON_HEAD

KERNELS = ("naive", "chunked", "triton")
TRITON = ("wkv4", "wkv5", "wkv6", "wkv7")
"""The recurrences that have such kernels; the others take the chunked one."""
KERNEL_VARIABLE = "RWKV_REV_KERNEL"
_used: ContextVar[str | None] = ContextVar("rwkv_rev_kernel", default=None)


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Compute by this kernel inside the context: in this thread, and in layers that activation checkpointing repeats.

    Raises:
        KernelError: there is no kernel of this name.
    """
    _refuse_unknown(name)
    token = _used.set(name)
    try:
        yield
    finally:
        _used.reset(token)


def choose_kernel(kernel: str | None, tensor: Tensor) -> str:
    """Name of the kernel that will run for inputs like ``tensor``.

    Raises:
        KernelError: ``kernel`` (or the environment variable) names no kernel.
    """
    name = kernel or _used.get() or os.environ.get(KERNEL_VARIABLE) or "triton"
    _refuse_unknown(name)
    if name == "triton" and not (
        tensor.is_cuda
        and tensor.dtype != torch.float64
        and (tensor.dim() < 4 or tensor.shape[-1] <= LARGEST_TRITON_HEAD)
        and importlib.util.find_spec("triton") is not None
    ):
        return "chunked"
    return name


def is_fused(tensor: Tensor) -> bool:
    """Whether kernels of CUDA devices will run for inputs like ``tensor``; on others it costs next to nothing to ask.

    Raises:
        KernelError: as :func:`choose_kernel`, on a CUDA device.
    """
    return tensor.is_cuda and choose_kernel(None, tensor) == "triton"


def _refuse_unknown(name: str) -> None:
    if name not in KERNELS:
        raise KernelError(f"no wkv kernel is called {name!r}; there are {', '.join(KERNELS)}")


def wkv4(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-4 recurrence over a chunk.

    Args:
        k, v: [B, T, D] keys (exponents) and values.
        log_decay: [D], log of the decay per token, -exp(time_decay), at most 0; -inf is allowed.
        bonus: [D], u, added to the key of the current token.
        state: [B, 3, D], (a, b, m): numerator and denominator scaled by exp(-m).
            Empty: a = b = 0, m = EMPTY_EXPONENT.
        mask: [B, T] bool, true where the token is valid; None: all are.
        kernel: see the module.

    Returns:
        Outputs [B, T, D] and the state after the chunk [B, 3, D]. No gradient flows to or from m.
    """
    batch, tokens, width = _shape(k, 3, "k")
    _expect(v=(v, (batch, tokens, width)), log_decay=(log_decay, (width,)), bonus=(bonus, (width,)))
    _expect(state=(state, (batch, 3, width)), mask=(mask, (batch, tokens)))
    return run_kernel("wkv4", kernel, k, v, log_decay, bonus, state, _as_bool(mask))


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
    plan: Any = None,
    handover: Wkv5Handover | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5 recurrence over a chunk.

    Args:
        r, k, v: [B, T, H, N].
        log_decay: [H, N], log of the decay per token and key channel, at most 0; -inf is allowed.
        bonus: [H, N], u, factor of the current token.
        state: [B, H, N, N] before the chunk, key index first, value index second.
        mask: [B, T] bool, true where the token is valid; None: all are.
        kernel: see the module.
        plan: of :func:`wkv5_plan` for the same decays, T and kernel.
        handover: the one that :func:`wkv5_contribution` was given for the same tokens and decays.

    Returns:
        Outputs [B, T, H, N] and the chunk's contribution [B, H, N, N] to the state: with n valid tokens in
        the row, the state after the chunk is ``exp(n * log_decay)[..., None] * state + contribution`` (left
        to the caller).
    """
    batch, tokens, heads, size = _shape(k, 4, "k")
    _expect(
        r=(r, k.shape), v=(v, k.shape), log_decay=(log_decay, (heads, size)), bonus=(bonus, (heads, size))
    )
    _expect(state=(state, (batch, heads, size, size)), mask=(mask, (batch, tokens)))
    return run_kernel(
        "wkv5",
        kernel,
        *(r, k, v, log_decay, bonus, state, _as_bool(mask)),
        chunked=(plan, handover),
        triton=(handover,),
    )


def wkv5_contribution(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
    plan: Any = None,
    handover: Wkv5Handover | None = None,
) -> Tensor:
    """Only the contribution of :func:`wkv5`, bit for bit what that returns for the same inputs and kernel.

    With gradients disabled, what both compute is left in ``handover`` for it (by the kernels that have any).
    """
    batch, tokens, heads, size = _shape(k, 4, "k")
    _expect(v=(v, k.shape), log_decay=(log_decay, (heads, size)), mask=(mask, (batch, tokens)))
    return run_kernel(
        "wkv5_contribution",
        kernel,
        *(k, v, log_decay, _as_bool(mask)),
        chunked=(plan, handover),
        triton=(handover,),
    )


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-6 recurrence over a chunk.

    Args:
        r, k, v: [B, T, H, N].
        log_decay: [B, T, H, N], log of each token's decay per key channel, at most 0; -inf is allowed.
        bonus: [H, N], u, factor of the current token.
        state: [B, H, N, N] before the chunk, key index first.
        mask: [B, T] bool, true where the token is valid; None: all are.
        kernel: see the module.

    Returns:
        Outputs [B, T, H, N], the chunk's contribution U [B, H, N, N] and the logarithm of its factor [B, H, N] in
        float64: the state after the chunk is ``exp(log_factor)[..., None] * state + U`` (left to the caller).
    """
    batch, tokens, heads, size = _shape(k, 4, "k")
    _expect(r=(r, k.shape), v=(v, k.shape), log_decay=(log_decay, k.shape), bonus=(bonus, (heads, size)))
    _expect(state=(state, (batch, heads, size, size)), mask=(mask, (batch, tokens)))
    return run_kernel("wkv6", kernel, r, k, v, log_decay, bonus, state, _as_bool(mask))


def wkv6_contribution(
    k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None, *, kernel: str | None = None
) -> tuple[Tensor, Tensor]:
    """Only the contribution and the factor of :func:`wkv6`, bit for bit what that returns for the same inputs."""
    batch, tokens, *_ = _shape(k, 4, "k")
    _expect(v=(v, k.shape), log_decay=(log_decay, k.shape), mask=(mask, (batch, tokens)))
    return run_kernel("wkv6_contribution", kernel, k, v, log_decay, _as_bool(mask))


def wkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7 recurrence over a chunk.

    Args:
        r, k, v: [B, T, H, N].
        log_decay: [B, T, H, N], log of each token's decay per key channel, from -0.6065 (RWKV-7's least) to 0.
        removal: [B, T, H, N], kappa: the key, of length one or zero, under which the state is looked up and replaced.
        rate: [B, T, H, N], a, from 0 to 1: how much of what was found there is taken out.
        state: [B, H, N, N] before the chunk, key index first.
        mask: [B, T] bool, true where the token is valid; None: all are.
        kernel: see the module.

    Returns:
        Outputs [B, T, H, N], which read after the write, and the state after the chunk [B, H, N, N].
    """
    batch, tokens, heads, size = _shape(k, 4, "k")
    _expect(**{name: (x, k.shape) for name, x in (("r", r), ("v", v), ("log_decay", log_decay))})
    _expect(removal=(removal, k.shape), rate=(rate, k.shape))
    _expect(state=(state, (batch, heads, size, size)), mask=(mask, (batch, tokens)))
    return run_kernel("wkv7", kernel, r, k, v, log_decay, removal, rate, state, _as_bool(mask))


def wkv7_transition(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What a chunk of :func:`wkv7` does to any state, without graph: ``P @ state + U``, up to rounding.

    The same call gives the same bits. A row without valid tokens has the unit matrix and zeros, exactly. For float32
    arguments they are made in float64 by PyTorch operators, on a GPU, too, so that a state that goes through P is no
    less precise than by :func:`wkv7`; for bfloat16 and float16 the precision on a GPU is that of the Triton kernel.

    Args:
        r: changes nothing but the precision.

    Returns:
        P and U, [B, H, N, N] each.
    """
    batch, tokens, *_ = _shape(k, 4, "k")
    _expect(**{name: (x, k.shape) for name, x in (("r", r), ("v", v), ("log_decay", log_decay))})
    _expect(removal=(removal, k.shape), rate=(rate, k.shape), mask=(mask, (batch, tokens)))
    if r.dtype == torch.float32 and choose_kernel(kernel, k) == "triton":
        kernel = "chunked"
    with torch.no_grad():
        return run_kernel("wkv7_transition", kernel, r, k, v, log_decay, removal, rate, _as_bool(mask))


def decayed(
    state: Tensor, contribution: Tensor, log_decay: Tensor, tokens: int, counts: Tensor | None = None
) -> Tensor:
    """The state after a chunk, differentiable: ``exp(n * log_decay)[..., None] * state + contribution``.

    Args:
        state, contribution: [B, H, N, N], key index first.
        log_decay: [H, N], at most 0.
        tokens: n where no token is masked.
        counts: [B], n of each row where some are.
    """
    if is_fused(state):
        module = importlib.import_module("rwkv_rev.wkv.triton_decay")
        return module.decayed(state, contribution, log_decay, tokens, counts)
    if counts is None:
        decay = torch.exp(tokens * log_decay)[None, :, :, None]
    else:
        decay = torch.exp(counts[:, None, None, None] * log_decay[None, :, :, None])
    return decay * state + contribution


def wkv5_plan(log_decay: Tensor, tokens: int, *, kernel: str | None = None) -> Any:
    """Powers of the decays [H, N], float32 or wider, computed once for many chunks of ``tokens`` unmasked tokens.

    None where the kernel that will run has no use for it.
    """
    if choose_kernel(kernel, log_decay) != "chunked":
        return None
    return chunked_plan(log_decay, tokens)


def run_kernel(
    function: str,
    kernel: str | None,
    *arguments: Any,
    chunked: tuple[Any, ...] = (),
    triton: tuple[Any, ...] = (),
) -> Any:
    """``function`` of the chosen kernel; ``chunked`` and ``triton`` are further arguments of that kernel alone."""
    key = arguments[0]
    assert key is not None
    name = choose_kernel(kernel, key)
    if name != "naive":
        refuse_transforms([key])
    if name == "naive":
        module = name
    elif name == "triton" and function[:4] in TRITON:
        module = f"triton_{function[:4]}"
    else:
        module = f"chunked_{function[:4]}"
    implementation: Callable[..., Any] = getattr(importlib.import_module(f"rwkv_rev.wkv.{module}"), function)
    if module.startswith("triton") and function in trial.FUNCTIONS:
        refuse_wrong(function, implementation, arguments)
    further = {"chunked": chunked, "triton": triton}.get(module.partition("_")[0], ())
    # entering the context costs more than a small operation
    if not torch.is_autocast_enabled(key.device.type):
        return implementation(*arguments, *further)
    with torch.autocast(key.device.type, enabled=False):
        return implementation(*arguments, *further)


def refuse_wrong(
    function: str, implementation: Callable[..., Any], arguments: Sequence[Tensor | None]
) -> None:
    """Refuse a Triton kernel that does not compute ``function`` for such arguments.

    Raises:
        KernelError: it was tried, and is wrong here.
    """
    wrong = trial.wrong(function, implementation, arguments)
    if wrong:
        raise KernelError(
            f"the Triton kernel of {function} does not compute what it should on this machine ({wrong}): set "
            f"{KERNEL_VARIABLE}=chunked, and please report it with the versions of torch, triton and the driver"
        )


def _shape(tensor: Tensor, dimensions: int, name: str) -> torch.Size:
    if tensor.dim() != dimensions or tensor.shape[1] == 0:
        raise KernelError(
            f"{name} has shape {tuple(tensor.shape)}; {dimensions} dimensions and a token are needed"
        )
    return tensor.shape


def _expect(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise KernelError(f"{name} has shape {tuple(tensor.shape)}; {tuple(shape)} is needed")


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()
