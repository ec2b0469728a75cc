"""Time mix of RWKV-5 (Eagle): a decaying matrix per head (Eagle and Finch paper, section 4.1, eqs. 4-9).

    y_t = r_t (S + diag(u) k_t^T v_t),   S <- diag(w) S + k_t^T v_t      (decay on the key index)

then GroupNorm over the H heads, times ``silu(g)`` in 5.1 and 5.2, then Wo. There is no sigmoid on r. 5.0 and 5.1
have one decay and one bonus per head, 5.2 one per channel. Published models divide by ``head_size_divisor = 8``
before a GroupNorm of eps 1e-5; a GroupNorm of eps 64e-5 without the division is the same function.

The matrix is reversed exactly in fixed point (:mod:`rwkv_rev.reversal.fixed_point`); its remnant costs
``log2(1/w)`` bits per step and element.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev.cells.as_written import may_take
from rwkv_rev.cells.at_once import alike, of_all
from rwkv_rev.cells.cell_plan import CellPlan
from rwkv_rev.cells.changing import refuse_unplanned
from rwkv_rev.cells.gates import norm_and_gate
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recurrence_between_ranks import wkv5_pull
from rwkv_rev.cells.shared_chunk import Counted, SharedChunk
from rwkv_rev.cells.shifted_cell import ExactShiftedState, ShiftedCell
from rwkv_rev.cells.state_pieces import DecayedPiece
from rwkv_rev.cells.time_mix_rwkv4 import log_decay_of, wide
from rwkv_rev.reversal.division import LossyState
from rwkv_rev.reversal.fixed_point import DecayPlan, FixedPoint, MemoryRemnant, decay_plan, decay_plans
from rwkv_rev.wkv import Wkv5Handover, decayed, wkv5, wkv5_contribution, wkv5_plan


class TimeProjection(NamedTuple):
    receptance: Tensor  # [B, C, H, N]
    key: Tensor  # [B, C, H, N]
    value: Tensor  # [B, C, H, N]
    gate: Tensor | None  # [B, C, D]
    log_decay: Tensor  # [H, N]
    handover: Wkv5Handover  # what the contribution and the output share


class MemoryPlan(NamedTuple):
    """What a sweep computes once of the decays, for chunks of one length."""

    reversal: DecayPlan
    recurrence: Any  # of the kernel

    def tensors(self) -> list[Tensor]:
        return self.reversal.tensors()

    def prepare(self) -> None:
        self.reversal.prepare()

    def holds(self, other: "MemoryPlan") -> bool:
        """Where the kernel has a plan of its own, only its own sweep."""
        return self.recurrence is None and self.reversal.holds(other.reversal)


class TimeMixRwkv5(ShiftedCell):
    """The recurrent half of an RWKV-5 block; memory [B, H, N, N] (key index first), float32 or wider.

    Args:
        num_heads: H.
        head_size: N.
        decay_shape: stored shape of ``time_decay`` and ``bonus``, [H] or [H, N].
        gated: whether the output is multiplied by ``silu(gate)``.
        bonus_is_exponential: whether u is ``exp(bonus)``.
        group_norm_epsilon: eps of the GroupNorm (see above).
    """

    passes_between_ranks = True
    pulls = True
    inverts_memory = True
    norms_of_tokens = ("ln_x",)

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        decay_shape: tuple[int, ...],
        *,
        gated: bool,
        bonus_is_exponential: bool,
        group_norm_epsilon: float,
    ) -> None:
        super().__init__()
        hidden_size = num_heads * head_size
        self.num_heads = num_heads
        self.head_size = head_size
        self.bonus_is_exponential = bonus_is_exponential
        self.mix_key = nn.Parameter(torch.empty(hidden_size))
        self.mix_value = nn.Parameter(torch.empty(hidden_size))
        self.mix_receptance = nn.Parameter(torch.empty(hidden_size))
        self.mix_gate = nn.Parameter(torch.empty(hidden_size)) if gated else None
        self.time_decay = nn.Parameter(torch.empty(decay_shape))
        self.bonus = nn.Parameter(torch.empty(decay_shape))
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False) if gated else None
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.ln_x = nn.GroupNorm(num_heads, hidden_size, eps=group_norm_epsilon)

    def mixes(self) -> list[Tensor]:
        mixes: list[Tensor] = [self.mix_key, self.mix_value, self.mix_receptance]
        return mixes if self.mix_gate is None else [*mixes, self.mix_gate]

    def plan_sources(self) -> list[Tensor]:
        return [*self.mixes(), self.time_decay]

    def project(self, *mixed: Tensor) -> TimeProjection:
        to_key, to_value, to_receptance, *to_gate = mixed
        heads = (*to_key.shape[:2], self.num_heads, self.head_size)
        return TimeProjection(
            self.receptance(to_receptance).view(heads),
            self.key(to_key).view(heads),
            self.value(to_value).view(heads),
            None if self.gate is None else self.gate(*to_gate),
            self.log_decay(),
            Wkv5Handover(),
        )

    def log_decay(self) -> Tensor:
        """log w per head and channel [H, N], <= 0, natural logarithm, float32 or wider."""
        return self._per_channel(log_decay_of(self.time_decay))

    @classmethod
    def log_decay_at_once(cls, cells: "Sequence[TimeMixRwkv5]") -> list[Tensor]:
        stored: list[Tensor] = [cell.time_decay for cell in cells]
        if not alike(stored):
            return [cell.log_decay() for cell in cells]
        decays = log_decay_of(torch.stack(stored)).unbind(0)
        return [cell._per_channel(decay) for cell, decay in zip(cells, decays, strict=True)]

    def compute(
        self,
        projection: TimeProjection,
        memory: Tensor | None,
        mask: ChunkMask | None,
        plan: MemoryPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert memory is not None
        receptance, key, value, _, log_decay, handover = projection
        if plan is not None:
            refuse_unplanned(self, log_decay, plan.reversal.log_decay)
        bonus = wide(self.bonus)
        bonus = self._per_channel(torch.exp(bonus) if self.bonus_is_exponential else bonus)
        return wkv5(
            receptance,
            key,
            value,
            log_decay,
            bonus,
            memory,
            None if mask is None else mask.valid,
            plan=None if plan is None else plan.recurrence,
            handover=handover,
        )

    def output_of(self, projection: TimeProjection, read: Tensor) -> Tensor:
        gate, dtype = projection.gate, projection.receptance.dtype
        own = self.gate is not None and may_take(self, self.gate)
        out: Tensor = self.output(norm_and_gate(self.ln_x, read, gate, dtype, own=own))
        return out

    def update(
        self, memory: Tensor | None, projection: TimeProjection, contribution: Tensor, mask: ChunkMask | None
    ) -> Tensor:
        assert memory is not None
        length = projection.key.shape[1]
        return decayed(
            memory, contribution, projection.log_decay, length, None if mask is None else mask.count
        )

    def memory_plan(self, length: int, piece: int | None = None) -> MemoryPlan:
        log_decay, wide = self.log_decay(), self.memory_dtype() == torch.float64
        reversal = decay_plan(log_decay, length, wide=wide)
        return MemoryPlan(reversal, wkv5_plan(log_decay, length if piece is None else piece))

    @classmethod
    def memory_plan_at_once(
        cls, cells: "Sequence[TimeMixRwkv5]", length: int, piece: int | None = None
    ) -> list[MemoryPlan]:
        tokens = length if piece is None else piece
        log_decays = of_all(cells, "log_decay")
        dtypes = {cell.memory_dtype() for cell in cells}
        if not alike(log_decays) or len(dtypes) > 1:
            return [cell.memory_plan(length, piece) for cell in cells]
        reversal = decay_plans(torch.stack(log_decays), length, wide=dtypes == {torch.float64})
        return [
            MemoryPlan(plan, wkv5_plan(log_decay, tokens))
            for plan, log_decay in zip(reversal, log_decays, strict=True)
        ]

    def exact_memory(self, memory: Tensor) -> FixedPoint:
        return FixedPoint.of(memory, wide=self.memory_dtype() == torch.float64)

    @classmethod
    def exact_memory_at_once(
        cls, cells: "Sequence[TimeMixRwkv5]", memories: Sequence[Tensor]
    ) -> list[FixedPoint]:
        dtypes = {cell.memory_dtype() for cell in cells}
        if len(dtypes) > 1:
            return [cell.exact_memory(memory) for cell, memory in zip(cells, memories, strict=True)]
        return FixedPoint.of_each(memories, wide=dtypes == {torch.float64})

    def memory_dtype(self) -> torch.dtype:
        return torch.float64 if self.time_decay.dtype == torch.float64 else torch.float32

    def advance_memory(
        self,
        memory: FixedPoint,
        projection: TimeProjection,
        contribution: Tensor,
        mask: ChunkMask | None,
        plan: MemoryPlan,
    ) -> tuple[FixedPoint, MemoryRemnant]:
        return memory.advance(contribution, None if mask is None else mask.count, plan.reversal)

    def lossy(self, state: ExactShiftedState) -> ExactShiftedState:
        """With a memory in float64 that is divided back."""
        assert state.memory is not None
        return replace(state, memory=LossyState.of(state.memory))

    def retreat_memory(
        self,
        memory: FixedPoint,
        projection: TimeProjection,
        mask: ChunkMask | None,
        remnant: MemoryRemnant,
        plan: MemoryPlan,
    ) -> FixedPoint:
        contribution = self._written(projection, mask, plan, projection.handover)
        return self.undo(memory, contribution, mask, remnant, plan)

    def undo(
        self,
        memory: FixedPoint,
        contribution: Tensor,
        mask: ChunkMask | Counted | None,
        remnant: MemoryRemnant,
        plan: MemoryPlan,
    ) -> FixedPoint:
        return memory.retreat(contribution, None if mask is None else mask.count, remnant, plan.reversal)

    def _written(
        self,
        projection: TimeProjection,
        mask: ChunkMask | None,
        plan: MemoryPlan | None,
        handover: Wkv5Handover | None,
    ) -> Tensor:
        """The contribution of some tokens."""
        return wkv5_contribution(
            projection.key,
            projection.value,
            projection.log_decay,
            None if mask is None else mask.valid,
            plan=None if plan is None else plan.recurrence,
            handover=handover,
        )

    def nothing(self, projection: TimeProjection) -> Tensor:
        key = projection.key
        return key.new_zeros(key.shape[0], *key.shape[2:], key.shape[3], dtype=self.memory_dtype())

    def piece(
        self, projection: TimeProjection, chunk: SharedChunk, plan: CellPlan | None = None
    ) -> DecayedPiece:
        # documents are in rows of their own, for which nothing can be handed over
        handover = projection.handover if chunk.mask is chunk.own else None
        update = self._written(projection, chunk.mask, None if plan is None else plan.memory, handover)
        return DecayedPiece(chunk.times(chunk.group.rank, projection.log_decay), update)

    def pull(self, projection: TimeProjection, d_read: Tensor, mask: ChunkMask | None) -> Tensor:
        valid = None if mask is None else mask.valid
        handover = projection.handover
        return wkv5_pull(projection.receptance, d_read, projection.log_decay, valid, handover=handover)

    def received(
        self, rank: int, sent: list[Tensor], projection: TimeProjection, chunk: SharedChunk
    ) -> DecayedPiece:
        return DecayedPiece(chunk.times(rank, projection.log_decay), sent[0])

    def contribution(self, total: DecayedPiece, memory: Tensor | None, whole: Counted | None) -> Tensor:
        return total.update

    def _per_channel(self, parameter: Tensor) -> Tensor:
        """[H, N] from a parameter stored per head or per channel."""
        return parameter.reshape(self.num_heads, -1).expand(self.num_heads, self.head_size)
