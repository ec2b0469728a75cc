"""``checkpoint``: every boundary state is stored whole.

The same arithmetic as ``reversible``, to the bit, with a simpler and larger tape: per chunk and layer
``4 D N + 8 D`` bytes for RWKV-5, ``20 D`` for RWKV-4 (float32 shifts), per batch row.
"""

from torch import Tensor

from rwkv_rev.bptt.strategy import Chunk, LanguageModel
from rwkv_rev.bptt.sweeps import Record, Recovered, TwoSweeps
from rwkv_rev.cells.block import ExactStates, Plans, Remnants
from rwkv_rev.cells.cell import CellState
from rwkv_rev.reversal.fixed_point import FixedPoint


class Checkpoint(TwoSweeps):
    """Gradient strategy ``checkpoint``; see the module's docstring."""

    name = "checkpoint"
    repeatable = True

    def record(
        self,
        model: LanguageModel,
        before: list[ExactStates],
        after: list[ExactStates],
        remnants: list[Remnants],
    ) -> Record:
        def tensors(raised: Tensor | None) -> list[list[Tensor]]:
            kept: list[list[Tensor]] = []
            for time, channel in before:
                memory = time.memory
                parts = [memory.mantissa, memory.exponent] if isinstance(memory, FixedPoint) else [memory]
                kept.append([time.shift, channel.shift, *parts])
            return kept

        return Record(None, tensors)

    def recover(
        self,
        model: LanguageModel,
        layer: int,
        x: Tensor,
        after: ExactStates,
        record: list[Tensor],
        chunk: Chunk,
        plans: Plans,
    ) -> Recovered:
        time_shift, channel_shift, *memory = record
        exact = FixedPoint(*memory) if isinstance(after[0].memory, FixedPoint) else memory[0]
        states = CellState(time_shift, exact), CellState(channel_shift, None)
        replay = model.blocks[layer].replay(
            x, states, chunk.mask(), plans=plans, checkpointed=model.checkpoints_blocks
        )
        return Recovered(replay, None)
