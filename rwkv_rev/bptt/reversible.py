"""``reversible``: boundary states are computed backwards, exactly; the tape holds only what each chunk forgot.

Per chunk and layer the tape takes the two carried ``y`` (2 D numbers) and the packed remnant of the recurrence
(RWKV-5: ``log2(1/w)`` bits per token and element; RWKV-4: its three numbers per channel). Fingerprints per layer,
checked when the state has been rebuilt, turn any difference between the two sweeps into a
:class:`~rwkv_rev.errors.ReversalMismatchError`: nothing is trained on a wrong state.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.sweeps import Record, TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, ExactStates, Plans
from rwkv_rev.cells.cell import Remnant
from rwkv_rev.reversal.fixed_point import FixedPoint, MemoryRemnant


class Reversible(TwoSweeps):
    """Gradient strategy ``reversible``; see the module's docstring."""

    name = "reversible"
    repeatable = True

    def record(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> Record:
        remnants = [layer.remnants for layer in advanced]
        flags = [time.memory.raised for time, _ in remnants if isinstance(time.memory, MemoryRemnant)]

        def tensors(raised: Tensor | None) -> list[list[Tensor]]:
            kept: list[list[Tensor]] = []
            for layer, (time, channel) in enumerate(remnants):
                memory = time.memory
                parts = [memory]
                if isinstance(memory, MemoryRemnant) and raised is not None:
                    parts = memory.tensors(raised[layer])
                kept.append([time.carried, channel.carried, *parts])
            return kept

        return Record(torch.stack(flags) if flags else None, tensors)

    def recover(self, after: ExactStates, record: list[Tensor], plans: Plans) -> BlockAgain:
        time_carried, channel_carried, *parts = record
        memory: Any = parts[0]
        if isinstance(after[0].memory, FixedPoint):
            memory = MemoryRemnant.restore(parts, after[0].memory)
        return BlockAgain(after, plans, (Remnant(time_carried, memory), Remnant(channel_carried, None)))
