"""Which tokens of a chunk count, with the indices every cell derives from that.

A masked token changes no state and is seen by no other token: the token before position t is the last *valid*
one, wherever padding or holes lie. ``None`` stands for "all tokens count" everywhere, the path without gathers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.reversal.host_copy import start_copy


@dataclass(frozen=True)
class ChunkMask:
    """Validity of a chunk's tokens.

    Attributes:
        valid: [B, C] bool, true where the token counts.
        previous: [B, C] int64, position of the last valid token before t; -1 for the carried state.
        first: [B] int64, position of the row's first valid token (0 for a row without one).
        last: [B] int64, position of the row's last valid token; -1 for a row without one.
        count: [B] int64, n, valid tokens of the row.
        everywhere: whether every row is known to have one.
    """

    valid: Tensor
    previous: Tensor
    first: Tensor
    last: Tensor
    count: Tensor
    everywhere: bool = False

    @classmethod
    def of(cls, valid: Tensor, *, everywhere: bool = False) -> "ChunkMask":
        """Indices of a [B, C] mask (any dtype, non-zero where the token counts)."""
        valid = valid.bool()
        positions = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        latest = torch.where(valid, positions, -1).cummax(dim=1).values
        previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
        return cls(
            valid=valid,
            previous=previous,
            first=valid.to(torch.uint8).argmax(dim=1),
            last=latest[:, -1],
            count=valid.sum(dim=1),
            everywhere=everywhere,
        )


def any_per_chunk(flags: Tensor, length: int) -> Callable[[], bytearray]:
    """1 for chunks of ``length`` tokens in which one of the flags [B, T] is set; waits for the device when called."""
    padded = torch.nn.functional.pad(flags.any(dim=0), (0, -flags.shape[1] % length))
    found = start_copy(padded.view(-1, length).any(dim=1).byte())
    return lambda: bytearray(found().cpu().numpy().tobytes())
