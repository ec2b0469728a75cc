"""Whether a computation has written to the model that it computes with: no chunk may see another model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

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
        StrategyError: naming a buffer or parameter that was written to.
    """
    versions = [tensor._version for tensor in tensors]
    mismatch = None
    try:
        yield
    except ReversalMismatchError as error:  # of which it is the cause
        mismatch = error
    name = changed_tensor(model, tensors, versions)
    if name is not None:
        raise StrategyError(
            f"{name} was written to while the loss was computed, and other chunks would see another model: use "
            "bptt='full' (spectral norm writes in training alone: or put that module into eval mode)"
        )
    if mismatch is not None:
        raise mismatch


def changed_tensor(model: LanguageModel, tensors: list[Tensor], versions: list[int]) -> str | None:
    """The name of a buffer or parameter that was written to since it had its version."""
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:
            module = cast(nn.Module, model)
            named = [*module.named_buffers(), *module.named_parameters()]
            return next((name for name, other in named if other is tensor), "a parameter")
    return None
