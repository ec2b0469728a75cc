"""``truncated``: the gradient stops at every chunk border.

States run through the whole context, gradients do not: nothing before a chunk learns from its loss. **This is not
the gradient of the context**, and no other strategy ever falls back to it. One pass, no tape, memory of one chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.autograd.outside_leaves import Differentiated, OutsideLeaves
from rwkv_rev.autograd.stand_ins import StandIns
from rwkv_rev.bptt.layers import by_layer
from rwkv_rev.bptt.leaves import devices, float16_gradients, in_order, trainable
from rwkv_rev.bptt.piece import over_the_group
from rwkv_rev.bptt.strategy import (
    Chunk,
    LanguageModel,
    LossInputs,
    LossResult,
    Strategy,
)
from rwkv_rev.bptt.uncached import uncached
from rwkv_rev.bptt.unchanged import unchanged, watched
from rwkv_rev.foreign.search import Strangers
from rwkv_rev.loss import FinishedGradients, add_gradients, scaled, sum_of, wide
from rwkv_rev.state import ModelState

Found = tuple[Tensor, ModelState]


class Truncated(Strategy):
    """Gradient strategy ``truncated``; see the module's docstring."""

    name = "truncated"

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        parameters: list[Tensor] = list(model.parameters())
        leaves = trainable(parameters, inputs)
        if not torch.is_grad_enabled() or not leaves:
            return self.untrained(model, inputs)
        found = self.check(model, parameters)
        inputs.refuse()

        def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
            with unchanged(model, watched(parameters, found)), uncached(inputs.targets.device):
                return _sweep(model, inputs, self.chunk_length, parameters, leaves, found)

        loss, *state = FinishedGradients.apply(compute, *leaves)
        report: dict[str, Any] = {"strategy": self.name, "chunk_length": self.chunk_length}
        return LossResult(loss, type(inputs.state)(*state), report)


def _sweep(
    model: LanguageModel,
    inputs: LossInputs,
    chunk_length: int,
    parameters: list[Tensor],
    leaves: list[Tensor],
    strange: Strangers,
) -> tuple[Tensor, tuple[Tensor, ...], list]:
    half = float16_gradients(parameters, inputs.targets.device)
    places = devices(parameters, inputs)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    apart = StandIns(parameters)
    inputs = apart.of_inputs(inputs)
    outside = OutsideLeaves(apart.leaves)
    total: Tensor | None = None
    sums: list[Tensor | None] = [None] * len(parameters)
    first: list[Tensor | None] = [None] * len(inputs.state.tensors())
    embeds: list[Tensor] = []
    state = inputs.state.detach()
    for chunk in inputs.chunks(chunk_length):
        look = outside if strange.brings_tensors and (chunk.index == 0 or strange.keeps) else None
        gradients = _gradients_of(model, chunk, state, apart.leaves, places, look, strange.writes)
        with apart.within(model), outside.naming(model):
            (loss, state), found = scaled(gradients) if half else gradients(1.0)
        total = loss if total is None else total + loss
        sums = add_gradients(sums, found[: len(parameters)])
        if chunk.index == 0:
            first = found[len(parameters) :][: len(first)]
        if found[-1] is not None:
            embeds.append(chunk.of_all(found[-1]))
        del found, gradients  # or the chunk's gradients would stay in memory during the next one
    outside.refuse()
    assert total is not None
    roles = [*zip(parameters, sums, strict=True), *zip(inputs.state.tensors(), first, strict=True)]
    if inputs.inputs_embeds is not None:
        roles.append((inputs.inputs_embeds, torch.cat(embeds, dim=1)))
    total, gradients_of_leaves = over_the_group(inputs, total, leaves, in_order(leaves, roles))
    return total, tuple(state.tensors()), gradients_of_leaves


def _gradients_of(
    model: LanguageModel,
    chunk: Chunk,
    state: ModelState,
    parameters: list[Tensor],
    places: set[torch.device],
    outside: OutsideLeaves | None,
    writes: bool,
) -> Callable[[float], tuple[Found, list[Tensor | None]]]:
    """From a loss scale to loss and state after the chunk, and gradients by parameters, state, and embeddings."""
    random = random_state.capture(places)
    last = chunk.stop == chunk.inputs.length
    further = chunk.inputs.final_state_gradient if last else None

    def gradients(loss_scale: float) -> tuple[Found, list[Tensor | None]]:
        random_state.restore(random)
        part = chunk.embeds()
        embeds = None if part is None else part.detach().requires_grad_()
        start = type(state)(
            *(
                tensor.detach().requires_grad_(chunk.index == 0 and given.requires_grad)
                for tensor, given in zip(state.tensors(), chunk.inputs.state.tensors(), strict=True)
            )
        )
        with torch.enable_grad():
            mask = chunk.mask()
            x, after = model.run(
                chunk.embed(model, embeds.clone() if writes and embeds is not None else embeds),
                start,
                mask,
            )
            chunk.take_ends(mask, by_layer(after, model.blocks))
            hidden = model.normalize(x)
        made = [*start.tensors(), *([] if embeds is None else [embeds])]
        leaves = [*parameters, *(tensor for tensor in made if tensor.requires_grad)]
        loss, to_hidden, head = chunk.loss(model, hidden, parameters, loss_scale, outside)
        if outside is not None:
            outside.look(Differentiated("the model", [hidden, *after.tensors()], made))
        pairs = [(hidden, to_hidden)]
        group = chunk.inputs.group
        if group is not None:  # what is exchanged is so in every gradient of every rank
            pairs += [(end, torch.zeros_like(end)) for end in after.tensors()]
        if further is not None and (group is None or group.rank == 0):
            pairs += [
                (end, (g * loss_scale).to(end.dtype))
                for end, g in zip(after.tensors(), further.tensors(), strict=True)
            ]
        pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
        found: list[Tensor | None] = [None] * len(leaves)
        if pairs:  # not after the first chunk when the initial state alone is tuned
            outputs, incoming = zip(*pairs, strict=True)
            found = list(torch.autograd.grad(outputs, leaves, incoming, allow_unused=True))
        to_parameters = [
            sum_of(g, of_head) for g, of_head in zip(found[: len(parameters)], head, strict=True)
        ]
        of_made = iter(found[len(parameters) :])
        to_made = [next(of_made) if tensor.requires_grad else None for tensor in made]
        to_made = [
            torch.zeros_like(t) if t.requires_grad and g is None else g
            for t, g in zip(made, to_made, strict=True)
        ]
        to_embeds = [] if embeds is not None else [None]
        return (loss.to(wide(loss.dtype)), after.detach()), [*to_parameters, *to_made, *to_embeds]

    return gradients
