"""The tensors that a loss is differentiated by, and what is asked about all of them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_rev.loss import sum_of

if TYPE_CHECKING:
    from rwkv_rev.bptt.strategy import LossInputs


def trainable(parameters: list[Tensor], inputs: "LossInputs") -> list[Tensor]:
    """Everything a loss is differentiated by: parameters, initial state, input embeddings; each tensor once."""
    candidates = [*parameters, *inputs.state.tensors()]
    if inputs.inputs_embeds is not None:
        candidates.append(inputs.inputs_embeds)
    return list({id(tensor): tensor for tensor in candidates if tensor.requires_grad}.values())


def float16_gradients(parameters: list[Tensor], device: torch.device) -> bool:
    """Whether gradients flow in float16, by autocast or by the model's parameters, and need a loss scale."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type) == torch.float16
    return any(parameter.dtype == torch.float16 for parameter in parameters)


def devices(parameters: list[Tensor], inputs: "LossInputs") -> set[torch.device]:
    """Where the model's modules may draw random numbers."""
    return {inputs.targets.device, *(parameter.device for parameter in parameters)}


def in_order(leaves: list[Tensor], roles: list[tuple[Tensor, Tensor | None]]) -> list[Tensor | None]:
    """The gradients of ``leaves``: of a tensor with several roles their sum."""
    by_tensor: dict[int, Tensor | None] = {}
    for tensor, gradient in roles:
        by_tensor[id(tensor)] = sum_of(by_tensor.get(id(tensor)), gradient)
    return [by_tensor[id(leaf)] for leaf in leaves]
