"""A chunk whose tokens are split over the ranks of a context group, in the place of a mask.

A chunk of n tokens is cut into W pieces of ceil(n / W); what is missing at its end are tokens that do not count, so
that all ranks do the same work, those without a token, too. All ranks know the whole mask, so that what is sent are
states and last tokens alone.

What one rank exchanges in a gradient all must. So whether a gradient flows through what is exchanged may not depend on
the rank: :func:`tied` lets values depend, with a gradient of zero, on what those of other ranks depend on.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.cells.borders import BorderedChunk
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.distributed.context_group import ContextGroup


@dataclass(frozen=True)
class Counted:
    """In the place of a whole chunk's mask: how many tokens of each row count, [B]."""

    count: Tensor


@dataclass(frozen=True)
class SharedChunk:
    """This rank's piece of a chunk.

    Attributes:
        group: the ranks.
        own: the piece's mask, or its documents.
        length: tokens of a piece.
        counts: [W, B] int64, valid tokens of each rank's piece; None where all count.
        resets: [W, B] bool, whether a document begins in a rank's piece; None where none does in the whole chunk.
        starts: what documents begin with, of a model, a layer or a cell; where ``resets`` are.
    """

    group: ContextGroup
    own: ChunkMask | BorderedChunk | None
    length: int
    counts: Tensor | None = None
    resets: Tensor | None = None
    starts: Any = None

    @classmethod
    def of(
        cls,
        group: ContextGroup,
        own: ChunkMask | BorderedChunk | None,
        valid: Tensor | None,
        begins: Tensor | None,
        length: int,
        starts: Any = None,
    ) -> "SharedChunk":
        """From the whole chunk's valid tokens and documents' first ones, [B, W * length] bool on the device."""
        pieces = (group.size, length)
        return cls(
            group,
            own,
            length,
            None if valid is None else valid.unflatten(1, pieces).sum(2).T,
            None if begins is None else begins.unflatten(1, pieces).any(2).T,
            starts,
        )

    def of_part(self, index: int) -> "SharedChunk":
        """For one of the layers, or of a layer's cells."""
        if self.starts is None:
            return self
        own = self.own.of_part(index) if isinstance(self.own, BorderedChunk) else self.own
        return replace(self, own=own, starts=self.starts[index])

    @property
    def mask(self) -> ChunkMask | None:
        """Of the piece as it stands."""
        return self.own.mask if isinstance(self.own, BorderedChunk) else self.own

    @property
    def whole(self) -> Counted | None:
        """What stands for the whole chunk's mask; None where all its tokens count."""
        return None if self.counts is None else Counted(self.counts.sum(0))

    def times(self, rank: int, log_decay: Tensor) -> Tensor:
        """[1 or B, ...], the logarithm of what a rank's piece multiplies a state by, from that of each token [...]."""
        if self.counts is None:
            found = (self.length * log_decay)[None]
        else:
            found = self.counts[rank].to(log_decay.dtype).view(-1, *(1,) * log_decay.dim()) * log_decay
        if self.resets is None:
            return found
        return torch.where(self.resets[rank].view(-1, *(1,) * log_decay.dim()), -torch.inf, found)

    def shifts(self, lasts: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before this rank's piece, and behind the last one, [B, D] each.

        Args:
            lasts: [W, B, D], each piece's last valid token.
            shift: [B, D], what stands before the chunk.
        """
        rank = self.group.rank
        known = torch.cat(
            [shift[None], lasts]
        )  # [1 + W, B, D]; on all ranks of the shift, too, as gradients go
        if self.counts is None:
            return known[rank], known[-1]
        ranks = torch.arange(1, len(known), device=shift.device)[:, None]
        latest = torch.where(self.counts > 0, ranks, 0)  # [W, B], 0 for the chunk's start
        here = latest[:rank].amax(0) if rank else torch.zeros_like(latest[0])
        return _chosen(known, here), _chosen(known, latest.amax(0))


def _chosen(known: Tensor, number: Tensor) -> Tensor:
    """[B, D] from [n, B, D] by the number of each row."""
    return known.gather(0, number[None, :, None].expand(1, *known.shape[1:]))[0]


def tied(value: Tensor, other: Tensor) -> Tensor:
    """``value`` [B, ...], which in a graph depends on ``other``, of its shape or one that expands to it, as well."""
    nowhere = torch.zeros((), dtype=torch.bool, device=value.device)
    return torch.where(nowhere, other.to(value.dtype), value)
