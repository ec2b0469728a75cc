"""The recurrences token by token: slow, any dtype, plain autograd. What every other kernel is tested against.

RWKV-4, per channel (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3.1), with
w = exp(log_decay):

    out_t = (A + e^{u+k_t} v_t) / (B + e^{u+k_t}),      A <- w A + e^{k_t} v_t,      B <- w B + e^{k_t}

held as A = a e^m, B = b e^m with m the running maximum of the exponents. m is a gauge (any m gives the same
outputs), so no gradient flows through it.

RWKV-5, per head (Peng et al. 2024, "Eagle and Finch", section 4; S is [key, value]):

    out_t = r_t (S + diag(u) k_t^T v_t),                S <- diag(w) S + k_t^T v_t

RWKV-6 (section 4.2 there) has a decay w_t of its own for every token. RWKV-7 (Peng et al. 2025, "RWKV-7 Goose", section
4) removes what stands under a key before it writes, and reads after that:

    S <- (diag(w_t) - (a_t kappa_t)^T kappa_t) S + k_t^T v_t,      out_t = r_t S

Cost: one Python iteration per token; autograd stores every state. Tokens are taken apart by ``unbind``, whose backward
is one stack: that of ``x[:, t]`` fills a tensor of all tokens per token. Only elementwise products and sums are
used, so that an autocast region around the backward pass cannot change the arithmetic either.
"""

import itertools

import torch
from torch import Tensor

EMPTY_EXPONENT = -1e38
"""m of an RWKV-4 state that has seen no token: finite, so that differences of exponents are never NaN."""

LOWEST_LOG_DECAY = -1e30
"""Stands for log_decay = -inf (w = 0), whose product with a count of zero tokens would be NaN."""


