"""A small language model of reversible GRUs (:mod:`rwkv_rev.cells.reversible_gru`) and feed-forward nets."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures import token_models
from rwkv_rev.cells.reversible_gru import ReversibleGru

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig


def _initialize(cell: ReversibleGru, config: "RwkvRevConfig") -> None:
    """Gates of one half; a block that is the identity at first."""
    token_models.initialize_map(cell.input)
    for linear in (*cell.gate, *cell.candidate):
        token_models.initialize_map(linear)
    init.zeros_(cell.output.weight)


def _scan(
    config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]
) -> Tensor:
    def weight(name: str) -> Tensor:
        return tensors[name].to(x.dtype)

    size, least = config.cell_size, 2.0**-config.forget_limit if config.forget_limit else 0.0
    inputs = (x @ weight("input.weight").T + weight("input.bias")).unflatten(-1, (2, 3, size))
    h = token_models.plain_state(x, tensors, 2, size)
    maps = [(weight(f"gate.{half}.weight"), weight(f"candidate.{half}.weight")) for half in range(2)]
    output, out = weight("output.weight"), torch.empty_like(x)
    for t in range(len(x)):
        for half, (gate, candidate) in enumerate(maps):
            other = h[1 - half]
            of_z, of_r = (gate @ other).view(2, size)
            z = least + (1 - least) / (1 + torch.exp(-inputs[t, half, 0] - of_z))
            r = 1 / (1 + torch.exp(-inputs[t, half, 1] - of_r))
            g = torch.tanh(inputs[t, half, 2] + candidate @ (r * other))
            h[half] = z * h[half] + (1 - z) * g
        out[t] = output @ torch.cat(h)
    return out


REVERSIBLE_GRU = token_models.gated(
    "reversible-gru",
    "reversible GRU",
    ReversibleGru,
    _initialize,
    _scan,
    parts=2,
    per_number=14,
    magnitude=2,
    wide=False,
)
