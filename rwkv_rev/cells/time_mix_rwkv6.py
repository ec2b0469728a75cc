"""Time mix of RWKV-6 (Peng et al. 2024, "Eagle and Finch", section 4.2): RWKV-5 whose mixes and decays read the data.

    y_t = r_t (S + diag(u) k_t^T v_t),   S <- diag(w_t) S + k_t^T v_t      (decay on the key index, read before it)

    x_i   = x_t + (x_{t-1} - x_t) (c_i + tanh(x_c A_i) B_i)     for i of w, k, v, r, g
    x_c   = x_t + (x_{t-1} - x_t) c
    log w = -exp(w0 + tanh(x_w w1) w2)                          per token and channel

then GroupNorm over the H heads (eps 64e-5, as in RWKV-5), times ``silu(g)``, then Wo. c and c_i are stored as shares of
the token *before*, 1 - mu of RWKV-4 and 5. The low-rank maps A_i, B_i and w1, w2 are linear layers, so that adapters
find them.

Since the mixes depend on x_{t-1} themselves, no mix can be inverted for it: the token shift carries x_{a-1} unchanged
(mu* = 0 of :mod:`rwkv_rev.cells.token_shift`). The matrix is reversed exactly in fixed point with a factor per row,
head and channel (:mod:`rwkv_rev.reversal.data_decay`); its remnant costs ``sum_t log2(1/w_t)`` bits per chunk and
element, at most 32, and a byte per row of the matrix that says how many.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev.cells.as_written import may_take
from rwkv_rev.cells.cell_plan import CellPlan
from rwkv_rev.cells.gates import norm_and_gate, returns_new_memory
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recurrence_between_ranks import wkv6_pull
from rwkv_rev.cells.shared_chunk import Counted, SharedChunk
from rwkv_rev.cells.shifted_cell import ExactShiftedState, ShiftedCell, ShiftedRemnant
from rwkv_rev.cells.state_pieces import DecayedPiece, recomputed
from rwkv_rev.cells.time_mix_rwkv4 import wide
from rwkv_rev.reversal.data_decay import ChunkDecay, DataDecayed, DataRemnant, KeptRemnant
from rwkv_rev.reversal.division import LossyState
from rwkv_rev.wkv import wkv6, wkv6_contribution

MIXED = ("decay", "key", "value", "receptance", "gate")
"""What has a mix of its own, in the order of the trainer's tensors."""
LARGEST_DECAY = 10.0
"""Of ``w0 + ...``: above it nothing changes, exp(-exp(10)) is zero in float64."""


class Ranks(NamedTuple):
    """Of the low-rank maps: of each mix, and of the decay."""

    mix: int
    decay: int


class TimeProjection(NamedTuple):
    receptance: Tensor  # [B, C, H, N]
    key: Tensor  # [B, C, H, N]
    value: Tensor  # [B, C, H, N]
    log_decay: Tensor  # [B, C, H, N], float32 or wider
    gate: Tensor  # [B, C, D]


class Contribution(NamedTuple):
    update: Tensor  # U [B, H, N, N]
    log_factor: Tensor  # [B, H, N] float64


