"""``full``: the whole context in one graph, ordinary back-propagation through time.

Memory grows by some 30 L D numbers per token. What every other strategy is compared with.
"""

import torch

from rwkv_rev.bptt.strategy import LanguageModel, LossInputs, LossResult, Strategy
from rwkv_rev.loss import linear_cross_entropy


class Full(Strategy):
    """Gradient strategy ``full``; see the module's docstring."""

    name = "full"

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        if not torch.is_grad_enabled():
            return self.stream(model, inputs)
        whole = inputs.chunks(inputs.length)[0]
        x = whole.embed(model, inputs.inputs_embeds)
        hidden, state = model.run(x, inputs.state, whole.mask())
        loss = linear_cross_entropy(
            model.normalize(hidden),
            model.head,
            inputs.targets,
            scale=1 / inputs.divisor,
            vocab_size=model.vocab_size,
        )
        if inputs.final_state_gradient is not None:
            further = state.inner(inputs.final_state_gradient)
            loss = loss + (further - further.detach())  # its gradient, not its value
        return LossResult(loss, state.detach(), {"strategy": self.name, "chunk_length": inputs.length})
