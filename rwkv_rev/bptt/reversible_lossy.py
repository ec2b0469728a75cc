"""``reversible-lossy``: the literal EBRT recipe, states divided back in float64 without a remnant. Approximate.

Every step back multiplies the state's rounding errors by 1/w. The strategy refuses a context over which the fastest
channel would lose more bits than float64 has, and names ``reversible``. Otherwise it reports its drift: at some
boundaries (at most :data:`ANCHORS`) the state is kept, and the rebuilt one compared with it. RWKV-5 only: RWKV-4
forgets whole states within a few tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import LanguageModel, LossInputs
from rwkv_rev.bptt.sweeps import Record, TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, BlockReplay, ExactStates, Plans
from rwkv_rev.cells.cell import Remnant
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.errors import StrategyError
from rwkv_rev.reversal.division import FLOAT64_BITS, LossyState, predicted_bits_lost

ANCHORS = 8


class ReversibleLossy(TwoSweeps):
    """Gradient strategy ``reversible-lossy``; see the module's docstring.

    The report's ``drift`` is the largest relative error (Frobenius norm, by layer) of a rebuilt state at the
    anchored boundaries, ``predicted_bits_lost`` the bits that the fastest channel forgets over the context.
    """

    name = "reversible-lossy"
    exact = False

    def begin(self, model: LanguageModel, inputs: LossInputs) -> None:
        decays = []
        for block in model.blocks:
            if not isinstance(block.time_mix, TimeMixRwkv5):
                raise StrategyError(
                    "reversible-lossy needs RWKV-5: an RWKV-4 state is forgotten within a few tokens; use 'reversible'"
                )
            decays.append(block.time_mix.log_decay().detach())
        self._bits = predicted_bits_lost(torch.stack(decays), inputs.length)
        if self._bits > FLOAT64_BITS:
            raise StrategyError(
                f"reversible-lossy would lose {self._bits:.0f} bits over {inputs.length} tokens, float64 has "
                f"{FLOAT64_BITS}; use 'reversible', which is exact"
            )
        chunks = -(-inputs.length // self.chunk_length)
        self._every = max(1, chunks // ANCHORS)
        self._recorded = 0
        self._drifts: list[Tensor] = []

    def prepare(self, states: list[ExactStates]) -> list[ExactStates]:
        return [(replace(time, memory=LossyState.of(time.memory)), channel) for time, channel in states]

    def record(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> Record:
        anchored = self._recorded % self._every == 0
        self._recorded += 1

        def tensors(raised: Tensor | None) -> list[list[Tensor]]:
            kept = []
            for (time, _), layer in zip(before, advanced, strict=True):
                anchor = [time.memory.state] if anchored else []
                kept.append([*(remnant.carried for remnant in layer.remnants), *anchor])
            return kept

        return Record(None, tensors)

    def recover(self, after: ExactStates, record: list[Tensor], plans: Plans) -> BlockAgain:
        time_carried, channel_carried, *anchor = record
        self._anchor = anchor
        return BlockAgain(after, plans, (Remnant(time_carried, None), Remnant(channel_carried, None)))

    def recovered(self, layer: int, replay: BlockReplay) -> None:
        for anchor in self._anchor:
            rebuilt = replay.states[0].memory.state
            self._drifts.append((rebuilt - anchor).norm() / anchor.norm().clamp(min=1e-300))

    def finish(self, outcome: dict[str, Any]) -> None:
        outcome["predicted_bits_lost"] = self._bits
        outcome["drift"] = float(torch.stack(self._drifts).max()) if self._drifts else 0.0
