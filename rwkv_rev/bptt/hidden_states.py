"""The hidden states of a context, taken chunk after chunk, to be handed out whole for a loss of somebody else's.

On the device that is [B, T, D] and, while the parts are put together, the same once more. In host memory it is there
once, page-locked beside a CUDA device, and the device keeps one chunk.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rwkv_rev.bptt.strategy import Chunk


class HiddenStates:
    """What the first sweep collects; see the module's docstring."""

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._parts: list[Tensor] = []
        self._whole: Tensor | None = None
        self._device = torch.device("cpu")

    def take(self, chunk: "Chunk", hidden: Tensor) -> None:
        """Those of the next chunk, [B, C, D]."""
        if not self._on_host:
            self._parts.append(hidden)
            return
        if self._whole is None:
            self._device = hidden.device
            shape = (hidden.shape[0], chunk.inputs.length, hidden.shape[2])
            self._whole = torch.empty(shape, dtype=hidden.dtype, device="cpu", pin_memory=hidden.is_cuda)
        self._whole[:, chunk.start : chunk.stop].copy_(hidden, non_blocking=True)

    def whole(self) -> Tensor:
        """All of them, [B, T, D]; they can be read."""
        if self._whole is None:
            return torch.cat(self._parts, dim=1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._whole
