"""What both sweeps go through: one loss, its chunks, and how a chunk is run forwards and computed again."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_rev.bptt.chunk_gradients import Objective, Parameters, Replay, own_loss
from rwkv_rev.bptt.hidden_states import HiddenStates
from rwkv_rev.bptt.layers import ByState, LayerGraph, advance_layers, by_layer, replay_layers
from rwkv_rev.bptt.records import (
    Record,
    fingerprints,
    keep_whole,
    layer_record,
    make_record,
    whole_again,
)
from rwkv_rev.bptt.strategy import Chunk, LanguageModel, LossInputs
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, FloatStates, Plans, flat
from rwkv_rev.cells.contract import residual
from rwkv_rev.errors import ContextParallelError
from rwkv_rev.foreign.search import Strangers
from rwkv_rev.random_state import GeneratorStates
from rwkv_rev.reversal.fingerprint import checksum, fingerprint
from rwkv_rev.reversal.tape import Tape

if TYPE_CHECKING:
    from rwkv_rev.bptt.sweeps import TwoSweeps
    from rwkv_rev.distributed.sharded_blocks import ShardedBlocks


@dataclass
class Sweep:
    """What both sweeps go through.

    Attributes:
        chunks: of the batch ``inputs``.
        plans: of every layer, by the length of a chunk.
        first: exact states before the first chunk.
        tape: records of all chunks but the first and the last.
        places: where the model may draw random numbers.
        strangers: code of others inside the model.
        parameters: those that the loss is differentiated by.
        half: whether gradients of a chunk need a loss scale.
        whole_output: whether the first sweep computes the top layer's output, too: where a hook hears it, and where
            the second sweep would draw there.
        prints: of every layer, for chunks without a record that are computed twice: the first, and the last where
            hidden states are handed out.
        random: the generators' states before each chunk.
        coarse: [L, B, H] bool, parts of memories that were coarse at any border.
        hidden: collects the normalised hidden states in the first sweep, if they are handed out.
        hidden_prints: checksums of these, by chunk.
        objective: what the hidden states are for in the second sweep.
        seen: a checksum of all exact states so far, where ranks share the context.
        sharded: the blocks, where they are.
    """

    strategy: "TwoSweeps"
    model: LanguageModel
    inputs: LossInputs
    chunks: Sequence[Chunk]
    plans: dict[int, list[Plans]]
    first: list[ExactStates]
    tape: Tape
    places: set[torch.device]
    strangers: Strangers
    parameters: Parameters
    half: bool
    whole_output: bool = False
    prints: dict[int, list[Tensor]] = field(default_factory=dict)
    random: list[GeneratorStates] = field(default_factory=list)
    coarse: Tensor | None = None
    hidden: HiddenStates | None = None
    hidden_prints: dict[int, Tensor] = field(default_factory=dict)
    objective: Objective = own_loss
    seen: Tensor | None = None
    sharded: "ShardedBlocks | None" = None

    @property
    def blocks(self) -> Sequence[Any]:
        """The layers, as they are called."""
        return self.model.blocks if self.sharded is None else self.sharded.blocks

    @property
    def device(self) -> torch.device:
        return self.inputs.targets.device

    def part(self, inputs: LossInputs, chunks: Sequence[Chunk]) -> "Sweep":
        """The sweep through a part of the batch."""
        return replace(self, inputs=inputs, chunks=chunks, prints={}, random=[], hidden_prints={})

    def is_inner(self, chunk: Chunk) -> bool:
        """Whether a chunk has a record: not the first, whose states are given, nor the last."""
        return 0 < chunk.index < len(self.chunks) - 1

    def to_end(self) -> ByState | None:
        """The gradient of a further objective by the values of each layer's states after the last token; None without.

        Of ranks that share a context the first one has it. All have one, be it zero: what they exchange of the last
        chunk they exchange in its gradient, too.
        """
        given, group = self.inputs.final_state_gradient, self.inputs.group
        if group is not None and (given is None or group.rank != 0):
            given = self.inputs.state.each(lambda tensor: torch.zeros_like(tensor.detach()))
        return None if given is None else by_layer(given, self.model.blocks)

    def advance(self, chunk: Chunk, states: list[ExactStates]) -> tuple[list[BlockAdvanced], Record]:
        """A chunk forwards from the exact states before it, and what it would put on the tape."""
        advanced = advance_layers(
            self.blocks,
            self._embedded(chunk),
            states,
            self.plans[chunk.planned_length],
            chunk.mask(),
            whole_output=self.whole_output or chunk.index == 0 or self.hidden is not None,
        )
        if self.hidden is not None:
            out = advanced[-1].out
            assert out is not None
            self._hand_out(chunk, residual(out))
        kept = keep_whole(states) if chunk.has_borders else self.strategy.keep(states, advanced)
        return advanced, make_record(states, advanced, kept, exact=self.strategy.exact)

    def advance_last(self, states: list[ExactStates]) -> list[FloatStates]:
        """The last chunk forwards, from the exact states before it; values after it, as the second sweep gets them."""
        chunk = self.chunks[-1]
        layers, _ = self.replayer(chunk, states, None)(self._embedded(chunk))
        prints, top = [layer.replay.print for layer in layers], residual(layers[-1].out)
        self.prints[chunk.index] = [*prints[:-1], torch.cat([prints[-1], checksum(top)[None]])]
        self._hand_out(chunk, top)
        return [layer.replay.end for layer in layers]

    def _embedded(self, chunk: Chunk) -> Tensor:
        """The chunk's input to block 0 [B, C, D]."""
        return chunk.embed(self.model, chunk.embeds())

    def _hand_out(self, chunk: Chunk, out: Tensor) -> None:
        """The hidden states of the top layer's output [B, C, D]."""
        assert self.hidden is not None
        hidden = self.model.normalize(out)
        self.hidden.take(chunk, hidden)
        self.hidden_prints[chunk.index] = checksum(hidden)

    def note_compared(self, compared: Sequence[Sequence[Tensor]]) -> None:
        """Add to :attr:`seen` what a chunk's record compares, by layers."""
        self._note_states([part for layer in compared for part in layer[1:]])

    def _note_states(self, prints: list[Tensor]) -> None:
        """Add to :attr:`seen`: fingerprints of exact memories before a chunk."""
        if self.inputs.group is not None and prints:
            found = fingerprint(torch.cat([part.flatten() for part in prints]))
            self.seen = found if self.seen is None else self.seen * 31 + found

    def refuse_others(self, states: list[ExactStates]) -> None:
        """Refuse ranks that share the context and have not held the same states to the bit; all of them raise.

        Raises:
            ContextParallelError: names the rank.
        """
        group = self.inputs.group
        if group is None:
            return
        self._note_states([part for layer in states for part in fingerprints(layer)])
        if self.seen is None:  # no memory is inverted
            return
        found = group.gather(torch.stack([self.seen, torch.full_like(self.seen, self.tape.nbytes)]))
        other = (found != found[:1]).any(1).nonzero()
        if len(other):
            raise ContextParallelError(
                f"rank {int(other[0])} of the context group does not hold the same states as rank 0: weights differ "
                "between the ranks, or they compute with other kernels (other devices, versions or RWKV_REV_KERNEL)"
            )

    def note_coarse(self, coarse: Tensor | None) -> None:
        """Add to :attr:`coarse`."""
        if coarse is not None:
            self.coarse = coarse.clone() if self.coarse is None else self.coarse.logical_or_(coarse)

    def replayer(self, chunk: Chunk, states: list[ExactStates], record: list[list[Tensor]] | None) -> Replay:
        """How ``chunk`` is computed again.

        ``states`` are the exact ones after it where there is a ``record``. Without one they are those that it began
        with itself for the last chunk; the first chunk begins with the sweep's first ones.
        """
        after = states if chunk.index < len(self.chunks) - 1 else None
        known = self.first if chunk.index == 0 else states

        def ask(layer: int) -> BlockAgain:
            plans = self.plans[chunk.planned_length][layer]
            again = BlockAgain(known[layer], plans)
            if record is not None:
                recover = whole_again if chunk.has_borders else self.strategy.recover
                again = recover(known[layer], layer_record(record, layer, len(known[layer])), plans)
            return replace(
                again,
                checkpointed=self.model.checkpoints_blocks,
                after=after[layer] if after is not None and self.strategy.exact else None,
            )

        def replay(x: Tensor) -> tuple[list[LayerGraph], Tensor | None]:
            mask = chunk.mask()
            layers = replay_layers(self.blocks, x, ask, mask, copies=self.strangers.writes)
            chunk.take_ends(mask, [flat(layer.replay.end) for layer in layers])
            if record is None and chunk.index not in self.prints:
                return layers, None
            if record is not None:
                for number, layer in enumerate(layers):
                    kept = layer_record(record, number, len(layer.replay.states))
                    self.strategy.recovered(layer.replay, kept)
            return layers, self._compared(chunk, layers, record)

        return replay

    def _compared(
        self, chunk: Chunk, layers: list[LayerGraph], record: list[list[Tensor]] | None
    ) -> Tensor | None:
        """[L] bool: which layers computed the same as in the first sweep, as far as that can be known."""
        found: list[list[Tensor]] = []
        expected: list[list[Tensor]] = []
        handed_on = [layer.replay.handed_on for layer in layers if layer.replay.handed_on is not None]
        for number, layer in enumerate(layers):
            replay = layer.replay
            if record is None:
                compared = [self.prints[chunk.index][number]]
            else:
                compared = layer_record(record, number, len(replay.states)).compared
            print_ = replay.print
            if compared[0].numel() > print_.numel():  # the top layer's output, where both sweeps compute it
                print_ = torch.cat([print_, checksum(residual(layer.out))[None]])
            if record is not None and not self.strategy.exact:  # what depends on no rebuilt state
                before = replay.before_the_state
                return (print_[:before] == compared[0][:before]).all()[None]
            found.append([print_, *fingerprints(replay.states)][: len(compared)])
            expected.append(compared)
        same = _equal(found, expected)
        return same & torch.stack(handed_on) if handed_on else same


def _equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> Tensor:
    """[L] bool: whether the integers of each layer are equal; in a few launches for all layers."""
    ones, others = (
        torch.cat([part.flatten() for layer in side for part in layer]) for side in (found, expected)
    )
    equal, sizes = ones == others, [sum(part.numel() for part in layer) for layer in found]
    if len(set(sizes[:-1])) > 1:
        return torch.stack([part.all() for part in equal.split(sizes)])
    *_, last = equal.split([sum(sizes[:-1]), sizes[-1]])
    rest = (
        equal[: len(equal) - len(last)].view(len(sizes) - 1, -1) if len(sizes) > 1 else equal[:0].view(0, 1)
    )
    return torch.cat([rest.all(1), last.all()[None]])
