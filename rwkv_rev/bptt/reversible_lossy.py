"""``reversible-lossy``: the literal EBRT recipe, states divided back in float64 without a remnant. Approximate.

Every step back multiplies the state's rounding errors by 1/w. The strategy refuses a context over which the fastest
channel would lose more bits than float64 has, and names ``reversible``. Otherwise it reports its drift: at some
boundaries (at most :data:`ANCHORS`) the state is kept, and the rebuilt one compared with it. RWKV-5 only: RWKV-4
forgets whole states within a few tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.records import LayerRecord
from rwkv_rev.bptt.strategy import LanguageModel, LossInputs
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, BlockReplay, ExactStates, Plans
from rwkv_rev.errors import StrategyError
from rwkv_rev.reversal.division import FLOAT64_BITS, LossyState, predicted_bits_lost
from rwkv_rev.reversal.memory import Remnant

ANCHORS = 8


class ReversibleLossy(TwoSweeps):
    """Gradient strategy ``reversible-lossy``; see the module's docstring.

    The report's ``drift`` is the largest relative error (Frobenius norm, by layer) of a rebuilt state at the
    anchored boundaries, ``predicted_bits_lost`` the bits that the fastest channel forgets over the context.
    """

    name = "reversible-lossy"
    exact = False

    def begin(self, model: LanguageModel, inputs: LossInputs) -> None:
        decays: list[Tensor] = []
        for layer, block in enumerate(model.blocks):
            for cell, values in zip(block.cells, inputs.state.layer(layer), strict=True):
                if values.memory is None:
                    continue
                if not cell.inverts_memory:
                    raise StrategyError(
                        "reversible-lossy needs RWKV-5: an RWKV-4 state is forgotten within a few tokens; use "
                        "'reversible'"
                    )
                decays.append(cell.log_decay().detach())
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
        return [tuple(_divided(state) for state in layer) for layer in states]

    def keep(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> list[list[Remnant]]:
        anchored = self._recorded % self._every == 0
        self._recorded += 1
        return [
            [
                _Anchored(remnant, state.memory.tensors() if anchored and state.memory is not None else [])
                for state, remnant in zip(states, layer.remnants, strict=True)
            ]
            for states, layer in zip(before, advanced, strict=True)
        ]

    def recover(self, after: ExactStates, record: LayerRecord, plans: Plans) -> BlockAgain:
        remnants = tuple(state.remnant(kept[:1]) for state, kept in zip(after, record.cells, strict=True))
        return BlockAgain(after, plans, remnants)

    def recovered(self, replay: BlockReplay, record: LayerRecord) -> None:
        for state, (_, *anchors) in zip(replay.states, record.cells, strict=True):
            for anchor in anchors:
                rebuilt = state.memory.value(anchor.dtype)
                self._drifts.append((rebuilt - anchor).norm() / anchor.norm().clamp(min=1e-300))

    def finish(self, outcome: dict[str, Any]) -> None:
        outcome["predicted_bits_lost"] = self._bits
        outcome["drift"] = float(torch.stack(self._drifts).max()) if self._drifts else 0.0


def _divided(state: Any) -> Any:
    return state if state.memory is None else replace(state, memory=LossyState.of(state.memory))


@dataclass(frozen=True)
class _Anchored:
    """A cell's remnant, and at an anchor the memory before the chunk, to compare the rebuilt one with."""

    remnant: Remnant
    anchor: list[Tensor]
    size: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return [*self.remnant.tensors(None), *self.anchor]
