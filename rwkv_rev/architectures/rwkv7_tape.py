"""What a chunk of RWKV-7 puts on the tape: a whole state, or about so much of one where it is lifted.

Whole states are exact. What lifting keeps follows from weights and text: :data:`SHARES` is what was measured of the
model that forgets more of the two in docs/lifting.md, whose heads are 64 wide.
"""

import math
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

SHARES = {16: 0.14, 32: 0.27, 64: 0.39, 128: 0.47, 256: 0.56, 512: 0.64, 1024: 0.73, 2048: 0.81}
"""Of whole states, by C."""


def whole(config: "RwkvRevConfig", batch: int) -> list[int]:
    return [4 * batch * config.hidden_size * config.head_size]


def remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
    return [8, *whole(config, batch)]  # a fingerprint, and the state itself


def lifted(config: "RwkvRevConfig", batch: int, length: int) -> list[int]:
    heads = batch * config.num_attention_heads
    bits = [round(share(length) * nbytes) for nbytes in whole(config, batch)]
    # fingerprints, and of each head how many bits its largest number has, and its grid before
    return [8 * heads, *bits, heads, 4 * heads]


def share(length: int) -> float:
    """:data:`SHARES` of any C: on straight lines in log C, in proportion below and whole states from 8,192 on."""
    known = SHARES | {8192: 1.0}
    shortest, longest = min(known), max(known)
    if length <= shortest:
        return known[shortest] * length / shortest
    if length >= longest:
        return 1.0
    above = min(other for other in known if other > length)
    below = max(other for other in known if other <= length)
    there = math.log2(length / below) / math.log2(above / below)
    return (1 - there) * known[below] + there * known[above]
