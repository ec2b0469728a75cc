"""What both sweeps go through: one loss, its chunks, and how a chunk is run forwards and computed again."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_rev.bptt.chunk_gradients import Parameters, Replay
from rwkv_rev.bptt.layers import LayerGraph, advance_layers, replay_layers
from rwkv_rev.bptt.records import Record, fingerprints, layer_record, make_record
from rwkv_rev.bptt.strategy import Chunk, LanguageModel, LossInputs
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.foreign_code import Strangers
from rwkv_rev.random_state import GeneratorStates
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.reversal.tape import Tape

if TYPE_CHECKING:
    from rwkv_rev.bptt.sweeps import TwoSweeps


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
        prints: of every layer in the first chunk.
        random: the generators' states before each chunk.
        coarse: [L, B, H] bool, parts of memories that were coarse at any border.
    """

    strategy: "TwoSweeps"
    model: LanguageModel
    inputs: LossInputs
    chunks: list[Chunk]
    plans: dict[int, list[Plans]]
    first: list[ExactStates]
    tape: Tape
    places: set[torch.device]
    strangers: Strangers
    parameters: Parameters
    half: bool
    whole_output: bool = False
    prints: list[Tensor] = field(default_factory=list)
    random: list[GeneratorStates] = field(default_factory=list)
    coarse: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.inputs.targets.device

    def is_inner(self, chunk: Chunk) -> bool:
        """Whether a chunk has a record: not the first, whose states are given, nor the last."""
        return 0 < chunk.index < len(self.chunks) - 1

    def advance(self, chunk: Chunk, states: list[ExactStates]) -> tuple[list[BlockAdvanced], Record]:
        """A chunk forwards from the exact states before it, and what it would put on the tape."""
        advanced = advance_layers(
            self.model.blocks,
            chunk.embed(self.model, chunk.embeds()),
            states,
            self.plans[chunk.length],
            chunk.mask(),
            whole_output=self.whole_output or chunk.index == 0,
        )
        kept = self.strategy.keep(states, advanced)
        return advanced, make_record(states, advanced, kept, exact=self.strategy.exact)

    def replayer(self, chunk: Chunk, states: list[ExactStates], record: list[list[Tensor]] | None) -> Replay:
        """How ``chunk`` is computed again.

        ``states`` are the exact ones after it where there is a ``record``. Without one they are those that it began
        with itself for the last chunk; the first chunk begins with the sweep's first ones.
        """
        only = len(self.chunks) == 1
        after = states if chunk.index < len(self.chunks) - 1 else None
        known = self.first if chunk.index == 0 else states

        def ask(layer: int) -> BlockAgain:
            plans = self.plans[chunk.length][layer]
            again = BlockAgain(known[layer], plans)
            if record is not None:
                again = self.strategy.recover(
                    known[layer], layer_record(record, layer, len(known[layer])), plans
                )
            return replace(
                again,
                checkpointed=self.model.checkpoints_blocks,
                after=after[layer] if after is not None and self.strategy.exact else None,
            )

        def replay(x: Tensor) -> tuple[list[LayerGraph], Tensor | None]:
            layers = replay_layers(self.model.blocks, x, ask, chunk.mask())
            if record is None and (only or chunk.index > 0):
                return layers, None
            if record is not None:
                for number, layer in enumerate(layers):
                    kept = layer_record(record, number, len(layer.replay.states))
                    self.strategy.recovered(layer.replay, kept)
            return layers, self._compared(layers, record)

        return replay

    def _compared(self, layers: list[LayerGraph], record: list[list[Tensor]] | None) -> Tensor | None:
        """[L] bool: which layers computed the same as in the first sweep, as far as that can be known."""
        exactly: list[Tensor] = []
        for number, layer in enumerate(layers):
            replay = layer.replay
            compared = [self.prints[number]]
            if record is not None:
                compared = layer_record(record, number, len(replay.states)).compared
            expected, found = compared[0], replay.print
            if expected.numel() > found.numel():  # the top layer's output, where both sweeps compute it
                found = torch.cat([found, checksum(layer.out)[None]])
            if record is not None and not self.strategy.exact:  # what depends on no rebuilt state
                if number > 0:
                    continue
                found, expected = (print_[: replay.before_the_state] for print_ in (found, expected))
            same = (found == expected).all()
            for one, other in zip(fingerprints(replay.states), compared[1:], strict=False):
                same &= (one == other).all()
            if replay.handed_on is not None:
                same &= replay.handed_on
            exactly.append(same)
        return torch.stack(exactly) if exactly else None
