"""Reversal by plain division in float64, ``S = (S' - U) / Lambda``: approximate, and said so in every name.

The literal EBRT recipe, without a remnant of the state. Each step back multiplies every error by 1/w, so after
n steps ``n log2(1/w)`` of float64's 52 bits are noise. :func:`predicted_bits_lost` says so beforehand.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rwkv_rev.reversal.additive import NoRemnant
from rwkv_rev.reversal.fingerprint import fingerprint
from rwkv_rev.reversal.memory import Memory

FLOAT64_BITS = 52


class Decays(Protocol):
    """What a chunk multiplies a memory by: a plan of constant decays, or one chunk's own factors."""

    def decay_of(self, count: Tensor | None) -> Tensor:
        """Lambda, float64, for rows of ``count`` [B] valid tokens."""
        ...


@dataclass(frozen=True)
class Divided(NoRemnant):
    """No remnant, but what is to be divided by: Lambda [1 or B, H, N, 1]."""

    decay: Tensor | None = None


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
        self, contribution: Tensor, count: Tensor | None, plan: Decays
    ) -> tuple["LossyState", Divided]:
        """One chunk forwards; there is no remnant."""
        decay = plan.decay_of(count)
        return LossyState(decay * self.state + contribution.double()), Divided(decay=decay)

    def retreat(
        self, contribution: Tensor, count: Tensor | None, remnant: NoRemnant, plan: Decays
    ) -> "LossyState":
        """One chunk backwards, up to rounding errors that grow by 1/Lambda."""
        return LossyState((self.state - contribution.double()) / plan.decay_of(count))

    def tensors(self) -> list[Tensor]:
        return [self.state]

    def computed(self) -> list[Tensor]:
        return [self.state]

    def like(self, tensors: list[Tensor]) -> "LossyState":
        return LossyState(*tensors)

    of_computed = like

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
    return tokens * float((-log_decay.double()).max()) / torch.log(torch.tensor(2.0, device="cpu")).item()
