"""Tensors that were made under ``torch.inference_mode()``: autograd takes none of them into a graph."""

from typing import cast

import torch
from torch import Tensor

from rwkv_rev.state import ModelState


def ordinary(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of one that no graph may hold, where graphs are made."""
    if tensor is None or not torch.is_grad_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def ordinary_state(state: ModelState | None) -> ModelState | None:
    """:func:`ordinary` of each tensor of a state."""
    if state is None or not any(tensor.is_inference() for tensor in state.tensors()):
        return state
    return state.each(lambda tensor: cast(Tensor, ordinary(tensor)))
