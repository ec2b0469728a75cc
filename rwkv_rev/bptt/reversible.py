"""``reversible``: boundary states are computed backwards, exactly; the tape holds only what each chunk forgot.

Per chunk and layer the tape takes the two carried ``y`` (2 D numbers) and the packed remnant of the recurrence
(RWKV-5: ``log2(1/w)`` bits per token and element; RWKV-4: its three numbers per channel). Fingerprints per layer,
checked when the state has been rebuilt, turn any difference between the two sweeps into a
:class:`~rwkv_rev.errors.ReversalMismatchError`: nothing is trained on a wrong state.
"""

from rwkv_rev.bptt.records import LayerRecord
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.reversal.memory import Remnant


class Reversible(TwoSweeps):
    """Gradient strategy ``reversible``; see the module's docstring."""

    name = "reversible"
    repeatable = True
    joins_chunks = True

    def keep(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> list[list[Remnant]]:
        return [list(layer.remnants) for layer in advanced]

    def recover(self, after: ExactStates, record: LayerRecord, plans: Plans) -> BlockAgain:
        remnants = tuple(state.remnant(tensors) for state, tensors in zip(after, record.cells, strict=True))
        return BlockAgain(after, plans, remnants)
