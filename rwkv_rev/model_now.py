"""What may be put back in a model for a second reading: the parameters it had, and whether it was trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def model_now(model: nn.Module) -> Any:
    """A function that gives a context in which what may be put back in each module is what it is now.

    Parameters, trained or frozen, and buffers: ``torch.func.functional_call`` gives others for one call; somebody
    freezes a part between two losses. Training or evaluation: somebody evaluates.
    """
    modes = [(vars(module), module.training) for module in model.modules()]
    held = [
        (tensors, dict(tensors), name == "_parameters")
        for module, _ in modes
        for name in ("_parameters", "_buffers")
        if (tensors := module[name])
    ]
    trained = [
        (tensor, tensor.requires_grad)
        for _, tensors, parameters in held
        for tensor in tensors.values()
        if parameters and tensor is not None and tensor.is_leaf
    ]

    @contextmanager
    def again() -> Iterator[None]:
        now = [(module, module["training"]) for module, _ in modes]
        replaced = [(tensors, dict(tensors)) for tensors, _, _ in held]
        toggled = [(tensor, tensor.requires_grad) for tensor, was in trained if tensor.requires_grad != was]
        try:
            for module, mode in modes:
                module["training"] = mode
            for tensors, was, _ in held:
                _become(tensors, was)
            for tensor, requires_grad in trained:
                tensor.requires_grad_(requires_grad)
            yield
        finally:
            for tensor, requires_grad in toggled:
                tensor.requires_grad_(requires_grad)
            for tensors, others in replaced:
                _become(tensors, others)
            for module, mode in now:
                module["training"] = mode

    return again


def _become(tensors: dict[str, Any], others: dict[str, Any]) -> None:
    """Let a module's dictionary hold these others, in their order."""
    if list(map(id, tensors.values())) != list(map(id, others.values())) or tensors.keys() != others.keys():
        tensors.clear()
        tensors.update(others)
