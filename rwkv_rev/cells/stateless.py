"""A cell without a state: what it makes of a token depends on that token alone. Nothing is forgotten, nothing kept."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.cells.contract import Advanced, Replay, ReversibleCell
from rwkv_rev.cells.exact_sums import ExactSums
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.reversal.additive import NoRemnant


class NoState(NamedTuple):
    """Values of no state."""


class StatelessCell(ReversibleCell):
    """A position-wise map as a part of a block."""

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """Output [B, C, D] of x [B, C, D]."""

    def plan(self, length: int) -> None:
        return None

    def exact(self, state: NoState) -> ExactSums:
        return ExactSums()

    def values(self, state: ExactSums) -> NoState:
        return NoState()

    def lossy(self, state: ExactSums) -> ExactSums:
        """The state itself, which needs no remnant."""
        return state

    def step(self, state: NoState, x: Tensor, mask: ChunkMask | None = None) -> tuple[Tensor, NoState]:
        return self.compute(x), NoState()

    @torch.no_grad()
    def advance(
        self,
        state: ExactSums,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: None = None,
        *,
        output: bool = True,
    ) -> Advanced:
        return Advanced(state, self.compute(x) if output else None, NoRemnant(), _nothing(x))

    def replay(
        self,
        state: ExactSums,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: None = None,
        after: Any = None,
    ) -> Replay:
        handed_on = None if after is None else torch.ones((), dtype=torch.bool, device=x.device)
        return Replay(state, self.compute(x), NoState(), NoState(), _nothing(x), handed_on)

    def retreat(
        self,
        state: ExactSums,
        x: Tensor,
        mask: ChunkMask | None,
        remnant: NoRemnant,
        plan: None = None,
        after: Any = None,
    ) -> Replay:
        return self.replay(state, x, mask, plan, after)


def _nothing(x: Tensor) -> Tensor:
    """The print of a chunk that changed nothing, int64 [0]: its input is in the print of the block."""
    return torch.zeros(0, dtype=torch.int64, device=x.device)
