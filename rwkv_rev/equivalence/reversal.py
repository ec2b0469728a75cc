"""Whether states come back to the bit, what that costs, and what would happen without remnants.

The model reads a text chunk by chunk and then goes back over *all* boundaries by the very functions with which the
``reversible`` strategy keeps and recovers states, remnants on a real tape. Every rebuilt state
(token shifts and memory of both cells of every layer) and every output is compared with the one of the forward
sweep, which this check alone stores whole.

Bits are counted for the memory of the recurrence as in :mod:`~rwkv_rev.equivalence.forgetting`: *theory* is what its
decay destroys, *used* what lies on the tape. The carried token shifts, two vectors per layer and chunk, come on top.
The first chunk is run back like the others but not counted: the state before it is given, and training keeps no
remnant for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.layers import LayerGraph, advance_layers, replay_layers
from rwkv_rev.bptt.records import fingerprints, layer_record, make_record
from rwkv_rev.bptt.reversible import Reversible
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells.block import Block, BlockAgain, ExactStates, Plans
from rwkv_rev.cells.contract import parts_of
from rwkv_rev.equivalence.forgetting import Kept, kept_by
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.reversal.drift import division_drift
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.tables import aligned, wrapped

CONTEXT = 4096
CHUNK = 256
DRIFT_STEPS = (16, 64, 256, 1024, 4096)
LOST = 1.0
"""Relative error from which on nothing of a state is left."""


@dataclass(frozen=True)
class DriftRow:
    """Plain division, ``steps`` tokens back: over all channels the median error and the share of lost channels."""

    steps: int
    dtype: str
    median: float
    lost: float


@dataclass(frozen=True)
class ReversalCheck:
    """Outcome of :func:`check_reversal`.

    Attributes:
        context: T, tokens. chunk: C, tokens per chunk. boundaries: how many states were rebuilt, per layer.
        mismatch: the first state that did not come back to the bit, in words; None when all did.
        counted: tokens of all chunks but the first, to which the following belong.
        layers: what each layer kept. tape_bytes: all that lay on the tape, fingerprints too.
        drift: plain division in float32 and float64 on the model's decays; empty where no constant decays divide.
    """

    context: int
    chunk: int
    boundaries: int
    mismatch: str | None
    counted: int
    layers: tuple[Kept, ...]
    tape_bytes: int
    drift: tuple[DriftRow, ...]

    @property
    def total(self) -> Kept:
        """Of all layers."""
        return sum(self.layers, Kept())

    @property
    def used_bits(self) -> int:
        """Of memory remnants on the tape."""
        return self.total.remnants

    @property
    def theory_bits(self) -> float | None:
        """What decays and transitions destroyed; None where it is not known."""
        return self.total.theory

    @property
    def whole_bits(self) -> int:
        """Of whole memories at the same boundaries."""
        return self.total.whole

    @property
    def shift_bytes(self) -> int:
        """Of carried token shifts."""
        return self.total.shifts

    @property
    def passed(self) -> bool:
        """Every state and output came back to the bit."""
        return self.mismatch is None

    @property
    def bytes_per_token(self) -> float:
        """Tape bytes per token of one row."""
        return self.tape_bytes / max(1, self.counted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite error becomes None."""
        return {
            "passed": self.passed,
            "context": self.context,
            "chunk": self.chunk,
            "boundaries": self.boundaries,
            "mismatch": self.mismatch,
            "counted_tokens": self.counted,
            "tape_bytes": self.tape_bytes,
            "tape_bytes_per_token": self.bytes_per_token,
            "shift_bytes": self.shift_bytes,
            "memory_bits": _bits(self.total) | {"layers": [_bits(layer) for layer in self.layers]},
            "division_drift": [
                {
                    "steps": row.steps,
                    "dtype": row.dtype,
                    "median_relative_error": row.median if math.isfinite(row.median) else None,
                    "lost_channels": row.lost,
                }
                for row in self.drift
            ],
        }

    def lines(self) -> list[str]:
        """The section for people."""
        verdict = f"bit-exact at all {self.boundaries:,} boundaries: yes"
        if self.mismatch is not None:
            verdict = f"bit-exact at all {self.boundaries:,} boundaries: NO, {self.mismatch}"
        used = 100 * self.used_bits / max(1, self.whole_bits)
        theory = ""
        if self.theory_bits is not None:
            theory = f" (theory {100 * self.theory_bits / max(1, self.whole_bits):.1f} %)"
        shifts = self.shift_bytes / max(1, self.counted)
        prose = [
            f"reversal over {self.context:,} tokens in chunks of {self.chunk:,}",
            verdict,
            f"tape: {self.bytes_per_token:,.0f} bytes per token; memory remnants {used:.1f} % of whole "
            f"states{theory}, token shifts {shifts:,.0f} bytes per token",
        ]
        lines = [line for text in prose for line in wrapped(text)]
        if not self.drift:
            return lines + self._by_layer()
        lines += wrapped(
            "without remnants, by plain division (relative error in the median channel; channels with nothing left):"
        )
        dtypes = list(dict.fromkeys(row.dtype for row in self.drift))
        header = ["steps back", *(cell for name in dtypes for cell in (name, "lost"))]
        by_step: dict[int, list[str]] = {}
        for row in self.drift:
            by_step.setdefault(row.steps, [str(row.steps)]).extend(
                (f"{row.median:.1e}", f"{100 * row.lost:.0f} %")
            )
        return [*lines, *aligned(header, list(by_step.values()))]

    def _by_layer(self) -> list[str]:
        """A table of memories whose remnants follow from the text."""
        if self.theory_bits is None or not self.whole_bits:
            return []
        rows = [
            [str(number), *(f"{32 * bits / layer.whole:.2f}" for bits in _bits(layer).values())]
            for number, layer in enumerate(self.layers)
        ]
        return [
            *wrapped("bits per element of the memories and chunk, by layer:"),
            *aligned(["layer", "used", "theory", "whole"], rows),
        ]


