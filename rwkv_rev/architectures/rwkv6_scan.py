"""RWKV-6 as a plain loop over the tensors of its original trainer: what its checks are held against.

Peng et al. 2024, "Eagle and Finch", section 4.2, in the trainer's own terms: ``y = r (S + diag(u) k^T v)``, then
``S <- diag(w) S + k^T v``, the key index first; mixes and w are made of each token and the one before. Shares no code
with the cells.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.scan import of_trainer, standardised

Tensors = Mapping[str, Tensor]


def _time_mix(x: Tensor, tensors: Tensors, group_norm_epsilon: float, _: dict[str, Any]) -> Tensor:
    heads, size = tensors["time_faaaa"].shape

    def vector(name: str) -> Tensor:
        return tensors[name].to(x.dtype).flatten()

    def stored(name: str) -> Tensor:
        return tensors[name].to(x.dtype)

    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x
    hidden = torch.tanh((x + before * vector("time_maa_x")) @ stored("time_maa_w1")).unflatten(-1, (5, -1))
    moved = torch.einsum("tir,ird->itd", hidden, stored("time_maa_w2"))
    x_w, x_k, x_v, x_r, x_g = (
        x + before * (vector(f"time_maa_{letter}") + moved[i]) for i, letter in enumerate("wkvrg")
    )
    r, k, v, g = (
        mixed @ stored(f"{name}.weight").T
        for mixed, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"), (x_g, "gate"))
    )
    w = torch.exp(
        -torch.exp(vector("time_decay") + torch.tanh(x_w @ stored("time_decay_w1")) @ stored("time_decay_w2"))
    )
    r, w, k, v = (part.unflatten(-1, (heads, size)) for part in (r, w, k, v))  # [T, H, N]
    u = stored("time_faaaa")[:, :, None]
    state = x.new_zeros(heads, size, size)
    if "time_state" in tensors:
        state = stored("time_state").mT
    y = torch.empty_like(v)
    for t in range(len(x)):
        product = k[t, :, :, None] * v[t, :, None, :]
        y[t] = (r[t, :, None, :] @ (state + u * product)).squeeze(1)
        state = w[t, :, :, None] * state + product
    y = standardised(y, group_norm_epsilon).flatten(1)
    y = y * vector("ln_x.weight") + vector("ln_x.bias")
    return (y * g * torch.sigmoid(g)) @ stored("output.weight").T


def _channel_mix(x: Tensor, tensors: Tensors, _: float, __: dict[str, Any]) -> Tensor:
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x

    def map_of(name: str, mixed: Tensor) -> Tensor:
        return mixed @ tensors[f"{name}.weight"].to(x.dtype).T

    x_k, x_r = (x + before * tensors[f"time_maa_{letter}"].to(x.dtype).flatten() for letter in "kr")
    hidden = torch.relu(map_of("key", x_k)).square()
    return torch.sigmoid(map_of("receptance", x_r)) * map_of("value", hidden)


SCAN = of_trainer(_time_mix, _channel_mix)
