"""RWKV-7 as a plain loop over the tensors of its original trainer: what its checks are held against.

Peng et al. 2025, "RWKV-7 Goose", section 4, in the trainer's own terms: the state has the value index first,
``S <- S (diag(w) - kappa^T (a kappa)) + v^T k`` and ``y = S r`` after it. Shares no code with the cells.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.scan import of_trainer, standardised

Tensors = Mapping[str, Tensor]


def _time_mix(x: Tensor, tensors: Tensors, group_norm_epsilon: float, left: dict[str, Any]) -> Tensor:
    heads, size = tensors["r_k"].shape

    def vector(name: str) -> Tensor:
        return tensors[name].to(x.dtype).flatten()

    def map_of(name: str) -> Tensor:
        return tensors[name].to(x.dtype)

    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x
    x_r, x_w, x_k, x_v, x_a, x_g = (x + before * vector(f"x_{letter}") for letter in "rwkvag")
    r, k, v = (
        mixed @ map_of(f"{name}.weight").T
        for mixed, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"))
    )
    w = torch.exp(
        -math.exp(-0.5) * torch.sigmoid(vector("w0") + torch.tanh(x_w @ map_of("w1")) @ map_of("w2"))
    )
    a = torch.sigmoid(vector("a0") + x_a @ map_of("a1") @ map_of("a2"))
    g = torch.sigmoid(x_g @ map_of("g1")) @ map_of("g2")
    kappa = (k * vector("k_k")).unflatten(-1, (heads, size))
    kappa = kappa / kappa.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    k = k * (1 + (a - 1) * vector("k_a"))
    if "v_first" in left:
        share = torch.sigmoid(vector("v0") + x_v @ map_of("v1") @ map_of("v2"))
        v = v + (left["v_first"] - v) * share
    else:
        left["v_first"] = v
    r, w, k, v, a = (part.unflatten(-1, (heads, size)) for part in (r, w, k, v, a))  # [T, H, N]
    state = x.new_zeros(heads, size, size)
    if "time_state" in tensors:
        state = map_of("time_state")
    y = torch.empty_like(v)
    for t in range(len(x)):
        found = (state @ kappa[t, :, :, None]) @ (a[t] * kappa[t])[:, None, :]
        state = state * w[t, :, None, :] - found + v[t, :, :, None] * k[t, :, None, :]
        y[t] = (state @ r[t, :, :, None]).squeeze(-1)
    y = standardised(y, group_norm_epsilon).flatten(1)
    y = y * vector("ln_x.weight") + vector("ln_x.bias")
    y = y + ((r * k * map_of("r_k")).sum(-1, keepdim=True) * v).flatten(1)
    return (y * g) @ map_of("output.weight").T


def _channel_mix(x: Tensor, tensors: Tensors, _: float, __: dict[str, Any]) -> Tensor:
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x
    mixed = x + before * tensors["x_k"].to(x.dtype).flatten()
    hidden = torch.relu(mixed @ tensors["key.weight"].to(x.dtype).T).square()
    return hidden @ tensors["value.weight"].to(x.dtype).T


SCAN = of_trainer(_time_mix, _channel_mix)
