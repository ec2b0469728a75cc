"""A small language model of coupled additive cells (:mod:`rwkv_rev.cells.coupled`) and feed-forward nets.

Gates and reader are the cell's own; others are a file of one's own away (docs/cells.md).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from rwkv_rev.architectures import token_models
from rwkv_rev.architectures.architecture import AdapterTargets, Architecture, Part
from rwkv_rev.architectures.feed_forward import initialize_feed_forward
from rwkv_rev.architectures.fields import Field
from rwkv_rev.cells.coupled import CoupledCell, LinearReader, TanhGate
from rwkv_rev.cells.feed_forward import FeedForward

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig


def _cell(config: "RwkvRevConfig") -> CoupledCell:
    width, size, scale = config.hidden_size, config.cell_size, config.gate_scale
    first, second = (TanhGate(size, width, scale) for _ in range(2))
    return CoupledCell(width, size, first=first, second=second, magnitude=config.magnitude)


def _initialize_gate(gate: TanhGate, config: "RwkvRevConfig") -> None:
    token_models.initialize_map(gate.of_state)
    token_models.initialize_map(gate.of_input)


def _initialize_reader(reader: LinearReader, config: "RwkvRevConfig") -> None:
    init.zeros_(reader.of_state.weight)


INITIALIZATION: dict[type[nn.Module], Callable[[Any, "RwkvRevConfig"], None]] = {
    TanhGate: _initialize_gate,
    LinearReader: _initialize_reader,
}
"""Of gates and reader, wherever they are."""
GATE_SCALE = 0.125
"""What a gate adds to a number in a token at most, where nobody says otherwise."""


def coupled_loop(
    config: "RwkvRevConfig",
    scale: float,
    x: Tensor,
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    start: list[Tensor] | None = None,
) -> Tensor:
    """The cell as a plain loop: [T, D] of x [T, D], from two halves [M]; tensors' names begin with ``prefix``."""

    def weight(name: str) -> Tensor:
        return tensors[f"{prefix}{name}"].to(x.dtype)

    s = list(x.new_zeros(2, config.cell_size)) if start is None else start
    gates = []
    for name in ("first", "second"):
        share = x @ weight(f"{name}.of_input.weight").T + weight(f"{name}.of_input.bias")
        gates.append((weight(f"{name}.of_state.weight"), share))
    reader, out = weight("reader.of_state.weight"), torch.empty_like(x)
    for t in range(len(x)):
        for half, (of_state, share) in enumerate(gates):
            s[half] = s[half] + scale * torch.tanh(of_state @ s[1 - half] + share[t])
        out[t] = reader @ torch.tanh(torch.cat(s))
    return out


def _scan(
    config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]
) -> Tensor:
    start = token_models.plain_state(x, tensors, 2, config.cell_size)
    return coupled_loop(config, config.gate_scale, x, tensors, start=start)


COUPLED = Architecture(
    version="coupled",
    title="coupled additive cells",
    state_kind=token_models.TokenCellState,
    state={"memory": Part("2 M", wide=True)},
    memory="memory",
    keys="M",
    lora_targets=("of_input", "of_state"),
    targets=AdapterTargets(
        square=("of_state",),
        scaled=("of_input", "feed_forward.value"),
        scaled_inputs=("feed_forward.value",),
    ),
    sizes=token_models.sizes,
    fields=token_models.fields(magnitude=16, forgets=False)
    | {
        "gate_scale": Field(
            float, GATE_SCALE, "what a gate adds in a token at most", least=2.0**-20, most=64.0
        )
    },
    letters=token_models.LETTERS,
    cells=partial(token_models.cells, _cell),
    initialization={**INITIALIZATION, FeedForward: initialize_feed_forward},
    log_decay=lambda read: torch.zeros(2 * len(read("recurrence.first.of_state.weight"))),
    tunes_state=True,
    scan=partial(token_models.scan, _scan),
    cost=token_models.cost(2, per_number=6, per_channel=4, wide=True),
)
