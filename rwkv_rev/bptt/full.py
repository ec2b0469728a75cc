"""``full``: the whole context in one graph, ordinary back-propagation through time.

Memory grows by some 30 L D numbers per token. What every other strategy is compared with.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rwkv_rev.bptt.checkpoint import Checkpoint
from rwkv_rev.bptt.leaves import float16_gradients, refuse_lazy, refuse_offloaded
from rwkv_rev.bptt.strategy import (
    LanguageModel,
    LossInputs,
    LossResult,
    Strategy,
)
from rwkv_rev.bptt.truncated import Truncated
from rwkv_rev.distributed.shards import any_sharded
from rwkv_rev.distributed.taking_part import for_the_head
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.search import strangers_at
from rwkv_rev.loss import linear_cross_entropy


class Full(Strategy):
    """Gradient strategy ``full``; see the module's docstring."""

    name = "full"

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        if not torch.is_grad_enabled():
            return self.stream(model, inputs)
        parameters: list[Tensor] = list(model.parameters())
        if inputs.group is not None and inputs.length > self.chunk_length:
            raise StrategyError(
                f"bptt='full' stores the graph of the whole context, {inputs.length:,} tokens of more than a chunk "
                f"({self.chunk_length:,}), and is not split over ranks: use 'reversible', or a longer chunk_length"
            )
        if inputs.group is not None:  # one chunk, of which nothing is cut off
            one = Checkpoint if any_sharded(parameters) else Truncated
            result = one(inputs.length).loss(model, inputs)
            return replace(result, report={"strategy": self.name, "chunk_length": inputs.length})
        if float16_gradients(parameters, inputs.targets.device):
            # one chunk: the same graph, differentiated with a loss scale
            result = Checkpoint(inputs.length, self.tape, self.tape_dir).loss(model, inputs)
            return replace(result, report={"strategy": self.name, "chunk_length": inputs.length})
        loss, _, state = loss_in_one_graph(model, inputs, model.read)
        return LossResult(loss, state.detach(), {"strategy": self.name, "chunk_length": inputs.length})


def loss_in_one_graph(
    model: LanguageModel, inputs: LossInputs, read: Callable[..., tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Loss, normalised hidden states [B, T, D] and the state after them, in the graph of the whole context.

    Args:
        read: the model's, by which it is called; what it gives beside hidden states and state comes behind these.

    Raises:
        StrategyError: where gradients are taken of a model of which a part is offloaded.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    refuse_offloaded(wanted)
    refuse_lazy(wanted)
    inputs.refuse()
    given = (inputs.input_ids, inputs.valid, inputs.inputs_embeds, inputs.state, inputs.borders)
    hidden, state, *further = read(*given)
    hidden = for_the_head(model, hidden)
    loss = linear_cross_entropy(
        hidden,
        model.head,
        inputs.targets,
        scale=1 / inputs.divisor,
        vocab_size=model.vocab_size,
        parameters=wanted,
        weights=inputs.weights,
        model=cast(nn.Module, model),
        whole=bool(strangers_at(model.head).unknown),
    )
    if inputs.final_state_gradient is not None:
        added = state.inner(inputs.final_state_gradient)
        loss = loss + (added - added.detach())  # its gradient, not its value
    return loss, hidden, state, *further
