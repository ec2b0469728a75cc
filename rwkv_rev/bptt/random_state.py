"""Random generator states per chunk, so that dropout draws the same in both sweeps."""

import torch
from torch import Tensor, nn

from rwkv_rev.bptt.strategy import LanguageModel


def draws(model: LanguageModel) -> bool:
    """Whether the model draws random numbers in its forward pass (dropout, in training mode)."""
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
        for module in model.modules()  # type: ignore[attr-defined]
    )


def capture(device: torch.device) -> list[Tensor]:
    """The generators' states: the CPU's, and the device's if that is another."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def restore(states: list[Tensor], device: torch.device) -> None:
    """Set the generators back to what :func:`capture` saw."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
