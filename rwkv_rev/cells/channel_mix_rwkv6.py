"""Channel mix of RWKV-6: RWKV-5's, whose files hold the share of the token *before*, 1 - mu."""

import torch
from torch import Tensor, nn

from rwkv_rev.cells.channel_mix import ChannelMix


class ChannelMixRwkv6(ChannelMix):
    """The feed-forward half of a block; arguments as :class:`~rwkv_rev.cells.channel_mix.ChannelMix` has them."""

    def make_mixes(self, hidden_size: int) -> None:
        self.mix_before_key = nn.Parameter(torch.empty(hidden_size))
        self.mix_before_receptance = nn.Parameter(torch.empty(hidden_size))

    def mixes(self) -> list[Tensor]:
        return [1 - share for share in self.plan_sources()]

    def plan_sources(self) -> list[Tensor]:
        return [self.mix_before_key, self.mix_before_receptance]
