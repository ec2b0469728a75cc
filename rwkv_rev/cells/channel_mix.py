"""Channel mix of RWKV-4 to RWKV-6: ``sigmoid(r) * Wv(relu(k)^2)`` (RWKV paper, section 3.1; unchanged in Eagle, Finch).

Its only state is the token shift: the remnant of a chunk is the carried y alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev.cells.as_written import may_take
from rwkv_rev.cells.gates import returns_new_memory, sigmoid_product, squared_relu
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recomputation import not_kept
from rwkv_rev.cells.shifted_cell import ShiftedCell


class ChannelProjection(NamedTuple):
    receptance: Tensor  # [B, C, D]
    value: Tensor  # [B, C, D]


class ChannelMix(ShiftedCell):
    """The feed-forward half of a block.

    Args:
        hidden_size: D.
        intermediate_size: F.
    """

    passes_between_ranks = True

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.make_mixes(hidden_size)
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    def make_mixes(self, hidden_size: int) -> None:
        """The parameters that mixes are made of."""
        self.mix_key = nn.Parameter(torch.empty(hidden_size))
        self.mix_receptance = nn.Parameter(torch.empty(hidden_size))

    def mixes(self) -> list[Tensor]:
        return [self.mix_key, self.mix_receptance]

    def project(self, *mixed: Tensor) -> ChannelProjection:
        to_key, to_receptance = mixed
        key = self.key(to_key)
        squared = squared_relu(key, own=returns_new_memory(self.key))
        with not_kept([squared], lambda: [squared_relu(key)]):
            value = self.value(squared)
        return ChannelProjection(self.receptance(to_receptance), value)

    def compute(
        self, projection: ChannelProjection, memory: Tensor | None, mask: ChunkMask | None, plan: None = None
    ) -> tuple[Tensor, None]:
        own = may_take(self, self.receptance)
        return sigmoid_product(projection.receptance, projection.value, own=own), None
