"""Reversal by plain division in float64, ``S = (S' - U) / Lambda``: approximate, and said so in every name.

The literal EBRT recipe, without a remnant of the state. Each step back multiplies every error by 1/w, so after
n steps ``n log2(1/w)`` of float64's 52 bits are noise. :func:`predicted_bits_lost` says so beforehand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.reversal.additive import NoRemnant
from rwkv_rev.reversal.fingerprint import fingerprint
from rwkv_rev.reversal.fixed_point import DecayPlan
from rwkv_rev.reversal.memory import Memory

FLOAT64_BITS = 52


@dataclass(frozen=True)
class LossyState:
    """A state [B, H, N, N] in float64, updated and divided back without a remnant."""

    state: Tensor

    @classmethod
    def of(cls, state: Memory) -> "LossyState":
        return cls(state.value(torch.float64))

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The state as floats, rounded once."""
        return self.state.to(dtype)

    def advance(
        self, contribution: Tensor, count: Tensor | None, plan: DecayPlan
    ) -> tuple["LossyState", NoRemnant]:
        """One chunk forwards; there is no remnant."""
        return LossyState(plan.decay_of(count) * self.state + contribution.double()), NoRemnant()

    def retreat(
        self, contribution: Tensor, count: Tensor | None, remnant: NoRemnant, plan: DecayPlan
    ) -> "LossyState":
        """One chunk backwards, up to rounding errors that grow by 1/Lambda."""
        return LossyState((self.state - contribution.double()) / plan.decay_of(count))

    def tensors(self) -> list[Tensor]:
        return [self.state]

    def computed(self) -> list[Tensor]:
        return [self.state]

    def like(self, tensors: list[Tensor]) -> "LossyState":
        return LossyState(*tensors)

    def fingerprint(self) -> Tensor:
        """Checksum, int64 [1]."""
        return fingerprint(self.state)[None]

    when_coarse = ""

    def coarse(self) -> None:
        return None

    def remnant(self, tensors: list[Tensor]) -> NoRemnant:
        return NoRemnant()


def predicted_bits_lost(log_decay: Tensor, tokens: int) -> float:
    """Bits that the fastest decay of ``log_decay`` (log w, any shape, natural) destroys over ``tokens`` steps."""
    return tokens * float((-log_decay.double()).max()) / torch.log(torch.tensor(2.0)).item()
