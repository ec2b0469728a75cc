"""RWKV-6 recurrence by PyTorch operators, parallel in time within sub-chunks; any device and dtype.

    y_t = r_t (S_t + diag(u) k_t^T v_t),      S_{t+1} = diag(w_t) S_t + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch", section 4.2): RWKV-5 with a decay of its own for every token and key channel. With
c_t = sum_{q<=t} log w_q inside a sub-chunk of n tokens that begins with the state S,

    y_t = (r_t e^{c_{t-1}}) S + sum_{s<t} (r_t e^{c_{t-1} - c_s} . k_s) v_s + (r_t u . k_t) v_t
    S'  = diag(e^{c_n}) S + sum_s (k_s e^{c_n - c_s})^T v_s

All exponents are at most 0, so nothing overflows. For the sum over s < t they are split at the border of two halves,
e^{c_{t-1} - c_border} times e^{c_border - c_s}, then at that of two quarters, and so on: every factor is at most 1
whatever the decays, and one that vanishes belongs to a product that does. A decay of 1e-9 a step costs nothing more.
Sums of logarithms are taken in float64, so that a difference of two large ones is exact. PyTorch differentiates it.
"""

import torch
from torch import Tensor

from rwkv_rev.wkv.naive import arithmetic_dtype

SUB_CHUNK = 32
"""Tokens, a power of two; shorter contexts are one sub-chunk."""
LOWEST_LOG_DECAY = -1e4
"""Stands for all below it: e^-10000 is zero in float64, and sums of such logarithms keep the smaller ones apart."""


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
    tokens = k.shape[1]
    written = _Written(k, v, log_decay, mask)
    receptance = written.cut(r.to(dtype) if mask is None else r.to(dtype) * mask[..., None, None])
    starts, contribution = written.scan(state.to(dtype))
    keys, values = written.keys, written.values
    out = (receptance * torch.exp(written.before).to(dtype)) @ starts
    out = out + (receptance * keys * bonus.to(dtype)[:, None]).sum(-1, keepdim=True) * values
    out = out + _inside(receptance, keys, values, written.before, written.until)
    return out.permute(0, 1, 3, 2, 4).flatten(1, 2)[:, :tokens], contribution, written.log_factor


def wkv6_contribution(
    k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The second and third result of :func:`wkv6`, to the bit."""
    written = _Written(k, v, log_decay, mask)
    batch, _, heads, size = k.shape
    nothing = k.new_zeros(batch, heads, size, size, dtype=written.keys.dtype)
    return written.scan(nothing)[1], written.log_factor


class _Written:
    """What the tokens write, cut into J sub-chunks of n tokens: [B, J, H, n, N] each.

    Attributes:
        until: c_t, and before: c_{t-1}, float64.
        log_factor: [B, H, N] float64, log of what a state decays by in all.
    """

    def __init__(self, k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None) -> None:
        dtype = arithmetic_dtype(k)
        wide = torch.float32 if k.device.type == "mps" else torch.float64
        log_decay = log_decay.to(wide).clamp(min=LOWEST_LOG_DECAY)
        k = k.to(dtype)
        if mask is not None:
            log_decay = log_decay * mask[..., None, None]
            k = k * mask[..., None, None]
        self.length = min(SUB_CHUNK, 1 << (k.shape[1] - 1).bit_length())
        self.keys, self.values = self.cut(k), self.cut(v.to(dtype))
        steps = self.cut(log_decay)
        self.until = steps.cumsum(-2)
        self.before = self.until - steps
        self.log_factor = self.until[..., -1, :].sum(1)

    def cut(self, x: Tensor) -> Tensor:
        """[B, J, H, n, N] from [B, T, H, N]; tokens beyond T write nothing and decay nothing."""
        batch, tokens, heads, size = x.shape
        missing = -tokens % self.length
        if missing:
            x = torch.cat([x, x.new_zeros(batch, missing, heads, size)], 1)
        return x.view(batch, -1, self.length, heads, size).transpose(2, 3)

    def scan(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, J, H, N, N] before each sub-chunk, and what all of them add to the last one, [B, H, N, N]."""
        ends = self.until[..., -1:, :]
        to_end = torch.exp(ends - self.until).to(self.keys.dtype)
        products = (self.keys * to_end).mT @ self.values
        decays = torch.exp(ends).to(self.keys.dtype).mT
        contribution = torch.zeros_like(state)
        starts = []
        for product, decay in zip(products.unbind(1), decays.unbind(1), strict=True):
            starts.append(state)
            state = decay * state + product
            contribution = decay * contribution + product
        return torch.stack(starts, 1), contribution


def _inside(receptance: Tensor, keys: Tensor, values: Tensor, before: Tensor, until: Tensor) -> Tensor:
    """sum_{s<t} (r_t e^{c_{t-1} - c_s} . k_s) v_s within each sub-chunk, [B, J, H, n, N]."""
    dtype, length = keys.dtype, keys.shape[-2]
    out = torch.zeros_like(values)
    half = length // 2
    while half:
        pairs = (length // (2 * half), 2, half)
        r, k, v, c, e = (x.unflatten(-2, pairs) for x in (receptance, keys, values, before, until))
        border = e[..., 0, -1:, :]
        left = r[..., 1, :, :] * torch.exp(c[..., 1, :, :] - border).to(dtype)
        right = k[..., 0, :, :] * torch.exp(border - e[..., 0, :, :]).to(dtype)
        upper = (left @ right.mT) @ v[..., 0, :, :]
        out = out + torch.stack([torch.zeros_like(upper), upper], -3).flatten(-4, -2)
        half //= 2
    return out
