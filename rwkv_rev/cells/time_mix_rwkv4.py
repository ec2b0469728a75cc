"""Time mix of RWKV-4: an exponentially decaying weighted mean per channel (RWKV paper, section 3.1.2, eq. 16).

    wkv_t = (a + exp(u + k_t) v_t) / (b + exp(u + k_t)),   a <- w a + exp(k_t) v_t,   b <- w b + exp(k_t)

with a, b scaled by a running maximum exponent m, and ``out = Wo (sigmoid(r) * wkv)``.

**The remnant of this cell is its state itself**, the three numbers (a, b, m) per channel. Reversing in fixed
point would save nothing: trained RWKV-4 channels forget 0.08 to 1.5 bits per step in the median layer (up to 22 in
the fastest), so over a chunk of 64 tokens most of the state's 32 bits are gone, and the state is only three numbers
per channel to the token shift's one. Whole storage costs ``12 D`` bytes per chunk and layer, 1.5 bytes per token
and channel at C = 8 and 0.02 at C = 512, next to some 30 D numbers per token that back-propagation would keep.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev.cells.as_written import may_take
from rwkv_rev.cells.cell_plan import CellPlan
from rwkv_rev.cells.changing import refuse_changing
from rwkv_rev.cells.gates import sigmoid_product
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.shared_chunk import SharedChunk
from rwkv_rev.cells.shifted_state import ExactShiftedState
from rwkv_rev.cells.state_pieces import ScaledPiece
from rwkv_rev.cells.whole_memory import WholeMemoryCell
from rwkv_rev.reversal.fingerprint import same_bits
from rwkv_rev.wkv import EMPTY_EXPONENT, wkv4

LARGEST_TIME_DECAY = 69.0
"""Above it nothing changes: exp(69) = 9e29 is far beyond the 104 at which w underflows, and finite in float32."""


class TimeProjection(NamedTuple):
    receptance: Tensor  # [B, C, D]
    key: Tensor  # [B, C, D]
    value: Tensor  # [B, C, D]


class TimeMixRwkv4(WholeMemoryCell):
    """The recurrent half of an RWKV-4 block; memory [B, 3, D] = (a, b, m), float32 or wider."""

    passes_between_ranks = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mix_key = nn.Parameter(torch.empty(hidden_size))
        self.mix_value = nn.Parameter(torch.empty(hidden_size))
        self.mix_receptance = nn.Parameter(torch.empty(hidden_size))
        self.time_decay = nn.Parameter(torch.empty(hidden_size))
        self.bonus = nn.Parameter(torch.empty(hidden_size))
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def mixes(self) -> list[Tensor]:
        return [self.mix_key, self.mix_value, self.mix_receptance]

    def plan_sources(self) -> list[Tensor]:
        return [*self.mixes(), self.time_decay]

    def project(self, *mixed: Tensor) -> TimeProjection:
        to_key, to_value, to_receptance = mixed
        return TimeProjection(self.receptance(to_receptance), self.key(to_key), self.value(to_value))

    def log_decay(self) -> Tensor:
        """log w per channel [D], <= 0, natural logarithm, float32 or wider."""
        return log_decay_of(self.time_decay)

    def compute(
        self, projection: TimeProjection, memory: Tensor | None, mask: ChunkMask | None, plan: None = None
    ) -> tuple[Tensor, Tensor]:
        assert memory is not None
        _, key, value = projection
        return wkv4(
            key, value, self.log_decay(), wide(self.bonus), memory, None if mask is None else mask.valid
        )

    def output_of(self, projection: TimeProjection, read: Tensor) -> Tensor:
        own = may_take(self, self.receptance)
        out: Tensor = self.output(sigmoid_product(projection.receptance, read, own=own))
        return out

    def is_left(self, state: ExactShiftedState, after: ExactShiftedState) -> Any:
        """The memories bit by bit: of three numbers per channel that is less work than a fingerprint of each."""
        same = super().is_left(ExactShiftedState(state.shift, None), after)
        left, memory = state.memory, after.memory
        return same if left is None or memory is None else same & same_bits(left.value(), memory.value())

    def _over_ranks(self, x: Any, state: Any, chunk: SharedChunk) -> tuple[Any, Any]:
        refuse_changing(self, lambda: [self.log_decay()])  # which each rank makes for the others, too
        return super()._over_ranks(x, state, chunk)

    def nothing(self, projection: TimeProjection) -> Tensor:
        key = projection.key
        dtype = torch.promote_types(key.dtype, torch.float32)
        memory = key.new_zeros(key.shape[0], 3, key.shape[2], dtype=dtype)
        memory[:, 2] = EMPTY_EXPONENT
        return memory

    def piece(
        self, projection: TimeProjection, chunk: SharedChunk, plan: CellPlan | None = None
    ) -> ScaledPiece:
        _, key, value = projection
        log_decay, valid = self.log_decay(), None if chunk.mask is None else chunk.mask.valid
        _, update = wkv4(key, value, log_decay, wide(self.bonus), self.nothing(projection), valid)
        return ScaledPiece(chunk.times(chunk.group.rank, log_decay), update)

    def received(
        self, rank: int, sent: list[Tensor], projection: TimeProjection, chunk: SharedChunk
    ) -> ScaledPiece:
        return ScaledPiece(chunk.times(rank, self.log_decay()), sent[0])


def wide(parameter: Tensor) -> Tensor:
    """The parameter in float32, or float64 if it has that."""
    return parameter.float() if parameter.dtype != torch.float64 else parameter


def log_decay_of(time_decay: Tensor) -> Tensor:
    """log w = -exp(time_decay), float32 or wider, never -inf: w is 0 long before, and zero tokens decay by 1."""
    return -torch.exp(wide(time_decay).clamp(max=LARGEST_TIME_DECAY))
