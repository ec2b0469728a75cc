"""What parts of a model compute of themselves before the first chunk, for all layers in few launches.

One after another they launch hundreds of small kernels, and a GPU waits for that in every step. A class that computes
what its method ``name`` gives for several parts at once, to the same bits, has a class method ``name_at_once`` beside
it. That is called only where it stands for every part's own method: parts of other classes, and those whose method
somebody has replaced, in a subclass or on the part, are asked one by one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def of_all(parts: Sequence[Any], name: str, *common: Any, own: Sequence[Any] | None = None) -> list[Any]:
    """What the method ``name`` of each part gives.

    Args:
        common: arguments that are the same for all.
        own: of each part its own argument, which comes first; None without one.
    """
    if _stands_for_all(parts, name):
        together = getattr(type(parts[0]), f"{name}_at_once")
        return list(together(parts, *common) if own is None else together(parts, own, *common))
    if own is None:
        return [getattr(part, name)(*common) for part in parts]
    return [getattr(part, name)(value, *common) for part, value in zip(parts, own, strict=True)]


def alike(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are of one shape and dtype, and on one device, so that they can be stacked as they are."""
    return len({(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _stands_for_all(parts: Sequence[Any], name: str) -> bool:
    if not parts:
        return False
    kind = type(parts[0])
    if any(type(part) is not kind or name in vars(part) for part in parts):
        return False
    # the class that has the one has both, or is derived from the class that has the other
    for base in kind.__mro__:
        if f"{name}_at_once" in vars(base):
            return True
        if name in vars(base):
            return False
    return False
