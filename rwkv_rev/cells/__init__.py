"""The reversible (EBRT) cells: the contract, token shift, time mix of each generation, channel mix.

Terms: ``docs/terms.md``.
"""

from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.channel_mix_rwkv6 import ChannelMixRwkv6
from rwkv_rev.cells.channel_mix_rwkv7 import ChannelMixRwkv7
from rwkv_rev.cells.contract import Replay, ReversibleCell
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.shifted_cell import ShiftedCell
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.cells.time_mix_rwkv6 import TimeMixRwkv6
from rwkv_rev.cells.time_mix_rwkv7 import TimeMixRwkv7

__all__ = [
    "ChannelMix",
    "ChannelMixRwkv6",
    "ChannelMixRwkv7",
    "ChunkMask",
    "Replay",
    "ReversibleCell",
    "ShiftedCell",
    "TimeMixRwkv4",
    "TimeMixRwkv5",
    "TimeMixRwkv6",
    "TimeMixRwkv7",
]
