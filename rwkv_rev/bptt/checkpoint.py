"""``checkpoint``: every boundary state is stored whole.

The same arithmetic as ``reversible``, to the bit, with a simpler and larger tape: per chunk and layer
``4 D N + 8 D`` bytes for RWKV-5, ``20 D`` for RWKV-4 (float32 shifts), per batch row.
"""

from torch import Tensor

from rwkv_rev.bptt.sweeps import Record, TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.cells.cell import CellState
from rwkv_rev.reversal.fixed_point import FixedPoint


class Checkpoint(TwoSweeps):
    """Gradient strategy ``checkpoint``; see the module's docstring."""

    name = "checkpoint"
    repeatable = True

    def record(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> Record:
        def tensors(raised: Tensor | None) -> list[list[Tensor]]:
            kept: list[list[Tensor]] = []
            for time, channel in before:
                memory = time.memory
                parts = [memory.mantissa, memory.exponent] if isinstance(memory, FixedPoint) else [memory]
                kept.append([time.shift, channel.shift, *parts])
            return kept

        return Record(None, tensors)

    def recover(self, after: ExactStates, record: list[Tensor], plans: Plans) -> BlockAgain:
        time_shift, channel_shift, *memory = record
        exact = FixedPoint(*memory) if isinstance(after[0].memory, FixedPoint) else memory[0]
        return BlockAgain((CellState(time_shift, exact), CellState(channel_shift, None)), plans)
