"""One RWKV block: two reversible cells on the residual stream, ``x += time(ln1(x))``, ``x += channel(ln2(x))``.

The block offers the same three ways through a chunk as its cells: plain differentiable ``forward``, exact
``advance`` without graph, and ``replay`` with graph from an exact state before or after the chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_rev.cells.cell import (
    CellPlan,
    CellState,
    FloatState,
    Remnant,
    Replay,
    ReversibleCell,
    leaves,
)
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.configuration import RwkvRevConfig

FloatStates = tuple[FloatState, FloatState]
ExactStates = tuple[CellState, CellState]
Remnants = tuple[Remnant, Remnant]
Plans = tuple[CellPlan, CellPlan]


class BlockReplay(NamedTuple):
    """A block's chunk computed again, with graph: exact states before it, output, leaves, states after it."""

    states: ExactStates
    out: Tensor
    start: FloatStates
    end: FloatStates


class Block(nn.Module):
    """Layer ``layer`` of a model; states are pairs (time mix, channel mix)."""

    def __init__(self, config: RwkvRevConfig, layer: int = 0) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln1 = nn.LayerNorm(size, eps=eps)
        self.ln2 = nn.LayerNorm(size, eps=eps)
        self.time_mix: ReversibleCell = (
            TimeMixRwkv5(
                config.num_attention_heads,
                config.head_size,
                config.decay_shape,
                gated=config.has_gate,
                bonus_is_exponential=config.bonus_is_exponential,
                group_norm_epsilon=config.group_norm_epsilon,
            )
            if config.has_heads
            else TimeMixRwkv4(size)
        )
        self.channel_mix: ReversibleCell = ChannelMix(size, config.intermediate_size)
        self.time_mix.layer = self.channel_mix.layer = layer

    def forward(
        self, x: Tensor, states: FloatStates, mask: ChunkMask | None = None
    ) -> tuple[Tensor, FloatStates]:
        """Output [B, C, D] and states after x [B, C, D], by plain differentiable arithmetic."""
        time, channel = states
        out, time = self.time_mix.step(time, self.ln1(x), mask)
        x = x + out
        out, channel = self.channel_mix.step(channel, self.ln2(x), mask)
        return x + out, (time, channel)

    def exact(self, states: FloatStates) -> ExactStates:
        """The exact states nearest to float ones."""
        return self.time_mix.exact(states[0]), self.channel_mix.exact(states[1])

    def plan(self, length: int) -> Plans:
        """Both cells' plans for chunks of ``length`` tokens, while the weights stay as they are."""
        return self.time_mix.plan(length), self.channel_mix.plan(length)

    @torch.no_grad()
    def advance(
        self, x: Tensor, states: ExactStates, mask: ChunkMask | None, plans: Plans, *, output: bool = True
    ) -> tuple[Tensor, ExactStates, Remnants]:
        """One chunk forwards without graph: output, exact states after it, remnants.

        Without ``output``, which only the block above would read, the first result is none.
        """
        time, out, time_remnant = self.time_mix(states[0], self.ln1(x), mask, plans[0])
        x = x + out
        if not output:
            channel, channel_remnant = self.channel_mix.advance_shift(states[1], self.ln2(x), mask, plans[1])
            return x, (time, channel), (time_remnant, channel_remnant)
        channel, out, channel_remnant = self.channel_mix(states[1], self.ln2(x), mask, plans[1])
        return x + out, (time, channel), (time_remnant, channel_remnant)

    def replay(
        self,
        x: Tensor,
        states: ExactStates,
        mask: ChunkMask | None,
        remnants: Remnants | None = None,
        plans: Plans | None = None,
        *,
        checkpointed: bool = False,
    ) -> BlockReplay:
        """One chunk with graph.

        Args:
            states: exact states before the chunk, or after it when ``remnants`` are given.
            checkpointed: keep only the block's input and states, and compute the block once more when its
                gradient is taken (activation checkpointing).
        """
        if checkpointed:
            return self._checkpointed_replay(x, states, mask, remnants, plans)

        def through(
            cell: ReversibleCell, state: CellState, inputs: Tensor, remnant: Remnant | None, plan: CellPlan
        ) -> Replay:
            if remnant is None:
                return cell.replay(state, inputs, mask, plan)
            return cell.reversed_replay(state, inputs, mask, remnant, plan)

        time_plan, channel_plan = plans or self.plan(x.shape[1])
        time_remnant, channel_remnant = remnants or (None, None)
        time = through(self.time_mix, states[0], self.ln1(x), time_remnant, time_plan)
        x = x + time.out
        channel = through(self.channel_mix, states[1], self.ln2(x), channel_remnant, channel_plan)
        return BlockReplay(
            (time.state, channel.state), x + channel.out, (time.start, channel.start), (time.end, channel.end)
        )

    def _checkpointed_replay(
        self,
        x: Tensor,
        states: ExactStates,
        mask: ChunkMask | None,
        remnants: Remnants | None,
        plans: Plans | None,
    ) -> BlockReplay:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            before = self.replay(x, states, mask, remnants, plans).states
        values = self.time_mix.float_state(before[0]), self.channel_mix.float_state(before[1])
        start = (leaves(values[0]), leaves(values[1]))
        forward: Callable[..., tuple[Tensor, FloatStates]] = self.forward
        out, end = checkpoint(forward, x, start, mask, use_reentrant=False)
        return BlockReplay(before, out, start, end)
