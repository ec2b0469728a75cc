"""Whether a computation has written to the model that it computes with: no chunk may see another model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from rwkv_rev.bptt.language_model import LanguageModel
from rwkv_rev.errors import ReversalMismatchError, StrategyError
from rwkv_rev.foreign import adapters
from rwkv_rev.foreign.search import Strangers


def watched(parameters: Sequence[Tensor], found: Strangers) -> list[Tensor]:
    """Parameters and buffers, but for those that adapters take out and put back in each call."""
    same = adapters.put_back(found.adapters)
    return [tensor for tensor in (*parameters, *found.buffers) if id(tensor) not in same]


@contextmanager
def unchanged(model: LanguageModel, tensors: list[Tensor]) -> Iterator[None]:
    """Refuses a computation that writes to ``tensors`` of the model: no chunk may see another model.

    Raises:
        StrategyError: naming a buffer or parameter that was written to, or frozen or unfrozen, or a buffer in whose
            place another was put.
    """
    places = _places(model, tensors)
    versions = [tensor._version for tensor in tensors]
    trained = [tensor.requires_grad for tensor in tensors]
    mismatch = None
    try:
        yield
    except ReversalMismatchError as error:  # of which it is the cause
        mismatch = error
    except Exception as error:
        _refuse_other_leaves(model, tensors, trained, error)
        raise
    _refuse_other_leaves(model, tensors, trained, mismatch)
    name = changed_tensor(model, tensors, versions)
    name = name or next((name for name, of, key, was in places if of.get(key) is not was), None)
    if name is not None:
        raise StrategyError(
            f"{name} was written to while the loss was computed, and other chunks would see another model: use "
            "bptt='full' (spectral norm writes in training alone: or put that module into eval mode)"
        )
    if mismatch is not None:
        raise mismatch


def _refuse_other_leaves(
    model: LanguageModel, tensors: list[Tensor], trained: list[bool], error: Exception | None
) -> None:
    for tensor, before in zip(tensors, trained, strict=True):
        if tensor.requires_grad != before:
            raise StrategyError(
                f"{_name(model, tensor)} was {'frozen' if before else 'unfrozen'} while the loss was computed, and "
                "other chunks would train other parameters: do so before the call, or use bptt='full'"
            ) from error


def changed_tensor(model: LanguageModel, tensors: list[Tensor], versions: list[int]) -> str | None:
    """The name of a buffer or parameter that was written to since it had its version."""
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:
            return _name(model, tensor)
    return None


def _places(model: LanguageModel, tensors: list[Tensor]) -> list[tuple[str, dict[str, Any], str, Tensor]]:
    """Where buffers are: their names in the model, the dictionary that holds each, its key there, and itself."""
    buffers = {id(tensor) for tensor in tensors if not isinstance(tensor, nn.Parameter)}
    if not buffers:
        return []
    return [
        (f"{path}.{key}" if path else key, module._buffers, key, buffer)
        for path, module in cast(nn.Module, model).named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and id(buffer) in buffers
    ]


def _name(model: LanguageModel, tensor: Tensor) -> str:
    module = cast(nn.Module, model)
    named = [*module.named_buffers(), *module.named_parameters()]
    return next((name for name, other in named if other is tensor), "a parameter")