def arithmetic_dtype(key: Tensor) -> torch.dtype:
    """float64 for float64 keys, else float32."""
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def wkv4(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-4; arguments and results as in :func:`rwkv_rev.wkv.wkv4`."""
    dtype = arithmetic_dtype(k)
    k, v, log_decay, bonus, state = (x.to(dtype) for x in (k, v, log_decay, bonus, state))
    log_decay = log_decay.clamp(min=LOWEST_LOG_DECAY)
    if mask is not None:
        k, v = (x.masked_fill(~mask[..., None], 0) for x in (k, v))
    numerator, denominator, exponent = state.unbind(1)  # [B, D] each
    exponent = exponent.detach()
    outputs = []
    valid_at = itertools.repeat(None) if mask is None else mask[..., None].unbind(1)
    for key, value, valid in zip(k.unbind(1), v.unbind(1), valid_at, strict=False):
        top = torch.maximum(exponent, (bonus + key).detach())
        past, present = torch.exp(exponent - top), torch.exp(bonus + key - top)
        out = (past * numerator + present * value) / (past * denominator + present)
        top = torch.maximum(exponent + log_decay, key).detach()
        past, present = torch.exp(exponent + log_decay - top), torch.exp(key - top)
        updated = (past * numerator + present * value, past * denominator + present, top)
        if valid is None:
            numerator, denominator, exponent = updated
        else:
            out = out * valid
            numerator = torch.where(valid, updated[0], numerator)
            denominator = torch.where(valid, updated[1], denominator)
            exponent = torch.where(valid, updated[2], exponent)
        outputs.append(out)
    return torch.stack(outputs, 1), torch.stack((numerator, denominator, exponent), 1)


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5; arguments and results as in :func:`rwkv_rev.wkv.wkv5`."""
    dtype = arithmetic_dtype(k)
    r, bonus, state = r.to(dtype), bonus.to(dtype), state.to(dtype)
    if mask is not None:
        r = r.masked_fill(~mask[..., None, None], 0)
    outputs = []
    contribution = torch.zeros_like(state)
    for receptance, (decay, product) in zip(r.unbind(1), _steps(k, v, log_decay, mask), strict=True):
        outputs.append((receptance[..., None] * (state + bonus[..., None] * product)).sum(-2))
        state = decay * state + product
        contribution = decay * contribution + product
    return torch.stack(outputs, 1), contribution


def wkv5_contribution(k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None) -> Tensor:
    """Second result of :func:`wkv5`, to the bit; as :func:`rwkv_rev.wkv.wkv5_contribution`."""
    batch, _, heads, size = k.shape
    contribution = k.new_zeros(batch, heads, size, size, dtype=arithmetic_dtype(k))
    for decay, product in _steps(k, v, log_decay, mask):
        contribution = decay * contribution + product
    return contribution


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-6; arguments and results as in :func:`rwkv_rev.wkv.wkv6`."""
    dtype = arithmetic_dtype(k)
    r, k, v, bonus, state = (x.to(dtype) for x in (r, k, v, bonus, state))
    log_decay = log_decay.to(dtype).clamp(min=LOWEST_LOG_DECAY)
    if mask is not None:
        r, k, log_decay = (x.masked_fill(~mask[..., None, None], 0) for x in (r, k, log_decay))
    outputs = []
    contribution = torch.zeros_like(state)
    for receptance, key, value, log_w in zip(*(x.unbind(1) for x in (r, k, v, log_decay)), strict=True):
        product = key[..., None] * value[..., None, :]
        decay = torch.exp(log_w)[..., None]
        outputs.append((receptance[..., None] * (state + bonus[..., None] * product)).sum(-2))
        state = decay * state + product
        contribution = decay * contribution + product
    return torch.stack(outputs, 1), contribution, log_decay.double().sum(1)


def wkv6_contribution(
    k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Second and third result of :func:`wkv6`, to the bit."""
    batch, _, heads, size = k.shape
    nothing = k.new_zeros(batch, heads, size, size)
    return wkv6(torch.zeros_like(k), k, v, log_decay, k.new_zeros(heads, size), nothing, mask)[1:]


def wkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7; arguments and results as in :func:`rwkv_rev.wkv.wkv7`."""
    dtype = arithmetic_dtype(k)
    r, k, v, log_decay, removal, rate, state = (
        x.to(dtype) for x in (r, k, v, log_decay, removal, rate, state)
    )
    if mask is not None:
        r, k, removal, log_decay = (
            x.masked_fill(~mask[..., None, None], 0) for x in (r, k, removal, log_decay)
        )
    outputs = []
    tokens = zip(*(x.unbind(1) for x in (r, k, v, log_decay, removal, rate)), strict=True)
    for receptance, key, value, log_w, removed, share in tokens:
        there = (removed[..., None] * state).sum(-2)
        state = torch.exp(log_w)[..., None] * state
        state = state - (share * removed)[..., None] * there[..., None, :]
        state = state + key[..., None] * value[..., None, :]
        outputs.append((receptance[..., None] * state).sum(-2))
    return torch.stack(outputs, 1), state


def wkv7_transition(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the chunk makes of the unit matrix without values, and of nothing; see :mod:`rwkv_rev.wkv.dispatch`."""
    batch, _, heads, size = k.shape
    one = torch.eye(size, dtype=arithmetic_dtype(k), device=k.device).expand(batch, heads, size, size)
    _, transition = wkv7(r, k, torch.zeros_like(v), log_decay, removal, rate, one, mask)
    _, update = wkv7(r, k, v, log_decay, removal, rate, torch.zeros_like(one), mask)
    return transition, update


def _steps(k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Per token the state's decay [1 or B, H, N, 1] and k^T v [B, H, N, N]; one and zero where masked."""
    dtype = arithmetic_dtype(k)
    k, v = k.to(dtype), v.to(dtype)
    decay = log_decay.to(dtype).clamp(min=LOWEST_LOG_DECAY).exp()[None, ..., None]
    if mask is None:
        return [
            (decay, key[..., None] * value[..., None, :])
            for key, value in zip(k.unbind(1), v.unbind(1), strict=True)
        ]
    k, v = (x.masked_fill(~mask[..., None, None], 0) for x in (k, v))
    return [
        (torch.where(valid[:, None, None, None], decay, 1.0), key[..., None] * value[..., None, :])
        for key, value, valid in zip(k.unbind(1), v.unbind(1), mask.unbind(1), strict=True)
    ]
