"""``reversible``: boundary states are computed backwards, exactly; the tape holds only what each chunk forgot.

Per chunk and layer the tape takes the two carried ``y`` (2 D numbers) and the packed remnant of the recurrence
(RWKV-5: ``log2(1/w)`` bits per token and element; RWKV-4: its three numbers per channel). A fingerprint per layer,
checked when the state has been rebuilt, turns any difference between the two sweeps into a
:class:`~rwkv_rev.errors.ReversalMismatchError`: nothing is trained on a wrong state.

Fingerprints are compared at once on the CPU, at the end of the sweep on a GPU (one transfer instead of one per
chunk); either way before any gradient is returned.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import Chunk, LanguageModel, LossInputs
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.cells.block import BlockReplay, ExactStates, Plans, Remnants
from rwkv_rev.cells.cell import Remnant
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.reversal.fixed_point import FixedPoint, MemoryRemnant


class Reversible(TwoSweeps):
    """Gradient strategy ``reversible``; see the module's docstring."""

    name = "reversible"

    def begin(self, model: LanguageModel, inputs: LossInputs) -> None:
        self._checks: list[tuple[int, int, Tensor]] = []

    def record(
        self,
        model: LanguageModel,
        before: list[ExactStates],
        after: list[ExactStates],
        remnants: list[Remnants],
    ) -> Callable[[], list[list[Tensor]]]:
        witnesses = [
            block.time_mix.witness(first[0].memory, second[0].memory)
            for block, first, second in zip(model.blocks, before, after, strict=True)
        ]
        flags = [time.memory.raised for time, _ in remnants if isinstance(time.memory, MemoryRemnant)]
        raised = _on_host(torch.stack(flags)) if flags else None

        def tensors() -> list[list[Tensor]]:
            on_host = raised() if raised else None
            kept: list[list[Tensor]] = []
            for layer, (time, channel) in enumerate(remnants):
                memory = time.memory
                parts = [memory]
                if isinstance(memory, MemoryRemnant) and on_host is not None:
                    parts = memory.tensors(on_host[layer])
                witness = witnesses[layer]
                assert witness is not None
                kept.append([time.carried, channel.carried, witness, *parts])
            return kept

        return tensors

    def recover(
        self,
        model: LanguageModel,
        layer: int,
        x: Tensor,
        after: ExactStates,
        record: list[Tensor],
        chunk: Chunk,
        plans: Plans,
    ) -> BlockReplay:
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
        self._checks.append((layer, chunk.index, (found == witness).all()))
        if x.device.type == "cpu":
            self._compare()
        return replay

    def finish(self, outcome: dict[str, Any]) -> None:
        self._compare()

    def _compare(self) -> None:
        checks, self._checks = self._checks, []
        if not checks:
            return
        equal = torch.stack([ok for _, _, ok in checks]).tolist()
        wrong = [(layer, chunk) for (layer, chunk, _), ok in zip(checks, equal, strict=True) if not ok]
        if wrong:
            layer, chunk = wrong[0]
            raise ReversalMismatchError(
                f"the state of layer {layer} before chunk {chunk} could not be rebuilt to the bit: the two sweeps "
                "computed different numbers. Likely causes: a non-deterministic kernel, weights or dropout changed "
                "between the sweeps, another autocast. Use torch.use_deterministic_algorithms(True) or "
                "bptt='checkpoint'"
            )


def _on_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the returned function waits for the copy alone."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait
