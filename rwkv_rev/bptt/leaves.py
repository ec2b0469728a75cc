"""The tensors that a loss is differentiated by, and what is asked about all of them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rwkv_rev.errors import StrategyError
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


def refuse_offloaded(parameters: Iterable[Tensor]) -> None:
    """Refuse to train parameters that accelerate has taken off the device until their module is called.

    Raises:
        StrategyError: where gradients are enabled and one of them wants one.
    """
    if torch.is_grad_enabled() and any(p.is_meta and p.requires_grad for p in parameters):
        raise StrategyError(
            "some of the model's parameters are offloaded: they get no gradient, under no strategy. Load the model "
            "without a device_map, or freeze what is offloaded (requires_grad_(False)) and use bptt = 'full'; to read "
            "without a gradient, use torch.no_grad()"
        )


def refuse_lazy(parameters: Iterable[Tensor]) -> None:
    """Refuse to take a gradient by parameters that PyTorch makes at the first call (``nn.LazyLinear``).

    Raises:
        StrategyError: where one of them has no shape yet.
    """
    if any(map(is_lazy, parameters)):
        raise StrategyError(
            "some of the model's parameters have no shape before the first call (nn.LazyLinear): call the model once "
            "without labels, under torch.no_grad(), before training it"
        )
