"""A gradient strategy to hold the two sweeps against where random numbers are drawn.

Tests import it as ``from one_graph import in_one_graph``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from rwkv_rev import modeling
from rwkv_rev.bptt.strategy import LanguageModel, LossInputs, LossResult, Strategy


@contextmanager
def in_one_graph(chunk_length: int) -> Iterator[None]:
    """Losses are computed by :class:`OneGraph`, whatever the model's strategy is."""
    with patch.object(modeling, "choose_strategy", lambda *_, **__: OneGraph(chunk_length)):
        yield


class OneGraph(Strategy):
    """Chunk by chunk in one graph, drawing what the sweeps draw; the head's draws are not followed by any other."""

    name = "one graph"

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        assert inputs.valid is None
        state, total = inputs.state, torch.zeros((), dtype=torch.float64)
        embeddings = model.get_input_embeddings()
        alpha = getattr(embeddings, "neftune_noise_alpha", None)
        for start in range(0, inputs.length, self.chunk_length):
            part = slice(start, start + self.chunk_length)
            ids, embeds, targets = (
                None if of is None else of[:, part]
                for of in (inputs.input_ids, inputs.inputs_embeds, inputs.targets)
            )
            if alpha is not None:  # noise as large as in the whole context: alpha / sqrt(T D)
                embeddings.neftune_noise_alpha = alpha * (targets.shape[1] / inputs.length) ** 0.5
            x, state = model.run(model.embed(ids, embeds), state, None)
            drawn = torch.get_rng_state()
            logits = model.head(model.normalize(x))
            total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            torch.set_rng_state(drawn)
        if alpha is not None:
            embeddings.neftune_noise_alpha = alpha
        return LossResult(total / inputs.divisor, state)
