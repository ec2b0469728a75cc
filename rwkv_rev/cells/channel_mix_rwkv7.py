"""Channel mix of RWKV-7: ``Wv relu(Wk x_k)^2``, x_k = x_t + (x_{t-1} - x_t) c (Peng et al. 2025, "RWKV-7 Goose").

Unlike that of RWKV-4 to 6 it has no receptance; c is the share of the token before. Its only state is the token shift.
"""

import torch
from torch import Tensor, nn

from rwkv_rev.cells.gates import returns_new_memory, squared_relu
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.recomputation import not_kept
from rwkv_rev.cells.shifted_cell import ShiftedCell


class ChannelMixRwkv7(ShiftedCell):
    """The feed-forward half of a block.

    Args:
        hidden_size: D.
        intermediate_size: F.
    """

    passes_between_ranks = True

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.mix_before_key = nn.Parameter(torch.empty(hidden_size))
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    def mixes(self) -> list[Tensor]:
        return [1 - self.mix_before_key]

    def plan_sources(self) -> list[Tensor]:
        return [self.mix_before_key]

    def project(self, *mixed: Tensor) -> Tensor:
        (to_key,) = mixed
        key = self.key(to_key)
        squared = squared_relu(key, own=returns_new_memory(self.key))
        with not_kept([squared], lambda: [squared_relu(key)]):
            out: Tensor = self.value(squared)
        return out

    def compute(
        self, projection: Tensor, memory: Tensor | None, mask: ChunkMask | None, plan: None = None
    ) -> tuple[Tensor, None]:
        return projection, None
