"""``truncated``: the gradient stops at every chunk border.

States run through the whole context, gradients do not: nothing before a chunk learns from its loss. **This is not
the gradient of the context**, and no other strategy ever falls back to it. One pass, no tape, memory of one chunk.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import (
    LanguageModel,
    LossInputs,
    LossResult,
    Strategy,
    trainable,
    uncached_autocast,
)
from rwkv_rev.loss import FinishedGradients, add_gradients, linear_cross_entropy
from rwkv_rev.state import RwkvRevState


class Truncated(Strategy):
    """Gradient strategy ``truncated``; see the module's docstring."""

    name = "truncated"

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        leaves = trainable(model, inputs)
        if not torch.is_grad_enabled() or not leaves:
            return self.stream(model, inputs)

        def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
            with uncached_autocast(inputs.targets.device), torch.enable_grad():
                return self._sweep(model, *_cut_off(inputs, leaves))

        loss, *state = FinishedGradients.apply(compute, *leaves)
        report: dict[str, Any] = {"strategy": self.name, "chunk_length": self.chunk_length}
        return LossResult(loss, RwkvRevState(*state), report)

    def _sweep(
        self, model: LanguageModel, inputs: LossInputs, leaves: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], list]:
        total = torch.zeros((), device=inputs.targets.device)
        sums: list[Tensor | None] = [None] * len(leaves)
        state = inputs.state
        for chunk in inputs.chunks(self.chunk_length):
            hidden, state = model.run(chunk.embed(model, chunk.embeds()), state, chunk.mask())
            further = None
            if chunk.stop == inputs.length and inputs.final_state_gradient is not None:
                further = state.inner(inputs.final_state_gradient)
            if chunk.predicts or further is not None:
                loss = linear_cross_entropy(
                    model.normalize(hidden),
                    model.head,
                    chunk.targets(),
                    scale=1 / inputs.divisor,
                    vocab_size=model.vocab_size,
                )
                total = total + loss.detach()
                objective = loss if further is None else loss + further
                if objective.requires_grad:  # not after the first chunk when the initial state alone is tuned
                    sums = add_gradients(sums, torch.autograd.grad(objective, leaves, allow_unused=True))
            state = state.detach()
        return total, tuple(state.tensors()), sums


def _cut_off(inputs: LossInputs, leaves: list[Tensor]) -> tuple[LossInputs, list[Tensor]]:
    """The inputs without the graph that made them, and the leaves with those in their place.

    A state computed from parameters would otherwise hand them a gradient here and a second one in ``backward()``.
    """
    copies = {id(leaf): leaf for leaf in leaves}

    def cut(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            copies[id(tensor)] = tensor.detach().requires_grad_()
        return copies.get(id(tensor), tensor)

    state = RwkvRevState(*map(cut, inputs.state.tensors()))
    embeds = None if inputs.inputs_embeds is None else cut(inputs.inputs_embeds)
    return replace(inputs, state=state, inputs_embeds=embeds), [copies[id(leaf)] for leaf in leaves]