def _bits(kept: Kept) -> dict[str, Any]:
    return {"used": kept.remnants, "theory": kept.theory, "whole": kept.whole}


def chunk_for(context: int, chunk: int | None, default: int) -> int:
    """The chunk length asked for, else ``default`` or as much as leaves four chunks of a short text."""
    return chunk if chunk is not None else min(default, max(1, context // 4))


@torch.no_grad()
def check_reversal(
    model: RwkvRevForCausalLM,
    ids: Tensor,
    *,
    chunk: int | None = None,
    drift_steps: tuple[int, ...] = DRIFT_STEPS,
) -> ReversalCheck:
    """Run ``ids`` [T] forwards and backwards.

    Args:
        model: in eval mode, any device.
        ids: the text.
        chunk: C; :data:`CHUNK`, or a quarter of a shorter text, when None.
        drift_steps: distances for the table of plain division.
    """
    context = len(ids)
    chunk = chunk_for(context, chunk, CHUNK)
    inputs = LossInputs(
        input_ids=ids[None],
        inputs_embeds=None,
        valid=None,
        targets=ids[None],
        divisor=1.0,
        state=model.model.initial_state(1),
    )
    chunks = inputs.chunks(chunk)
    blocks = model.blocks
    for block in blocks:
        block.lift(True)
    plans = {c.length: [block.plan(c.length) for block in blocks] for c in chunks}
    strategy = Reversible(chunk)
    states = [block.exact(inputs.state.layer(i)) for i, block in enumerate(blocks)]
    stored: list[list[LayerGraph]] = []
    decays = [cell.log_decay() for block in blocks for cell in block.cells]
    kept, nbytes = [Kept() for _ in blocks], 0
    with Tape("host", ids.device) as tape:
        for part in chunks:
            x, plan = part.embed(model), plans[part.length]
            # token shifts as this chunk reads them, and outputs
            stored.append(replay_layers(blocks, x, partial(_again, states, plan), None))
            advanced = advance_layers(blocks, x, states, plan, None, whole_output=False)
            record = make_record(states, advanced, strategy.keep(states, advanced), exact=True).start()()
            start = tape.nbytes
            tape.push(record)
            states_before, states = states, [layer.states for layer in advanced]
            if part.index == 0:
                continue
            nbytes += tape.nbytes - start
            for i, (block, before, layer) in enumerate(zip(blocks, states_before, advanced, strict=True)):
                own = layer_record(record, i, len(before))
                kept[i] += kept_by(block.cells, before, layer.remnants, own, part.length)
        mismatch = None
        for part in reversed(chunks):
            record_back = tape.pop()
            expected, plan = stored[part.index], plans[part.length]

            def ask(
                layer: int,
                after: list[ExactStates] = states,
                kept: list[list[Tensor]] = record_back,
                plan: list[Plans] = plan,
            ) -> BlockAgain:
                return strategy.recover(
                    after[layer], layer_record(kept, layer, len(after[layer])), plan[layer]
                )

            rebuilt = replay_layers(blocks, part.embed(model), ask, None)
            for number, (found, first) in enumerate(zip(rebuilt, expected, strict=True)):
                compared = layer_record(record_back, number, len(states[number])).compared
                prints = [found.replay.print, *fingerprints(found.replay.states)]
                if not _equal(prints, compared):
                    mismatch = f"the fingerprint of layer {number} before chunk {part.index} differs"
                    break
                different = _first_difference(blocks[number], found.replay.states, first.replay.states) or (
                    None if _equal(parts_of(found.out), parts_of(first.out)) else "the output"
                )
                if different:
                    mismatch = f"{different} of layer {number} differs before chunk {part.index}"
                    break
            if mismatch is not None:
                break
            states = [layer.replay.states for layer in rebuilt]
    return ReversalCheck(
        context=context,
        chunk=chunk,
        boundaries=len(chunks),
        mismatch=mismatch,
        counted=context - chunks[0].length,
        layers=tuple(kept),
        tape_bytes=nbytes,
        drift=_drift([decay.detach().flatten() for decay in decays if decay is not None], drift_steps),
    )


def _again(states: list[ExactStates], plan: list[Plans], layer: int) -> BlockAgain:
    return BlockAgain(states[layer], plan[layer])


def _drift(log_decays: list[Tensor], steps: tuple[int, ...]) -> tuple[DriftRow, ...]:
    if not any(bool(decay.any()) for decay in log_decays):
        return ()  # nothing is divided
    log_decay = torch.cat(log_decays)
    errors = {dtype: division_drift(log_decay, steps, dtype) for dtype in (torch.float32, torch.float64)}
    return tuple(
        DriftRow(
            back,
            str(dtype).removeprefix("torch."),
            float(error[i].median()),
            float((error[i] >= LOST).double().mean()),
        )
        for i, back in enumerate(steps)
        for dtype, error in errors.items()
    )


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _first_difference(block: Block, rebuilt: ExactStates, expected: ExactStates) -> str | None:
    """What differs between two exact states of a block, or None."""
    for (_, name), cell, one, other in zip(block.names, block.cells, rebuilt, expected, strict=True):
        for index, (found, known) in enumerate(zip(one.tensors(), other.tensors(), strict=True)):
            if not torch.equal(found, known):
                what = "token shift" if index < cell.shifts else "memory"
                return f"the {what} of the {name.replace('_', ' ')}"
    return None
