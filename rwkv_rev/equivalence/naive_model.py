"""The whole model as one straight float64 scan over the *original* tensors: the truth of every check.

What a cell computes its architecture says itself, as a loop over tokens (:mod:`rwkv_rev.architectures.scan`), which
shares no code with ``modeling.py``, ``cells/`` or ``wkv/``. A generation of RWKV is read under the names of its
original trainer: an oracle that went through our renaming would not notice a mistake in it. Works layer by layer over
all tokens, so that only one layer's weights exist in float64 at a time: memory is T*D plus one layer, time is T Python
steps per layer.

In float32 the same scan tells how much rounding a model makes of nothing: what one more implementation that adds in
its own order would be off by.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.scan import Scan, standardised

PUBLISHED_GROUP_NORM_EPSILON = 64e-5
LAYER_NORM_EPSILON = 1e-5


def residual_streams(
    tensors: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    scan: Scan,
    group_norm_epsilon: float = PUBLISHED_GROUP_NORM_EPSILON,
    layer_norm_epsilon: float = LAYER_NORM_EPSILON,
    dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[str, Tensor]]:
    """The residual stream after every sub-layer, in order.

    Args:
        tensors: what ``scan`` goes through; read one layer at a time, any floating dtype.
        tokens: token ids ``[T]``.
        scan: of the architecture.
        group_norm_epsilon: eps of the GroupNorm behind a recurrence, as if there were no division by 8 before it.
        layer_norm_epsilon: eps of every LayerNorm.
        dtype: of all arithmetic.

    Yields:
        ``(place, stream)`` with stream ``[T, D]`` in ``dtype`` and place one of ``ln0``,
        ``blocks.{i}.time_mix``, ``blocks.{i}.channel_mix``, ``ln_out``. The last one is what the head
        reads.
    """

    def normed(x: Tensor, name: str) -> Tensor:
        scaled = standardised(x, layer_norm_epsilon)
        return scaled * tensors[f"{name}.weight"].to(dtype) + tensors[f"{name}.bias"].to(dtype)

    x = normed(tensors[scan.embeddings][tokens].to(dtype), scan.first_norm)  # [T, D]
    yield "ln0", x
    left: dict[str, Any] = {}
    for layer in range(scan.layers(tensors)):
        block = f"{scan.block}{layer}."
        for cell in scan.cells:
            initial = None if scan.initial is None else f"{scan.initial}{layer}"
            own = _Below(tensors, f"{block}{cell.prefix}.", initial)
            x = x + cell.compute(normed(x, block + cell.norm), own, group_norm_epsilon, left)
            yield f"blocks.{layer}.{cell.name}", x
    yield "ln_out", normed(x, scan.last_norm)


def naive_logits(
    tensors: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    scan: Scan,
    group_norm_epsilon: float = PUBLISHED_GROUP_NORM_EPSILON,
    layer_norm_epsilon: float = LAYER_NORM_EPSILON,
    dtype: torch.dtype = torch.float64,
    piece: int = 64,
) -> Iterator[Tensor]:
    """Logits ``[t, V]``, ``piece`` tokens at a time; arguments of :func:`residual_streams`."""
    hidden = tokens.new_empty(0)
    for _, stream in residual_streams(
        tensors,
        tokens,
        scan=scan,
        group_norm_epsilon=group_norm_epsilon,
        layer_norm_epsilon=layer_norm_epsilon,
        dtype=dtype,
    ):
        hidden = stream  # the last is what the head reads
    head = tensors[scan.head].to(dtype)  # [V, D]
    for rows in hidden.split(piece):
        yield rows @ head.T


class _Below(Mapping[str, Tensor]):
    """The tensors whose names begin with a prefix, without it; and one called ``initial``."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, initial: str | None) -> None:
        self._tensors, self._prefix, self._initial = tensors, prefix, initial

    def _stored(self, name: object) -> str:
        return self._initial if name == "initial" and self._initial is not None else f"{self._prefix}{name}"

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._stored(name)]

    def __contains__(self, name: object) -> bool:
        return self._stored(name) in self._tensors  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return (name[len(self._prefix) :] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
