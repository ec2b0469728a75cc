"""RWKV-7 recurrence by PyTorch operators, parallel in time within sub-chunks; any device and dtype.

    S_t = (diag(w_t) + b_t z_t^T) S_{t-1} + k_t^T v_t,      y_t = r_t S_t

with z = -kappa, b = a kappa (Peng et al. 2025, "RWKV-7 Goose", section 4; S is [key, value] here). Inside a sub-chunk
that begins with the state S, let c_t = sum_{q<=t} log w_q and scale what reads by the decay since then, what writes by
its inverse,

    Z_t = e^{c_{t-1}} z_t,   R_t = e^{c_t} r_t,   B_t = e^{-c_t} b_t,   K_t = e^{-c_t} k_t.

Then u_t = z_t^T S_{t-1}, what is removed from the state at each token, solves a triangular system (the WY form of a
product of rank-one changes; Yang et al. 2024, "Parallelizing linear transformers with the delta rule"):

    u = Z S + tril(Z B^T, -1) u + tril(Z K^T, -1) v
    y = R S + tril(R B^T) u + tril(R K^T) v
    S' = diag(e^{c_n}) (S + B^T u + K^T v)

so that ``S' = P S + U`` with matrices that do not depend on S: they are made for all sub-chunks at once, and one
product remains for each of them in turn. e^{-c} stays below e^{0.607 n}, 3e8 for n = 32: RWKV-7 never decays by more
than e^{-1/2} of a bit in a step (0.545 a token), and no product of two factors is larger than 1. a = 1 with w = 1, a
projection, is nothing special. Sums of logarithms are taken in float64. PyTorch differentiates it.
"""

import torch
from torch import Tensor

from rwkv_rev.wkv.naive import arithmetic_dtype

SUB_CHUNK = 32
"""Tokens; shorter contexts are one sub-chunk."""
LARGEST_EXPONENT = 80.0
"""Of a factor in float32, e^88; reached by 2.5 a token, four times what RWKV-7 can decay by."""


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
    wide = torch.float32 if k.device.type == "mps" else torch.float64
    tokens = k.shape[1]
    length = min(SUB_CHUNK, 1 << (tokens - 1).bit_length())
    r, k, v, removal, rate = (x.to(dtype) for x in (r, k, v, removal, rate))
    log_decay, state = log_decay.to(wide), state.to(dtype)
    if mask is not None:
        valid = mask[..., None, None]
        r, k, removal, log_decay = r * valid, k * valid, removal * valid, log_decay * valid
    r, k, v, removal, written, steps = (
        _cut(x, length) for x in (r, k, v, removal, removal * rate, log_decay)
    )
    until = steps.cumsum(-2)
    grown = torch.exp((-until).clamp(max=LARGEST_EXPONENT)).to(dtype)
    decayed = torch.exp(until).to(dtype)
    z = -removal * torch.exp(until - steps).to(dtype)
    receptance, b, key = r * decayed, written * grown, k * grown

    before = torch.ones(length, length, dtype=torch.bool, device=k.device).tril(-1)
    among = (z @ b.mT).masked_fill(~before, 0)
    solved = torch.linalg.solve_triangular(
        torch.eye(length, dtype=dtype, device=k.device) - among,
        torch.cat([z, (z @ key.mT).masked_fill(~before, 0) @ v], -1),
        upper=False,
        unitriangular=True,
    )
    of_state, alone = solved.split([z.shape[-1], v.shape[-1]], -1)  # u = of_state S + alone
    end = decayed[..., -1, :, None]
    moved = end * (b.mT @ of_state)
    moved = moved + torch.diag_embed(end[..., 0])
    added = end * (b.mT @ alone + key.mT @ v)
    starts = []
    for step, new in zip(moved.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = step @ state + new
    start = torch.stack(starts, 1)
    removed = of_state @ start + alone
    not_after = before | torch.eye(length, dtype=torch.bool, device=k.device)
    out = receptance @ start
    out = out + (receptance @ b.mT).masked_fill(~not_after, 0) @ removed
    out = out + (receptance @ key.mT).masked_fill(~not_after, 0) @ v
    return out.transpose(2, 3).flatten(1, 2)[:, :tokens], state


def _cut(x: Tensor, length: int) -> Tensor:
    """[B, J, H, n, N] from [B, T, H, N]; tokens beyond T are zeros, which change nothing."""
    batch, tokens, heads, size = x.shape
    missing = -tokens % length
    if missing:
        x = torch.cat([x, x.new_zeros(batch, missing, heads, size)], 1)
    return x.view(batch, -1, length, heads, size).transpose(2, 3)
