"""``reversible``: boundary states are computed backwards, exactly; the tape holds only what each chunk forgot.

Per chunk and layer the tape takes the two carried ``y`` (2 D numbers) and the packed remnant of the recurrence
(RWKV-5: ``log2(1/w)`` bits per token and element; RWKV-4: its three numbers per channel). A fingerprint per layer,
checked when the state has been rebuilt, turns any difference between the two sweeps into a
:class:`~rwkv_rev.errors.ReversalMismatchError`: nothing is trained on a wrong state.

"""

from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import Chunk, LanguageModel
from rwkv_rev.bptt.sweeps import Record, Recovered, TwoSweeps
from rwkv_rev.cells.block import ExactStates, Plans, Remnants
from rwkv_rev.cells.cell import Remnant
from rwkv_rev.reversal.fixed_point import FixedPoint, MemoryRemnant


class Reversible(TwoSweeps):
    """Gradient strategy ``reversible``; see the module's docstring."""

    name = "reversible"
    repeatable = True

    def record(
        self,
        model: LanguageModel,
        before: list[ExactStates],
        after: list[ExactStates],
        remnants: list[Remnants],
    ) -> Record:
        witnesses = [
            block.time_mix.witness(first[0].memory, second[0].memory)
            for block, first, second in zip(model.blocks, before, after, strict=True)
        ]
        flags = [time.memory.raised for time, _ in remnants if isinstance(time.memory, MemoryRemnant)]

        def tensors(raised: Tensor | None) -> list[list[Tensor]]:
            kept: list[list[Tensor]] = []
            for layer, (time, channel) in enumerate(remnants):
                memory = time.memory
                parts = [memory]
                if isinstance(memory, MemoryRemnant) and raised is not None:
                    parts = memory.tensors(raised[layer])
                witness = witnesses[layer]
                assert witness is not None
                kept.append([time.carried, channel.carried, witness, *parts])
            return kept

        return Record(torch.stack(flags) if flags else None, tensors)

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
        time_carried, channel_carried, witness, *parts = record
        memory: Any = parts[0]
        if isinstance(after[0].memory, FixedPoint):
            memory = MemoryRemnant.restore(parts, after[0].memory)
        block = model.blocks[layer]
        replay = block.replay(
            x,
            after,
            chunk.mask(),
            (Remnant(time_carried, memory), Remnant(channel_carried, None)),
            plans,
            checkpointed=model.checkpoints_blocks,
        )
        end = replay.end[0].memory
        assert end is not None
        found = block.time_mix.witness(replay.states[0].memory, end.detach())
        assert found is not None
        return Recovered(replay, (found == witness).all())
