"""The feed-forward half of a block, as several architectures have it: how it begins, and the same as a plain loop."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures.scan import SubLayer
from rwkv_rev.cells.feed_forward import FeedForward

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig


def initialize_feed_forward(cell: FeedForward, config: "RwkvRevConfig") -> None:
    """Nothing is added to the residual at first."""
    init.orthogonal_(cell.key.weight, gain=math.sqrt(max(1, config.intermediate_size / config.hidden_size)))
    init.zeros_(cell.value.weight)


def _scan(x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]) -> Tensor:
    hidden = torch.relu(x @ tensors["key.weight"].to(x.dtype).T).square()
    return hidden @ tensors["value.weight"].to(x.dtype).T


FEED_FORWARD = SubLayer("feed_forward", "ln2", "feed_forward", _scan)
