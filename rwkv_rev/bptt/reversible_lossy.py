"""``reversible-lossy``: the literal EBRT recipe, states divided back in float64 without a remnant. Approximate.

Every step back multiplies the state's rounding errors by 1/w. The strategy refuses a context over which the fastest
channel would lose more bits than float64 has, and names ``reversible``: beforehand where decays are constants, and
where they depend on the data between the sweeps. Otherwise it reports its drift: at some boundaries (at most
:data:`ANCHORS`) the state is kept, and the rebuilt one compared with it. For memories that decay elementwise, and such
as forget nothing: RWKV-4 forgets whole states within a few tokens, RWKV-7's transition is no division.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.records import LayerRecord
from rwkv_rev.bptt.strategy import LanguageModel, LossInputs
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, BlockReplay, ExactStates, Plans
from rwkv_rev.errors import StrategyError
from rwkv_rev.reversal.division import FLOAT64_BITS, predicted_bits_lost
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
        if inputs.borders is not None:
            raise StrategyError(
                "reversible-lossy divides states back without a remnant, and a border (several documents packed into "
                "one row) forgets them whole: use 'reversible', which is exact"
            )
        self._cells = [block.cells for block in model.blocks]
        decays = [cell.log_decay() for cells in self._cells for cell in cells]
        flat = [decay.detach().flatten() for decay in decays if decay is not None]
        self._bits = predicted_bits_lost(torch.cat(flat), inputs.length) if flat else 0.0
        divided(self._cells, [block.exact(inputs.state.layer(n)) for n, block in enumerate(model.blocks)])
        self._length = inputs.length
        self._refuse_noise()
        self._forgotten: dict[tuple[int, int], Tensor] = {}
        chunks = -(-inputs.length // self.chunk_length)
        self._every = max(1, chunks // ANCHORS)
        self._recorded = 0
        self._drifts: list[Tensor] = []

    def prepare(self, states: list[ExactStates]) -> list[ExactStates]:
        return divided(self._cells, states)

    def keep(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> list[list[Remnant]]:
        anchored = self._recorded % self._every == 0
        if self._recorded:  # what is before the first chunk is given
            self._note_factors(advanced)
        self._recorded += 1
        return [
            [
                _Anchored(remnant, state.tensors()[cell.shifts :] if anchored else [])
                for cell, state, remnant in zip(cells, states, layer.remnants, strict=True)
            ]
            for cells, states, layer in zip(self._cells, before, advanced, strict=True)
        ]

    def recover(self, after: ExactStates, record: LayerRecord, plans: Plans) -> BlockAgain:
        if self._forgotten:
            self._bits = max(self._bits, *(float(bits.max()) for bits in self._forgotten.values()))
            self._forgotten.clear()
            self._refuse_noise()
        cells = self._cells[
            0
        ]  # all blocks have cells of the same kinds; without a remnant their shifts are left
        kept = zip(cells, after, record.cells, strict=True)
        remnants = tuple(state.remnant(tensors[: cell.shifts]) for cell, state, tensors in kept)
        return BlockAgain(after, plans, remnants)

    def recovered(self, replay: BlockReplay, record: LayerRecord) -> None:
        for cell, state, kept in zip(self._cells[0], replay.states, record.cells, strict=True):
            for rebuilt, anchor in zip(state.tensors()[cell.shifts :], kept[cell.shifts :], strict=False):
                error = (rebuilt.double() - anchor.double()).norm()
                self._drifts.append(error / anchor.double().norm().clamp(min=1e-300))

    def _note_factors(self, advanced: list[BlockAdvanced]) -> None:
        """Add what a chunk's factors forget of each channel, in bits, where they depend on the data."""
        for layer, (cells, block) in enumerate(zip(self._cells, advanced, strict=True)):
            for place, (cell, remnant) in enumerate(zip(cells, block.remnants, strict=True)):
                if (factor := cell.divided_by(remnant)) is not None:
                    bits = -torch.log2(factor)
                    former = self._forgotten.get((layer, place))
                    self._forgotten[layer, place] = bits if former is None else former + bits

    def _refuse_noise(self) -> None:
        if self._bits > FLOAT64_BITS:
            lost = f"{self._bits:.0f} bits" if math.isfinite(self._bits) else "all bits of a channel"
            raise StrategyError(
                f"reversible-lossy would lose {lost} over {self._length} tokens, float64 has {FLOAT64_BITS}; use "
                "'reversible', which is exact"
            )

    def finish(self, outcome: dict[str, Any]) -> None:
        outcome["predicted_bits_lost"] = self._bits
        outcome["drift"] = float(torch.stack(self._drifts).max()) if self._drifts else 0.0


def divided(cells: Sequence[Sequence[Any]], states: list[ExactStates]) -> list[ExactStates]:
    """The states [layer][cell] of ``cells`` in the form that is divided back.

    Raises:
        StrategyError: names what has no such form.
    """
    found = [
        tuple(cell.lossy(state) for cell, state in zip(layer, given, strict=True))
        for layer, given in zip(cells, states, strict=True)
    ]
    for layer, forms in zip(cells, found, strict=True):
        for cell, form in zip(layer, forms, strict=True):
            if form is None:
                raise StrategyError(
                    "reversible-lossy needs RWKV-5 or 6, or another memory that decays elementwise: "
                    f"{cell.undividable} cannot be divided back; use 'reversible'"
                )
    return found


@dataclass(frozen=True)
class _Anchored:
    """A cell's remnant, and at an anchor the memory before the chunk, to compare the rebuilt one with."""

    remnant: Remnant
    anchor: list[Tensor]
    size: None = None
    excess: None = None

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        return [*self.remnant.tensors(None), *self.anchor]
