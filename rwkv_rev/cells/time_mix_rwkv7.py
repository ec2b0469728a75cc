"""Time mix of RWKV-7 (Peng et al. 2025, "RWKV-7 Goose", section 4): a matrix per head that is edited under keys.

    S <- (diag(w_t) - (a_t kappa_t)^T kappa_t) S + k_t^T v_t,      y_t = r_t S       (key index first, read after it)

    log w = -e^{-1/2} sigmoid(w0 + tanh(x_w w1) w2)     what is forgotten, at most 0.875 bit a step
    a     = sigmoid(a0 + x_a a1 a2)                     the in-context rate, how much is taken out under kappa
    kappa = k * k_k, of length one in each head         k <- k (1 + (a - 1) k_a)
    v    <- v + (v_first - v) sigmoid(v0 + x_v v1 v2)   above layer 0, whose own v is v_first
    g     = sigmoid(x_g g1) g2

then ``Wo (g * (GroupNorm(y) + (sum_n r k r_k) v))``. What each of these reads is ``x_t + (x_{t-1} - x_t) c``, with a
stored c: the share of the token *before*, 1 - mu of RWKV-4 and 5. GroupNorm is as in RWKV-5 (eps 64e-5). The low-rank
maps are linear layers, so that adapters find them; ``v_first`` [B, C, D] flows beside the residual.

**The remnant of this cell is its state itself**, N D numbers a row, layer and chunk, or with ``remnants="lifted"`` what
the chunk's transition destroys of it (:mod:`rwkv_rev.reversal.lifting`). The transition is no elementwise factor, so
that there is none to divide by, and it can be singular: with a = 1 and w = 1 it is a projection.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_rev.cells.cell_plan import CellPlan
from rwkv_rev.cells.gates import norm_and_gate
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recurrence_between_ranks import wkv7_relayed
from rwkv_rev.cells.shared_chunk import SharedChunk
from rwkv_rev.cells.shifted_state import ShiftedRemnant
from rwkv_rev.cells.state_pieces import MatrixPiece, recomputed
from rwkv_rev.cells.time_mix_rwkv4 import wide
from rwkv_rev.cells.whole_memory import WholeMemoryCell
from rwkv_rev.distributed.context_group import ContextGroup
from rwkv_rev.reversal.lifting import Lifted, LiftingPlan, Transition
from rwkv_rev.reversal.whole import Whole
from rwkv_rev.wkv import is_fused, wkv7, wkv7_transition

FASTEST_DECAY = math.exp(-0.5)
"""-log w is below it."""
SHORTEST = 1e-12
"""Length below which a key is not made one of length one."""


class Ranks(NamedTuple):
    """Of the low-rank maps; ``residual`` None in layer 0, which makes ``v_first``."""

    decay: int
    rate: int
    gate: int
    residual: int | None = None


class TimeProjection(NamedTuple):
    receptance: Tensor  # [B, C, H, N]
    key: Tensor  # [B, C, H, N]
    value: Tensor  # [B, C, H, N]
    log_decay: Tensor  # [B, C, H, N], float32 or wider
    removal: Tensor  # [B, C, H, N], kappa, float32 or wider
    rate: Tensor  # [B, C, H, N]
    gate: Tensor  # [B, C, D]


class TimeMixRwkv7(WholeMemoryCell):
    """The recurrent half of an RWKV-7 block; memory [B, H, N, N] (key index first), float32 or wider.

    Args:
        num_heads: H.
        head_size: N.
        ranks: of the low-rank maps.
        group_norm_epsilon: eps of the GroupNorm.
    """

    passes_between_ranks = True
    relayed_ranks = 3  # a piece takes three times what the tokens take, and more for its gradient
    reads_beside = True
    norms_of_tokens = ("ln_x",)
    undividable = (
        "the state of RWKV-7, whose transition is not elementwise and can be singular (a projection where its "
        "in-context rate and its decay are 1),"
    )

    def __init__(self, num_heads: int, head_size: int, ranks: Ranks, *, group_norm_epsilon: float) -> None:
        super().__init__()
        width = num_heads * head_size
        self.num_heads = num_heads
        self.head_size = head_size

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(width))

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.mix_before_receptance = vector()
        self.mix_before_decay = vector()
        self.mix_before_key = vector()
        self.mix_before_value = vector()
        self.mix_before_rate = vector()
        self.mix_before_gate = vector()
        self.decay_base = vector()
        self.decay_down = linear(width, ranks.decay)
        self.decay_up = linear(ranks.decay, width)
        self.rate_base = vector()
        self.rate_down = linear(width, ranks.rate)
        self.rate_up = linear(ranks.rate, width)
        self.makes_first = ranks.residual is None
        if ranks.residual is not None:
            self.residual_base = vector()
            self.residual_down = linear(width, ranks.residual)
            self.residual_up = linear(ranks.residual, width)
        self.gate_down = linear(width, ranks.gate)
        self.gate_up = linear(ranks.gate, width)
        self.removal_scale = vector()
        self.rate_scale = vector()
        self.bonus = nn.Parameter(torch.empty(num_heads, head_size))
        self.receptance = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.output = linear(width, width)
        self.ln_x = nn.GroupNorm(num_heads, width, eps=group_norm_epsilon)

    def shares_before(self) -> list[Tensor]:
        """c of each mix, as stored."""
        return [
            self.mix_before_receptance,
            self.mix_before_decay,
            self.mix_before_key,
            self.mix_before_value,
            self.mix_before_rate,
            self.mix_before_gate,
        ]

    def mixes(self) -> list[Tensor]:
        return [1 - share for share in self.shares_before()]

    def plan_sources(self) -> list[Tensor]:
        return self.shares_before()

    def project(self, *mixed: Tensor) -> TimeProjection:
        to_receptance, to_decay, to_key, to_value, to_rate, to_gate, *first = mixed
        heads = (*to_key.shape[:2], self.num_heads, self.head_size)
        decay = wide(self.decay_base) + self.decay_up(torch.tanh(self.decay_down(to_decay)))
        rate = torch.sigmoid(self.rate_base + self.rate_up(self.rate_down(to_rate)))
        key, value = self.key(to_key), self.value(to_value)
        removal = (wide(key) * self.removal_scale).view(heads)
        if not self.makes_first:
            share = torch.sigmoid(self.residual_base + self.residual_up(self.residual_down(to_value)))
            value = value + (first[0] - value) * share
        return TimeProjection(
            self.receptance(to_receptance).view(heads),
            (key * (1 + (rate - 1) * self.rate_scale)).view(heads),
            value.view(heads),
            (-FASTEST_DECAY * torch.sigmoid(decay)).view(heads),
            F.normalize(removal, dim=-1, eps=SHORTEST),
            rate.view(heads),
            self.gate_up(torch.sigmoid(self.gate_down(to_gate))),
        )

    def handed_up(self, projection: TimeProjection) -> tuple[Tensor, ...]:
        return (projection.value.flatten(2),) if self.makes_first else ()

    def memory_plan(self, length: int, piece: int | None = None) -> LiftingPlan | None:
        return LiftingPlan() if self.lifts else None

    def compute(
        self, projection: TimeProjection, memory: Tensor | None, mask: ChunkMask | None, plan: None = None
    ) -> tuple[Tensor, Tensor]:
        assert memory is not None
        receptance, key, value, log_decay, removal, rate, _ = projection
        valid = None if mask is None else mask.valid
        y, after = wkv7(receptance, key, value, log_decay, removal, rate, memory, valid)
        if mask is not None and not mask.everywhere:
            # a product with the unit matrix would turn -0.0 into 0.0
            after = torch.where((mask.count > 0)[:, None, None, None], after, memory)
        return y, after

    def output_of(self, projection: TimeProjection, read: Tensor) -> Tensor:
        receptance, key, value, *_, gate = projection
        own = (receptance * self.bonus * key).sum(-1, keepdim=True) * value
        out = norm_and_gate(self.ln_x, read, None, receptance.dtype) + own.flatten(2)
        mapped: Tensor = self.output((out * gate).to(receptance.dtype))
        return mapped

    def lift(self, wanted: bool) -> None:
        self.lifts = wanted

    @property
    def inverts_memory(self) -> bool:  # type: ignore[override]
        return self.lifts

    def exact_memory(self, memory: Tensor) -> Any:
        return Lifted.of(memory) if self.lifts else Whole(memory)

    @classmethod
    def exact_memory_at_once(cls, cells: "Sequence[TimeMixRwkv7]", memories: Sequence[Tensor]) -> list[Any]:
        if all(cell.lifts for cell in cells):
            return Lifted.of_each(memories)
        return [cell.exact_memory(memory) for cell, memory in zip(cells, memories, strict=True)]

    def memory_dtype(self) -> torch.dtype:
        # of what is stored: a parametrization, which may draw, is not asked
        return torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32

    def advance_memory(
        self,
        memory: Any,
        projection: TimeProjection,
        contribution: Tensor,
        mask: ChunkMask | None,
        plan: LiftingPlan | None,
    ) -> tuple[Any, Any]:
        if plan is None:
            return memory.advance(contribution)
        return memory.advance(_transition(projection, mask), plan)

    def divided_by(self, remnant: ShiftedRemnant) -> Tensor | None:
        """The singular values of the transition: what they are below one is what it destroys."""
        if not self.lifts:
            return None
        factors: Tensor = torch.linalg.svdvals(remnant.memory.matrix.double())
        return factors.clamp(max=1)

    def retreat_memory(
        self,
        memory: Any,
        projection: TimeProjection,
        mask: ChunkMask | None,
        remnant: Any,
        plan: LiftingPlan | None,
    ) -> Any:
        if plan is None:
            return Whole(remnant.before)
        return memory.retreat(_transition(projection, mask), remnant)

    def nothing(self, projection: TimeProjection) -> Tensor:
        key = projection.key
        return key.new_zeros(
            key.shape[0], *key.shape[2:], key.shape[3], dtype=torch.promote_types(key.dtype, torch.float32)
        )

    def piece(
        self, projection: TimeProjection, chunk: SharedChunk, plan: CellPlan | None = None
    ) -> MatrixPiece:
        """From nothing with the values, and from the unit matrix without them: rows of one call."""
        valid = None if chunk.mask is None else torch.cat([chunk.mask.valid] * 2)
        nothing = self.nothing(projection)
        unit = torch.eye(self.head_size, dtype=nothing.dtype, device=nothing.device).expand_as(nothing)
        starts = torch.cat([nothing, unit])

        def both(*given: Tensor) -> tuple[Tensor, ...]:
            key, _, log_decay, removal, rate = (torch.cat([x, x]) for x in given)
            value = torch.cat([given[1], torch.zeros_like(given[1])])
            nothing = torch.zeros_like(key)
            after: Tensor = wkv7(nothing, key, value, log_decay, removal, rate, starts, valid)[1]
            return after.chunk(2)

        _, key, value, log_decay, removal, rate, _ = projection
        update, transition = recomputed(both, key, value, log_decay, removal, rate)
        return MatrixPiece(transition, update)

    def relayed(
        self, projection: TimeProjection, memory: Tensor, group: ContextGroup
    ) -> tuple[Tensor, Tensor] | None:
        if not is_fused(projection.key):
            return None
        receptance, key, value, log_decay, removal, rate, _ = projection
        return wkv7_relayed(receptance, key, value, log_decay, removal, rate, memory, group)

    def received(
        self, rank: int, sent: list[Tensor], projection: TimeProjection, chunk: SharedChunk
    ) -> MatrixPiece:
        return MatrixPiece(*sent)


def _transition(projection: TimeProjection, mask: ChunkMask | None) -> Transition:
    receptance, key, value, log_decay, removal, rate, _ = projection
    valid = None if mask is None else mask.valid
    return Transition(*wkv7_transition(receptance, key, value, log_decay, removal, rate, valid))