class TimeMixRwkv6(ShiftedCell):
    """The recurrent half of an RWKV-6 block; memory [B, H, N, N] (key index first), float32 or wider.

    Args:
        num_heads: H.
        head_size: N.
        ranks: of the low-rank maps.
        group_norm_epsilon: eps of the GroupNorm.
    """

    passes_between_ranks = True
    pulls = True
    inverts_memory = True
    mixes_are_tokens = True
    norms_of_tokens = ("ln_x",)

    def __init__(self, num_heads: int, head_size: int, ranks: Ranks, *, group_norm_epsilon: float) -> None:
        super().__init__()
        width = num_heads * head_size
        self.num_heads = num_heads
        self.head_size = head_size

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.mix_before_input = nn.Parameter(torch.empty(width))
        for name in MIXED:
            self.register_parameter(f"mix_before_{name}", nn.Parameter(torch.empty(width)))
            self.add_module(f"{name}_mix_down", linear(width, ranks.mix))
            self.add_module(f"{name}_mix_up", linear(ranks.mix, width))
        self.decay_base = nn.Parameter(torch.empty(width))
        self.decay_down = linear(width, ranks.decay)
        self.decay_up = linear(ranks.decay, width)
        self.bonus = nn.Parameter(torch.empty(num_heads, head_size))
        self.receptance = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.gate = linear(width, width)
        self.output = linear(width, width)
        self.ln_x = nn.GroupNorm(num_heads, width, eps=group_norm_epsilon)

    def mixes(self) -> list[Tensor]:
        """Of the token itself and of the one before, as they are: what is mixed of them depends on both."""
        share = self.mix_before_input.detach()
        return [torch.ones_like(share), torch.zeros_like(share)]

    def plan_sources(self) -> list[Tensor]:
        return [
            self.mix_before_input,
            *(getattr(self, f"mix_before_{name}") for name in MIXED),
            self.decay_base,
        ]

    def project(self, *mixed: Tensor) -> TimeProjection:
        now, before = mixed
        heads = (*now.shape[:2], self.num_heads, self.head_size)
        change = before - now
        common = torch.addcmul(now, change, self.mix_before_input.to(now.dtype))
        kept = torch.is_grad_enabled()

        def to(name: str) -> Tensor:
            down, up = getattr(self, f"{name}_mix_down"), getattr(self, f"{name}_mix_up")
            base, share = getattr(self, f"mix_before_{name}"), up(torch.tanh(down(common)))
            in_place = not kept and share.dtype == base.dtype and returns_new_memory(up)
            share = (share.add_(base) if in_place else base + share).to(now.dtype)
            return torch.addcmul(now, change, share, out=None if kept else share)

        decay, base = self.decay_up(torch.tanh(self.decay_down(to("decay")))), wide(self.decay_base)
        in_place = not kept and decay.dtype == base.dtype and returns_new_memory(self.decay_up)
        decay = decay.add_(base) if in_place else base + decay
        return TimeProjection(
            self.receptance(to("receptance")).view(heads),
            self.key(to("key")).view(heads),
            self.value(to("value")).view(heads),
            _log_decay(decay).view(heads),
            self.gate(to("gate")),
        )

    def compute(
        self, projection: TimeProjection, memory: Tensor | None, mask: ChunkMask | None, plan: None = None
    ) -> tuple[Tensor, Contribution]:
        assert memory is not None
        receptance, key, value, log_decay, _ = projection
        valid = None if mask is None else mask.valid
        y, *contribution = wkv6(receptance, key, value, log_decay, wide(self.bonus), memory, valid)
        return y, Contribution(*contribution)

    def output_of(self, projection: TimeProjection, read: Tensor) -> Tensor:
        gate, dtype = projection.gate, projection.receptance.dtype
        own = may_take(self, self.gate)
        out: Tensor = self.output(norm_and_gate(self.ln_x, read, gate, dtype, own=own))
        return out

    def update(
        self,
        memory: Tensor | None,
        projection: TimeProjection,
        contribution: Contribution,
        mask: ChunkMask | None,
    ) -> Tensor:
        assert memory is not None
        update, log_factor = contribution
        return torch.exp(log_factor).to(update.dtype)[..., None] * memory + update

    def exact_memory(self, memory: Tensor) -> DataDecayed:
        return DataDecayed.of(memory, wide=self.memory_dtype() == torch.float64)

    @classmethod
    def exact_memory_at_once(
        cls, cells: "Sequence[TimeMixRwkv6]", memories: Sequence[Tensor]
    ) -> list[DataDecayed]:
        dtypes = {cell.memory_dtype() for cell in cells}
        if len(dtypes) > 1:
            return [cell.exact_memory(memory) for cell, memory in zip(cells, memories, strict=True)]
        return DataDecayed.of_each(memories, wide=dtypes == {torch.float64})

    def memory_dtype(self) -> torch.dtype:
        # of what is stored: a parametrization, which may draw, is not asked
        return torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32

    def advance_memory(
        self,
        memory: DataDecayed,
        projection: TimeProjection,
        contribution: Contribution,
        mask: ChunkMask | None,
        plan: None,
    ) -> tuple[DataDecayed, DataRemnant]:
        update, log_factor = contribution
        return memory.advance(update, None, _decay(log_factor))

    def lossy(self, state: ExactShiftedState) -> ExactShiftedState:
        """With a memory in float64 that is divided back."""
        assert state.memory is not None
        return replace(state, memory=LossyState.of(state.memory))

    def divided_by(self, remnant: ShiftedRemnant) -> Tensor | None:
        decay: Tensor | None = remnant.memory.decay
        return decay

    def retreat_memory(
        self,
        memory: DataDecayed,
        projection: TimeProjection,
        mask: ChunkMask | None,
        remnant: KeptRemnant,
        plan: None,
    ) -> DataDecayed:
        return self.undo(memory, self._written(projection, mask), mask, remnant, plan)

    def undo(
        self,
        memory: DataDecayed,
        contribution: Contribution,
        mask: ChunkMask | Counted | None,
        remnant: KeptRemnant,
        plan: None,
    ) -> DataDecayed:
        update, log_factor = contribution
        return memory.retreat(update, None, remnant, _decay(log_factor))

    def _written(self, projection: TimeProjection, mask: ChunkMask | None) -> Contribution:
        """The contribution of some tokens."""
        valid = None if mask is None else mask.valid
        return Contribution(*wkv6_contribution(projection.key, projection.value, projection.log_decay, valid))

    def nothing(self, projection: TimeProjection) -> Tensor:
        key = projection.key
        return key.new_zeros(key.shape[0], *key.shape[2:], key.shape[3], dtype=self.memory_dtype())

    def piece(
        self, projection: TimeProjection, chunk: SharedChunk, plan: CellPlan | None = None
    ) -> DecayedPiece:
        valid = None if chunk.mask is None else chunk.mask.valid

        def written(key: Tensor, value: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
            return wkv6_contribution(key, value, log_decay, valid)

        update, log_factor = recomputed(written, projection.key, projection.value, projection.log_decay)
        return DecayedPiece(log_factor, update, of_data=True)

    def pull(self, projection: TimeProjection, d_read: Tensor, mask: ChunkMask | None) -> Tensor:
        valid = None if mask is None else mask.valid
        return wkv6_pull(projection.receptance, d_read, projection.log_decay, valid)

    def received(
        self, rank: int, sent: list[Tensor], projection: TimeProjection, chunk: SharedChunk
    ) -> DecayedPiece:
        update, log_factor = sent
        return DecayedPiece(log_factor, update, of_data=True)

    def contribution(self, total: DecayedPiece, memory: Tensor | None, whole: Counted | None) -> Contribution:
        return Contribution(total.update, total.log_factor)


def _log_decay(x: Tensor) -> Tensor:
    """``-exp(x)``; without gradients in the memory of x, as new memory costs more than the arithmetic on a CPU."""
    if torch.is_grad_enabled():
        return -torch.exp(x.clamp(max=LARGEST_DECAY))
    return x.clamp_(max=LARGEST_DECAY).exp_().neg_()


def _decay(log_factor: Tensor) -> ChunkDecay:
    return ChunkDecay(torch.exp(log_factor.double())[..., None])
