"""What rows and documents begin with: nothing, or a memory that was tuned."""

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rev.cells.block import FloatStates
from rwkv_rev.code_origin import defined_in
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import StrategyError
from rwkv_rev.state import ModelState


def initial_states(config: RwkvRevConfig) -> nn.ParameterList:
    """A memory of zeros for each layer (RWKV-5: [H, N, N], key index first)."""
    shape = config.architecture.memory_shape(config)
    return nn.ParameterList(torch.zeros(shape) for _ in range(config.num_hidden_layers))


def activations(model: nn.Module) -> Tensor:
    """A weight of a base model that says the dtype and the device of what its blocks are handed: that of ``ln0``.

    Where nothing to that effect stands in the place of ``ln0``, the first weight that is no integer.
    """
    norm: nn.Module = model.ln0  # type: ignore[assignment]
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next(p for p in chain(norm.parameters(), model.parameters()) if p.is_floating_point())


def state_of_rows(
    config: RwkvRevConfig,
    rows: int,
    device: torch.device | None,
    weight: Tensor,
    tuned: nn.ParameterList | None,
) -> ModelState:
    """The state before the first token of so many rows, of a model with such a ``weight``."""
    state: ModelState = ModelState.empty(config, rows, device or weight.device, weight.dtype)
    if tuned is None:
        return state
    name = config.architecture.memory
    memory = torch.stack(list(tuned)).to(getattr(state, name).dtype)[:, None]  # [L, 1, ...]
    return replace(state, **{name: memory.expand(-1, rows, *memory.shape[2:]).contiguous()})


def _refuse_replaced_start(model: nn.Module) -> None:
    replaced = vars(model).get("initial_state", getattr(type(model), "initial_state", None))
    if not defined_in(replaced, ("rwkv_rev.",)):
        raise StrategyError(
            f"initial_state of the {type(model).__name__} was replaced, and documents in a packed row begin with the "
            "empty or the tuned state (add_initial_state): give each document a row of its own"
        )


def document_starts(model: Any) -> list[FloatStates]:
    """What every document in a packed row begins with: the values of each layer's cells, without a batch.

    A tuned memory is the parameter itself, so that its gradient is one of its layer's.

    Raises:
        StrategyError: where another method stands in the place of ``initial_state``.
    """
    _refuse_replaced_start(model)
    config, weight, tuned = model.config, activations(model), model.initial_wkv
    empty = ModelState.empty(config, 1, weight.device, weight.dtype).each(lambda tensor: tensor[:, 0])
    starts: list[FloatStates] = [empty.layer(index) for index in range(config.num_hidden_layers)]
    if tuned is None:
        return starts
    place = next(
        (cell, names.index(config.architecture.memory))
        for cell, (_, names) in enumerate(empty.cells)
        if config.architecture.memory in names
    )
    for layer, parameter in enumerate(tuned):
        cells = list(starts[layer])
        values = cells[place[0]]
        cells[place[0]] = values._replace(**{values._fields[place[1]]: parameter})
        starts[layer] = tuple(cells)
    return starts
