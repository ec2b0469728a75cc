"""A stack of numbers of different widths in bits, without gaps: what a step forgets is pushed, the way back pops it.

Unlike :class:`~rwkv_rev.reversal.packing.BitPacking`, whose rows have one width each, every number has a width of its
own, 0 to 63 bits, and the widths are not kept: who pops computes them again. A number is written by two additions into
32-bit words and read from two of them; those of a chunk are written at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32
_ONES = (1 << WORD) - 1


def widths_of(counts: Tensor) -> Tensor:
    """Bits that tell ``counts`` values apart, int64: ``ceil(log2(counts))``, for float64 integers of at least 1."""
    _, bits = torch.frexp(counts - 1)
    return bits.to(torch.int64)


def pack(values: Tensor, widths: Tensor, total: int, *, wide: bool) -> Tensor:
    """All ``values`` (int64, flat, each of ``widths`` bits, ``total`` in all), one behind the other: int32 words.

    ``wide``: whether numbers may have more than 32 bits. Nothing is asked of a device that the host does not know.
    """
    length = -(-total // WORD)
    words = torch.zeros(length + 2, dtype=torch.int64, device=values.device)
    starts = widths.cumsum(0) - widths
    _put(words, starts, values & _ONES)
    if wide:
        _put(words, starts + WORD, values >> WORD)
    return _low_half(words[:length])


def _put(words: Tensor, starts: Tensor, values: Tensor) -> None:
    """Add numbers of up to 32 bits where none has been put; those of no bits are zero, wherever they stand."""
    place = (starts >> 5).clamp_(max=len(words) - 2)
    shifted = values << (starts & 31)
    words.scatter_add_(0, place, shifted & _ONES)
    words.scatter_add_(0, place + 1, shifted >> WORD)


def _low_half(words: Tensor) -> Tensor:
    """int64 words below 2**32 as int32 of the same bits."""
    return words.contiguous().view(torch.int32)[::2].clone(memory_format=torch.contiguous_format)


@dataclass
class BitStack:
    """Rows that were packed one behind the other, each read from its end to its beginning.

    Attributes:
        words: int64, below 2**32, with room behind for a number that begins in the last one.
        tops: [B] int64, where each row ends now, in bits.
        wide: whether numbers may have more than 32 bits.
    """

    words: Tensor
    tops: Tensor
    wide: bool

    @classmethod
    def of(cls, words: Tensor, sizes: Tensor, *, wide: bool) -> "BitStack":
        """Of what :func:`pack` gave for rows of ``sizes`` [B] bits."""
        room = words.new_zeros(3, dtype=torch.int64)
        return cls(torch.cat([words.to(torch.int64) & _ONES, room]), sizes.to(torch.int64).cumsum(0), wide)

    def pop(self, widths: Tensor) -> Tensor:
        """The numbers [B, M] that were pushed last, int64, from their ``widths``."""
        ends = widths.cumsum(1)
        self.tops = self.tops - ends[:, -1]
        starts = self.tops[:, None] + ends - widths
        if not self.wide:
            return self._read(starts, widths)
        low = self._read(starts, widths.clamp(max=WORD))
        return low | (self._read(starts + WORD, (widths - WORD).clamp_(min=0)) << WORD)

    def _read(self, starts: Tensor, widths: Tensor) -> Tensor:
        # a state that is another than was pushed asks for other widths: what it gets is compared, not where it stands
        place = (starts >> 5).clamp_(0, len(self.words) - 2)
        both = self.words[place] | (self.words[place + 1] << WORD)
        return (both >> (starts & 31)) & ((1 << widths) - 1)
