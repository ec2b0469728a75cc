"""``checkpoint``: every boundary state is stored whole.

The same arithmetic as ``reversible``, to the bit, with a simpler and larger tape: per chunk and layer
``4 D N + 8 D`` bytes for RWKV-5, ``20 D`` for RWKV-4 (float32 shifts), per batch row.
"""

from dataclasses import dataclass

from torch import Tensor

from rwkv_rev.bptt.records import LayerRecord
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.cells.contract import Exact
from rwkv_rev.reversal.memory import Remnant


class Checkpoint(TwoSweeps):
    """Gradient strategy ``checkpoint``; see the module's docstring."""

    name = "checkpoint"
    repeatable = True
    joins_chunks = True

    def keep(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> list[list[Remnant]]:
        return [[_WholeState(state) for state in layer] for layer in before]

    def recover(self, after: ExactStates, record: LayerRecord, plans: Plans) -> BlockAgain:
        before = tuple(state.like(tensors) for state, tensors in zip(after, record.cells, strict=True))
        return BlockAgain(before, plans)


@dataclass(frozen=True)
class _WholeState:
    state: Exact
    size: None = None
    excess: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return self.state.tensors()
