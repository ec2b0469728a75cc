"""A small language model of reversible LSTMs (:mod:`rwkv_rev.cells.reversible_lstm`) and feed-forward nets.

Its sums have no bound. That they stay where they should needs room and a beginning that forgets: 51 bits, numbers up
to 2**16, z and p at 0.05, inputs of 0.3.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures import token_models
from rwkv_rev.cells.reversible_lstm import ReversibleLstm

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

FORGET_BIAS = -3.0
"""Of z and p. Where they begin at 1/2 some sums run away within hundreds of tokens, and hold the gates that read them
where they are."""


def _initialize(cell: ReversibleLstm, config: "RwkvRevConfig") -> None:
    token_models.initialize_map(cell.input, token_models.INPUT_SCALE)
    bias = torch.zeros(2, 5, cell.size)
    bias[:, :2] = FORGET_BIAS
    init.copy_(cell.input.bias, bias.flatten())
    for linear in cell.recurrent:
        token_models.initialize_map(linear)
    init.zeros_(cell.output.weight)


def _scan(
    config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]
) -> Tensor:
    def weight(name: str) -> Tensor:
        return tensors[name].to(x.dtype)

    size, least = config.cell_size, 2.0**-config.forget_limit if config.forget_limit else 0.0
    inputs = (x @ weight("input.weight").T + weight("input.bias")).unflatten(-1, (2, 5, size))
    first_c, first_h, second_c, second_h = token_models.plain_state(x, tensors, 4, size)
    c, h = [first_c, second_c], [first_h, second_h]
    maps, output = [weight(f"recurrent.{half}.weight") for half in range(2)], weight("output.weight")
    out = torch.empty_like(x)
    for t in range(len(x)):
        for half, recurrent in enumerate(maps):
            z, p, i, o, g = inputs[t, half] + (recurrent @ h[1 - half]).view(5, size)
            z, p, i, o = (1 / (1 + torch.exp(-gate)) for gate in (z, p, i, o))
            z, p = (least + (1 - least) * gate for gate in (z, p))
            c[half] = z * c[half] + i * torch.tanh(g)
            h[half] = p * h[half] + o * torch.tanh(c[half])
        out[t] = output @ torch.cat(h)
    return out


REVERSIBLE_LSTM = token_models.gated(
    "reversible-lstm",
    "reversible LSTM",
    ReversibleLstm,
    _initialize,
    _scan,
    parts=4,
    per_number=18,
    magnitude=16,
    wide=True,
)
