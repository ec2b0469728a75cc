"""A converted model in float64, one block at a time: what it computes when rounding is 2^-29 of float32's.

The stored values, widened, go through the model's own blocks. A difference from an oracle in float64 is then one of
the models; a difference that is there in float32 only is rounding. Memory: one block in float64 and one stream [T, D].
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rwkv_rev.bptt.layers import each_layer
from rwkv_rev.cells.block import FloatStates, ResidualBlock
from rwkv_rev.cells.contract import Stream
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.equivalence.logits import PIECE
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.state import ModelState


@torch.no_grad()
def float64_streams(
    model: RwkvRevForCausalLM, stored: ConvertedModel, tokens: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The residual stream [T, D] after every sub-layer, under the places of :func:`.residual_streams`.

    Args:
        model: made from ``stored``, in eval mode; its own values are not used.
        stored: whose values are.
        tokens: ids [T].
    """

    def call(name: str, *arguments: object) -> Any:
        module = model.get_submodule(name)
        values = {key: _wide(stored.tensor(f"{name}.{key}")) for key in module.state_dict()}
        values |= {key: _wide(value) for key, value in module.named_buffers() if key not in values}
        return functional_call(module, values, arguments)

    x = call("model.ln0", stored.tensor("model.embeddings.weight")[tokens].double()[None])  # [1, T, D]
    yield "ln0", _row(x)
    state = ModelState.empty(model.config, 1, dtype=torch.float64)
    if model.config.has_initial_state:
        tuned = [stored.tensor(f"model.initial_wkv.{i}").double()[None] for i in range(len(model.blocks))]
        state = replace(state, **{model.config.architecture.memory: torch.stack(tuned)})
    between: list[Tensor] = []  # the residual before each cell of a block but the first

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        between.append(arguments[0])

    def widened(block: ResidualBlock, stream: Stream, values: FloatStates) -> Stream:
        between.clear()
        handles = [norm.register_forward_pre_hook(keep) for norm, _ in block.parts()[1:]]
        try:
            return call(names[block], stream, values)[0]
        finally:
            for handle in handles:
                handle.remove()

    names: dict[nn.Module, str] = {block: f"model.blocks.{i}" for i, block in enumerate(model.blocks)}
    states = [state.layer(i) for i in range(len(model.blocks))]
    last = x
    for block, last in zip(model.blocks, each_layer(model.blocks, x, states, widened), strict=True):
        for (_, cell), stream in zip(block.names, [*between, last], strict=True):
            yield f"{names[block].removeprefix('model.')}.{cell}", _row(stream)
    yield "ln_out", _row(call("model.ln_out", last))


@torch.no_grad()
def float64_logits(model: RwkvRevForCausalLM, stored: ConvertedModel, tokens: Tensor) -> Iterator[Tensor]:
    """Logits [t, V], some tokens at a time; arguments of :func:`float64_streams`."""
    hidden = tokens.new_empty(0)
    for _, stream in float64_streams(model, stored, tokens):
        hidden = stream
    head = stored.tensor("head.weight").double()
    for rows in hidden.split(PIECE):
        yield rows @ head.T


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _row(x: Tensor) -> Tensor:
    return x[0]
