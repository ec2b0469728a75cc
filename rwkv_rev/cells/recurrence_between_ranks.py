"""What a recurrence needs beside its own entry (:mod:`rwkv_rev.wkv.dispatch`) where ranks share a chunk."""

import importlib
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.distributed.context_group import ContextGroup
from rwkv_rev.wkv.dispatch import (
    Wkv5Handover,
    choose_kernel,
    refuse_wrong,
    run_kernel,
    wkv5_contribution,
    wkv6_contribution,
)


def wkv5_pull(
    r: Tensor,
    d_out: Tensor,
    log_decay: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str | None = None,
    handover: Wkv5Handover | None = None,
) -> Tensor:
    """The gradient by the state before a chunk of RWKV-5, [B, H, N, N], from that by its outputs alone; no graph.

    It is the contribution of r and d_out, read from the last token to the first.

    Args:
        r, d_out: [B, T, H, N]; d_out is zero at masked tokens.
        log_decay, mask: as of :func:`rwkv_rev.wkv.wkv5`.
        handover: the one that :func:`rwkv_rev.wkv.wkv5` was given, whose gradient needs what is computed here.
    """
    with torch.no_grad():
        if choose_kernel(kernel, r) == "triton":
            mask = None if mask is None else mask.bool()
            return run_kernel("wkv5_pull", kernel, r, d_out, log_decay, mask, handover)
        r, d_out = reversed_tokens(r), reversed_tokens(d_out)
        return wkv5_contribution(r, d_out, log_decay, reversed_tokens(mask), kernel=kernel)


def wkv6_pull(
    r: Tensor, d_out: Tensor, log_decay: Tensor, mask: Tensor | None = None, *, kernel: str | None = None
) -> Tensor:
    """The gradient by the state before a chunk of RWKV-6, [B, H, N, N], from that by its outputs alone; no graph.

    It is the contribution of r and d_out, read from the last token to the first.

    Args:
        r, d_out: [B, T, H, N]; d_out is zero at masked tokens.
        log_decay, mask: as of :func:`rwkv_rev.wkv.wkv6`.
    """
    with torch.no_grad():
        given = map(reversed_tokens, (r, d_out, log_decay, mask))
        return wkv6_contribution(*given, kernel=kernel)[0]


def wkv7_relayed(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    state: Tensor,
    group: ContextGroup,
) -> tuple[Tensor, Tensor]:
    """:func:`rwkv_rev.wkv.wkv7` of tokens that the ranks of a group have a piece each of; where Triton kernels run.

    What does not depend on the state is made by all ranks at once; the scan alone goes from rank to rank.

    Args:
        state: before the first rank's tokens, the same on all.

    Returns:
        Outputs of this rank's tokens, and the state after the last rank's.
    """
    kernel = importlib.import_module("rwkv_rev.wkv.triton_wkv7").wkv7
    refuse_wrong("wkv7", kernel, (r, k, v, log_decay, removal, rate, state, None))
    return run_kernel("wkv7_relayed", "triton", r, k, v, log_decay, removal, rate, state, group)


def reversed_tokens(tokens: Tensor | None) -> Any:
    return None if tokens is None else tokens.flip(1)
