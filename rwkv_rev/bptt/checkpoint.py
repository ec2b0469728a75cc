"""``checkpoint``: every boundary state is stored whole.

The same arithmetic as ``reversible``, to the bit, with a simpler and larger tape: per chunk and layer
``4 D N + 8 D`` bytes for RWKV-5, ``20 D`` for RWKV-4 (float32 shifts), per batch row.
"""

from rwkv_rev.bptt.records import LayerRecord, keep_whole, whole_again
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.reversal.memory import Remnant


class Checkpoint(TwoSweeps):
    """Gradient strategy ``checkpoint``; see the module's docstring."""

    name = "checkpoint"
    repeatable = True
    joins_chunks = True

    def keep(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> list[list[Remnant]]:
        return keep_whole(before)

    def recover(self, after: ExactStates, record: LayerRecord, plans: Plans) -> BlockAgain:
        return whole_again(after, record, plans)
