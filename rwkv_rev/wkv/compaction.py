"""Masks with holes: every row's valid tokens moved to its front, in order, and back."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def kept_with(mask: Tensor, make: Callable[[Tensor], T]) -> T:
    """``make(mask)``, made once: all layers of a chunk are handed one mask [B, T], which keeps it while it is as it is.

    Not where launches are recorded or traced: what is made there stays there.
    """
    if torch.compiler.is_compiling() or mask.is_inference():
        return make(mask)
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(mask)
    kept: dict[Any, Any] = mask.__dict__.setdefault("_kept_with_it", {})
    version, found = kept.get(make, (None, None))
    if version != mask._version:
        found = make(mask)
        kept[make] = (mask._version, found)
    return cast(T, found)


def order_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's tokens, the valid ones first and in order, [B, T] int32, and how many these are, [B] int32."""
    return torch.argsort(~mask, dim=1, stable=True).to(torch.int32), mask.sum(1, dtype=torch.int32)


class Compaction:
    """Moves valid tokens to the front of their row: kernels then see rows of different lengths without holes.

    Args:
        mask: [B, T] bool, true where the token is valid.
    """

    def __init__(self, mask: Tensor) -> None:
        self.counts = mask.sum(1)  # [B] valid tokens
        self._order = torch.argsort(~mask, dim=1, stable=True)  # [B, T]
        self._places = torch.argsort(self._order, dim=1)
        self._absent = ~mask
        self._behind = torch.arange(mask.shape[1], device=mask.device) >= self.counts[:, None]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...]: valid tokens first, zeros after them."""
        return _select(x, self._order).masked_fill(_like(self._behind, x), 0)

    def unpack(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`pack`, zeros at masked tokens."""
        return _select(x, self._places).masked_fill(_like(self._absent, x), 0)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.dim() - 2))


def _select(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _like(index, x).expand_as(x))
