"""How the next token is chosen: temperature, top-k, top-p, and penalties for what was said already.

Of token i, said n times in this answer, the logit falls by

    presence + frequency * sum over the times that it was said of decay ** (tokens said since)

before all else: the penalties of ChatRWKV and the ``rwkv`` package (``alpha_presence``, ``alpha_frequency``,
``alpha_decay``). As there, the prompt does not count, and blanks and digits count for presence alone; then come top-p,
top-k, and the temperature last, of what is left. (transformers takes the temperature first and top-p last, so that
``model.generate`` with its own options draws otherwise where more than one of them is set.)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rwkv_rev.counts import MOST
from rwkv_rev.errors import CheckpointError, ConfigError
from rwkv_rev.printable import shortened

UNCOUNTED = " \t0123456789"


class Finite(LogitsProcessor):
    """Refuses logits that no token can be chosen by: the likeliest of NaN would be token 0, often an end of text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits [B, V] as they are.

        Raises:
            CheckpointError: where a row holds NaN or +infinity.
            ConfigError: where a row holds nothing but -infinity, which is how processors forbid a token.
        """
        largest = scores.amax(-1)  # NaN where there is one
        if not bool(torch.isfinite(largest).all()):
            if bool((largest < math.inf).all()):
                raise ConfigError(
                    "every token is forbidden, so none can be chosen: what forbids tokens (bad_words_ids, "
                    "suppress_tokens, logits processors of your own) must leave one"
                )
            raise CheckpointError(
                "the model's logits are not finite, so no token can be chosen: weights of it hold NaN or infinity, or "
                "its training diverged; take a checkpoint from before that"
            )
        return scores


class SaidBefore(LogitsProcessor):
    """The penalties of this module's docstring, for ``generate(logits_processor=...)``.

    Args:
        presence, frequency: what is taken off a logit. decay: from 0 to 1, per token.
        prompt_length: tokens of each row at its beginning that do not count.
        uncounted: ids that count for presence alone.
    """

    def __init__(
        self,
        presence: float,
        frequency: float,
        decay: float,
        prompt_length: int = 0,
        uncounted: tuple[int, ...] = (),
    ) -> None:
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self.prompt_length, self.uncounted = prompt_length, uncounted

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] after the tokens ``input_ids`` [B, T]."""
        said = input_ids[:, self.prompt_length :]
        if said.shape[1] == 0:
            return scores
        since = torch.arange(said.shape[1] - 1, -1, -1, device=said.device, dtype=torch.float32)
        weights = (self.decay**since).expand_as(said)
        if self.uncounted:
            apart = torch.isin(said, torch.tensor(self.uncounted, device=said.device))
            weights = weights.masked_fill(apart, 0.0)
        counts = torch.zeros_like(scores, dtype=torch.float32).scatter_add_(1, said, weights)
        present = torch.zeros_like(counts).scatter_(1, said, 1.0)
        return scores - (self.presence * present + self.frequency * counts).to(scores.dtype)


@dataclass(frozen=True)
class Sampling:
    """Settings of how a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else at least 0.01.
        top_p: only the likeliest tokens of this total probability. top_k: only so many tokens; 0 for all.
        presence_penalty, frequency_penalty, penalty_decay: as in the docstring of this module.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that means nothing."""
        penalty = "a number from 0 to 1000"
        for name, right, wanted in (
            (
                "temperature",
                self.temperature == 0 or 0.01 <= self.temperature < math.inf,
                "0, or a finite number of at least 0.01",
            ),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("top_k", 0 <= self.top_k <= MOST, f"from 0 (all tokens) to {MOST}"),
            ("presence_penalty", 0 <= self.presence_penalty <= 1000, penalty),
            ("frequency_penalty", 0 <= self.frequency_penalty <= 1000, penalty),
            ("penalty_decay", 0 <= self.penalty_decay <= 1, "from 0 to 1"),
        ):
            if not right:
                raise ConfigError(f"{name} = {shortened(repr(getattr(self, name)))} must be {wanted}")

    def arguments(self) -> dict[str, Any]:
        """Options of transformers' ``generate`` beside :meth:`processors`, with which its own do nothing."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}

    def processors(self, tokenizer: Any, prompt_length: int = 0) -> LogitsProcessorList:
        """All of it, in the order of the ``rwkv`` package; the first ``prompt_length`` tokens are not said.

        The first of them refuses logits that are not finite (:class:`Finite`).
        """
        found = LogitsProcessorList([Finite()])
        if self.presence_penalty or self.frequency_penalty:
            values = (float(self.presence_penalty), float(self.frequency_penalty), float(self.penalty_decay))
            found.append(SaidBefore(*values, prompt_length, uncounted_ids(tokenizer)))
        if self.temperature > 0:
            if self.top_p < 1:
                found.append(TopPLogitsWarper(float(self.top_p)))
            if self.top_k:
                found.append(TopKLogitsWarper(self.top_k))
            if self.temperature != 1:
                found.append(TemperatureLogitsWarper(float(self.temperature)))
        return found

    def choose(self, logits: Tensor) -> int:
        """A token by processed logits [1, V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits.float(), -1), 1))


def uncounted_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that are a piece of :data:`UNCOUNTED`."""
    pieces = [UNCOUNTED[a:b] for a in range(len(UNCOUNTED)) for b in range(a + 1, len(UNCOUNTED) + 1)]
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return tuple(sorted({ids[0] for ids in encoded if len(ids) == 1}))
