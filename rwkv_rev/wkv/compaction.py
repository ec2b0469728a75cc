"""Masks with holes: every row's valid tokens moved to its front, in order, and back."""

import torch
from torch import Tensor


class Compaction:
    """Moves valid tokens to the front of their row: kernels then see rows of different lengths without holes.

    Args:
        mask: [B, T] bool, true where the token is valid.
    """

    def __init__(self, mask: Tensor) -> None:
        self.counts = mask.sum(1)  # [B] valid tokens
        self._order = torch.argsort(~mask, dim=1, stable=True)  # [B, T]
        self._places = torch.argsort(self._order, dim=1)
        self._mask = mask
        self._packed_mask = torch.arange(mask.shape[1], device=mask.device) < self.counts[:, None]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...]: valid tokens first, zeros after them."""
        return _select(x, self._order).masked_fill(~_like(self._packed_mask, x), 0)

    def unpack(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`pack`, zeros at masked tokens."""
        return _select(x, self._places).masked_fill(~_like(self._mask, x), 0)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.dim() - 2))


def _select(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _like(index, x).expand_as(x))
