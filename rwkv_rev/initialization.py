"""Official initialisation of the head; that of a cell its architecture says (:mod:`rwkv_rev.architectures`)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init


def unstored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that no file holds (``persistent=False``), by name."""
    stored = module.state_dict().keys() if any(True for _ in module.buffers()) else ()
    return {name: buffer for name, buffer in module.named_buffers() if name not in stored}


@torch.no_grad()
def remake(buffers: dict[str, Tensor], make: Callable[[], nn.Module]) -> None:
    """Give a cell's :func:`unstored_buffers` the values that its constructor gives them: loading leaves them unmade."""
    with torch.device("cpu"):  # loading constructs on the meta device
        made = dict(make().named_buffers())
    for name, buffer in buffers.items():
        buffer.copy_(made[name])


def initialize_head(head: nn.Linear) -> None:
    """The output head: orthogonal, half its natural size."""
    init.orthogonal_(head.weight, gain=0.5 * math.sqrt(max(1, head.out_features / head.in_features)))
