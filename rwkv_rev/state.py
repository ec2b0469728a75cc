"""The recurrent state of a whole model, as it passes through ``forward(..., state=...)`` and ``generate()``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.cells.shifted_cell import ShiftedState
from rwkv_rev.configuration import RwkvRevConfig


@dataclass(frozen=True)
class RwkvRevState:
    """State after some tokens, for every layer.

    Attributes:
        time_shift: [L, B, D], the last token's vector at each time mix.
        channel_shift: [L, B, D], the same at each channel mix.
        wkv: float32 or wider, [L, B, H, N, N] (RWKV-5, key index first) or [L, B, 3, D] (RWKV-4: a, b, m).
    """

    time_shift: Tensor
    channel_shift: Tensor
    wkv: Tensor

    @classmethod
    def empty(
        cls,
        config: RwkvRevConfig,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "RwkvRevState":
        """The state before the first token. ``dtype`` is the activations'; wkv is float32, float64 for float64."""
        layers = config.num_hidden_layers
        shift = torch.zeros(layers, batch_size, config.hidden_size, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        architecture = config.architecture
        wkv = torch.zeros(layers, batch_size, *architecture.state_shape(config), device=device, dtype=wide)
        architecture.begin(wkv)
        return cls(shift, shift.clone(), wkv)

    @classmethod
    def stack(cls, layers: Sequence[tuple[Any, ...]]) -> "RwkvRevState":
        """From each layer's (time mix, channel mix) states."""
        wkv = [time.memory for time, _ in layers]
        return cls(
            torch.stack([time.shift for time, _ in layers]),
            torch.stack([channel.shift for _, channel in layers]),
            torch.stack([memory for memory in wkv if memory is not None]),
        )

    def layer(self, index: int) -> tuple[ShiftedState, ShiftedState]:
        """States of layer ``index``: (time mix, channel mix)."""
        return (
            ShiftedState(self.time_shift[index], self.wkv[index]),
            ShiftedState(self.channel_shift[index], None),
        )

    @classmethod
    def like(cls, layers: list[list[Tensor]]) -> "RwkvRevState":
        """From the tensors of each layer, in the order of its cells: shift and wkv, then the channel mix's shift."""
        return cls.stack(
            [(ShiftedState(shift, memory), ShiftedState(channel, None)) for shift, memory, channel in layers]
        )

    @property
    def batch_size(self) -> int:
        return self.wkv.shape[1]

    def tensors(self) -> list[Tensor]:
        """The three tensors, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def detach(self) -> "RwkvRevState":
        """The same values without graph."""
        return RwkvRevState(*(tensor.detach() for tensor in self.tensors()))

    def rows(self, index: Tensor) -> "RwkvRevState":
        """The batch rows ``index`` (int64 [B'])."""
        return RwkvRevState(*(tensor.index_select(1, index.to(tensor.device)) for tensor in self.tensors()))

    def inner(self, other: "RwkvRevState") -> Tensor:
        """Sum of the products of all elements, a scalar: the objective whose state gradient is ``other``."""
        return torch.stack(
            [(a * b).sum().to(self.wkv.dtype) for a, b in zip(self.tensors(), other.tensors(), strict=True)]
        ).sum()
