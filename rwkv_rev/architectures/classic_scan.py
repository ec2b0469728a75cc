r"""RWKV-4 and 5 as a plain loop over the tensors of their original trainers: what their checks are held against.

    time mix, RWKV-4   wkv_t = (a + e^{u+k} v) / (b + e^{u+k});  a <- w a + e^k v;  b <- w b + e^k
    time mix, RWKV-5   y_t = r_t (S + diag(u) k_t^T v_t);  S <- diag(w) S + k_t^T v_t;  GroupNorm over the heads
    channel mix        sigmoid(r) * Wv relu(k)^2

with w = exp(-exp(time_decay)) and every projection reading ``mu * x_t + (1 - mu) * x_{t-1}`` of the
post-LayerNorm vector (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3; Peng
et al. 2024, "Eagle and Finch", section 4.1). Shares no code with the cells.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.scan import of_trainer, standardised


def _mixed(x: Tensor, tensors: Mapping[str, Tensor], letter: str) -> Tensor:
    """``mu * x_t + (1 - mu) * x_{t-1}``, zero before the first token."""
    mu = tensors[f"time_mix_{letter}"].to(x.dtype).flatten()
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return mu * x + (1 - mu) * before


def _linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].to(x.dtype).T


def channel_mix(x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]) -> Tensor:
    """What it adds to the residual [T, D]."""
    key = _linear(_mixed(x, tensors, "k"), tensors, "key")
    receptance = _linear(_mixed(x, tensors, "r"), tensors, "receptance")
    return torch.sigmoid(receptance) * _linear(torch.relu(key).square(), tensors, "value")


def _time_mix(
    x: Tensor, tensors: Mapping[str, Tensor], group_norm_epsilon: float, _: dict[str, Any]
) -> Tensor:
    r, k, v = (
        _linear(_mixed(x, tensors, letter), tensors, name)
        for letter, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    decay = torch.exp(-torch.exp(tensors["time_decay"].to(x.dtype)))  # w
    exponential = "time_first" in tensors
    stored_bonus = tensors["time_first" if exponential else "time_faaaa"].to(x.dtype)
    if "ln_x.weight" not in tensors:
        out = torch.sigmoid(r) * _wkv4(k, v, decay.flatten(), stored_bonus.flatten())
        return _linear(out, tensors, "output")
    heads = decay.shape[0]
    u = stored_bonus.exp() if exponential else stored_bonus
    start = tensors["time_state"].to(x.dtype).mT if "time_state" in tensors else None
    y = _wkv5(r, k, v, decay.reshape(heads, -1, 1), u.reshape(heads, -1, 1), start)  # [T, H, N]
    y = standardised(y, group_norm_epsilon).flatten(1)
    y = y * tensors["ln_x.weight"].to(x.dtype) + tensors["ln_x.bias"].to(x.dtype)
    if "gate.weight" in tensors:
        gate = _linear(_mixed(x, tensors, "g"), tensors, "gate")
        y = y * gate * torch.sigmoid(gate)
    return _linear(y, tensors, "output")


def _wkv4(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """k, v ``[T, D]``; the sums are kept divided by e^m, m their largest exponent so far."""
    a, b, m = torch.zeros_like(k[0]), torch.zeros_like(k[0]), torch.full_like(k[0], -torch.inf)
    out = torch.empty_like(k)
    for t in range(k.shape[0]):
        top = torch.maximum(m, bonus + k[t])
        old, new = torch.exp(m - top), torch.exp(bonus + k[t] - top)
        out[t] = (old * a + new * v[t]) / (old * b + new)
        top = torch.maximum(m, k[t])
        old, new = decay * torch.exp(m - top), torch.exp(k[t] - top)
        a, b, m = old * a + new * v[t], old * b + new, top
    return out


def _wkv5(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, start: Tensor | None = None) -> Tensor:
    """r, k, v ``[T, D]``; decay, u ``[H, N or 1, 1]``; start ``[H, N, N]`` or zero; returns ``[T, H, N]``."""
    heads = decay.shape[0]
    r, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in (r, k, v))
    state = k.new_zeros(heads, k.shape[-1], k.shape[-1]) if start is None else start  # key index first
    out = torch.empty_like(v)
    for t in range(k.shape[0]):
        kv = k[t, :, :, None] * v[t, :, None, :]
        out[t] = (r[t, :, None, :] @ (state + u * kv)).squeeze(1)
        state = decay * state + kv
    return out


SCAN = of_trainer(_time_mix, channel_mix)
