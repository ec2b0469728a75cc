"""What stands before PyTorch's functions: subclasses of tensors, and modes.

A tensor of a subclass is asked before a function that it is handed to (``__torch_function__``), or before each kernel
that runs (``__torch_dispatch__``); a mode (``torch.overrides.TorchFunctionMode``,
``torch.utils._python_dispatch.TorchDispatchMode``) before all of them while it is on. Either can compute what it
likes, such as a scale over all tokens of a call: code of others like any (:mod:`rwkv_rev.foreign.search`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

from rwkv_rev.code_origin import origin

_TENSORS = ("torch.nn.parameter", "torch.distributed.", "torch._subclasses.", "bitsandbytes.nn.modules")
"""Modules whose tensors compute what plain ones do (shards, shapes without numbers), or are looked at elsewhere."""

_MODES = ("torch.", "rwkv_rev.")
"""Modules whose modes are position-wise: they choose devices, count, record, or trace."""
_OTHER_PEOPLES = ("torch.testing.",)


def is_foreign_tensor(kind: type) -> bool:
    """Whether a class is one of tensors that is not known to compute what plain ones do."""
    return issubclass(kind, Tensor) and kind is not Tensor and not origin(kind).startswith(_TENSORS)


def foreign_modes() -> list[Any]:
    """Modes that are on and not known to be position-wise; those of functions first, each from the outermost.

    Where a model is compiled they are part of what is compiled, and not looked for.
    """
    if torch.compiler.is_compiling():
        return []
    modes = (*function_modes(), *dispatch_modes())
    return [mode for mode in modes if not _is_known(type(mode))] if modes else []


def first_change(before: Sequence[Any], now: Sequence[Any]) -> str | None:
    """The first of :func:`foreign_modes` that a second sweep would not find as it was, in words; None without.

    Modes of functions are not missed: :func:`functions_as_before` puts them on again.
    """
    missed = [mode for mode in before if not isinstance(mode, TorchFunctionMode) and mode not in now]
    other = [mode for mode in now if mode not in before] + missed
    return f"the mode {type(other[0]).__name__} around the model" if other else None


@contextmanager
def functions_as_before(modes: Sequence[Any]) -> Iterator[None]:
    """What overrides functions of a forward pass, on again: PyTorch turns it off while it takes a gradient."""
    on = function_modes()
    with ExitStack() as stack:
        stack.enter_context(torch._C._EnableTorchFunction())
        for mode in modes:
            if isinstance(mode, TorchFunctionMode) and mode not in on:
                stack.enter_context(mode)
        yield


def _is_known(kind: type) -> bool:
    place = origin(kind)
    return place.startswith(_MODES) and not place.startswith(_OTHER_PEOPLES)
