"""One RWKV block: two reversible cells on the residual stream, ``x += time(ln1(x))``, ``x += channel(ln2(x))``.

A block goes through a chunk in the same three ways as its cells (:mod:`rwkv_rev.cells.cell`): plain and
differentiable, exact without graph, and with graph from an exact state before or after the chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev import random_state
from rwkv_rev.cells.cell import (
    Advanced,
    Again,
    CellPlan,
    CellState,
    FloatState,
    Forwards,
    Remnant,
    Replay,
    ReversibleCell,
    leaves,
)
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recomputation import checkpointed
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.reversal.fingerprint import checksum

FloatStates = tuple[FloatState, FloatState]
ExactStates = tuple[CellState, CellState]
Remnants = tuple[Remnant, Remnant]
Plans = tuple[CellPlan, CellPlan]


BEFORE_THE_STATE = 3
"""Numbers of a block's print that depend on the input of the first cell alone, not on the state it reads."""


class BlockAdvanced(NamedTuple):
    """A block's chunk run forwards: output [B, C, D] (None without one), exact states after it, remnants, print."""

    out: Tensor | None
    states: ExactStates
    remnants: Remnants
    print: Tensor


class BlockReplay(NamedTuple):
    """A block's chunk computed again, with graph: exact states before it, output, leaves, states after it, print.

    ``print``, int64 [4], holds checksums of the block's input and of what both cells did (:class:`.cell.Replay`):
    the same in both sweeps, if both computed the same. ``handed_on``, bool scalar or None, is that of both cells.
    """

    states: ExactStates
    out: Tensor
    start: FloatStates
    end: FloatStates
    print: Tensor
    handed_on: Tensor | None


@dataclass(frozen=True)
class BlockForwards:
    """Run a block's chunk forwards; the ``output``, which only the block above reads, may be left out."""

    states: ExactStates
    plans: Plans
    output: bool = True


@dataclass(frozen=True)
class BlockAgain:
    """Compute a block's chunk again, with graph.

    Attributes:
        states: exact states before the chunk, or after it when ``remnants`` are given.
        checkpointed: where the block has a function to ``recompute`` by, keep only its input and states, and compute
            it once more when its gradient is taken (activation checkpointing).
        after: states that the chunk after this one began with, to be compared with what this one leaves.
    """

    states: ExactStates
    plans: Plans
    remnants: Remnants | None = None
    checkpointed: bool = False
    after: ExactStates | None = None


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
        self.recompute: Callable[..., Any] | None = None  # torch.utils.checkpoint.checkpoint, with settings

    def forward(
        self, x: Tensor, states: FloatStates | BlockForwards | BlockAgain, mask: ChunkMask | None = None
    ) -> tuple[Tensor | None, Any]:
        """Output [B, C, D] for x [B, C, D], and what else came of the chunk, by what ``states`` ask for.

        Float states: plain differentiable arithmetic, and the states after x. :class:`BlockForwards`: exact, without
        graph, and a :class:`BlockAdvanced`. :class:`BlockAgain`: with graph, and a :class:`BlockReplay`. Everybody
        calls the block, and the block its cells, as modules: hooks of other tools are heard in each of these ways.
        """
        if isinstance(states, BlockForwards):
            advanced = self._advance(x, states, mask)
            return advanced.out, advanced
        if isinstance(states, BlockAgain):
            again = states.checkpointed and self.recompute is not None
            replay = (self._checkpointed if again else self._replay)(x, states, mask)
            return replay.out, replay
        time, channel = states
        out, time = self.time_mix(self.ln1(x), time, mask)
        x = x + out
        out, channel = self.channel_mix(self.ln2(x), channel, mask)
        return x + out, (time, channel)

    def exact(self, states: FloatStates) -> ExactStates:
        """The exact states nearest to float ones."""
        return self.time_mix.exact(states[0]), self.channel_mix.exact(states[1])

    def plan(self, length: int) -> Plans:
        """Both cells' plans for chunks of ``length`` tokens, while the weights stay as they are."""
        return self.time_mix.plan(length), self.channel_mix.plan(length)

    @torch.no_grad()
    def _advance(self, x: Tensor, asked: BlockForwards, mask: ChunkMask | None) -> BlockAdvanced:
        first = checksum(x)
        out, time = self.time_mix(self.ln1(x), Forwards(asked.states[0], asked.plans[0]), mask)
        x = x + out
        way = Forwards(asked.states[1], asked.plans[1], asked.output)
        out, channel = self.channel_mix(self.ln2(x), way, mask)
        return BlockAdvanced(
            x + out if asked.output else None,
            (time.state, channel.state),
            (time.remnant, channel.remnant),
            _print(first, time, channel),
        )

    def _replay(self, x: Tensor, asked: BlockAgain, mask: ChunkMask | None) -> BlockReplay:
        first = checksum(x)
        time_remnant, channel_remnant = asked.remnants or (None, None)
        after = asked.after or (None, None)
        again = Again(asked.states[0], asked.plans[0], time_remnant, after[0])
        out, time = self.time_mix(self.ln1(x), again, mask)
        x = x + out
        again = Again(asked.states[1], asked.plans[1], channel_remnant, after[1])
        out, channel = self.channel_mix(self.ln2(x), again, mask)
        return BlockReplay(
            (time.state, channel.state),
            x + out,
            (time.start, channel.start),
            (time.end, channel.end),
            _print(first, time, channel),
            None if time.handed_on is None else time.handed_on & channel.handed_on,
        )

    def _checkpointed(self, x: Tensor, asked: BlockAgain, mask: ChunkMask | None) -> BlockReplay:
        generators = random_state.capture({x.device})
        with torch.no_grad():
            quiet = self._replay(x, asked, mask)
        random_state.restore(generators)
        before = quiet.states
        values = self.time_mix.float_state(before[0]), self.channel_mix.float_state(before[1])
        start = (leaves(values[0]), leaves(values[1]))
        assert self.recompute is not None
        out, end = checkpointed(self.recompute, self.forward, x, start, mask)
        return BlockReplay(before, out, start, end, quiet.print, quiet.handed_on)


def _print(first: Tensor, time: Advanced | Replay, channel: Advanced | Replay) -> Tensor:
    return torch.cat([first[None], time.print, channel.print])
