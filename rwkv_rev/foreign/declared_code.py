"""Code of others that was declared to treat each position by itself (:mod:`rwkv_rev.foreign.search` says what it is).

Declared is the very object, of which its mark keeps note: wrappers take over the attributes of what they wrap, and
other closures of a factory share their code, but are other objects. A copy made by ``copy.deepcopy`` or ``pickle``
has a mark of its own.
"""

import weakref
from collections.abc import Callable
from functools import partial
from types import BuiltinMethodType, MethodType
from typing import Any, TypeGuard, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from rwkv_rev.printable import shortened

MARK = "_rwkv_rev_position_wise"

T = TypeVar("T", bound=Callable[..., Any])


class StandIn(partial):
    """What calls code of others in its place while a loss is computed: ``StandIn(call, code)`` is that code."""


def original(code: Any) -> Any:
    """The code itself of what stands in for it, for another thread or inside of a call."""
    while isinstance(code, StandIn):
        code = code.args[0]
    return code


def position_wise(code: T) -> T:
    """Declare that a hook, a module, or a class of them, of tensors or of modes, treats each position by itself.

    A declared hook sees one chunk after another [B, C, D], in both sweeps. A method of an object is declared for that
    object; a function in a class body for all of them.

    Declared is of its gradient, too, that it is linear: beside labels it is made for the loss itself, and multiplied
    afterwards by what multiplies the loss (``(loss / 4).backward()``). A loss of logits needs no such thing.

    Raises:
        TypeError: for what is no such thing, or, as functions written in C, cannot carry the mark.
    """
    try:
        if _is_method(code):
            setattr(code.__self__, _of_method(code), _Mark(code.__self__, getattr(code, "__func__", None)))
        elif isinstance(code, nn.Module):
            vars(code)[MARK] = _Mark(code)  # a compiled module hands attributes on to the one inside
        else:
            setattr(code, MARK, _Mark(code))
    except (TypeError, AttributeError):
        raise TypeError(
            f"{shortened(repr(code))} cannot be declared position-wise: give a hook (a function of Python's or a "
            "method), a module, or a class"
        ) from None
    return code


def is_declared(code: Any) -> bool:
    """Whether the code itself, or its very class, was declared: a subclass may do other things."""
    code = original(code)
    if _is_method(code):
        mark, function = _own(code.__self__).get(_of_method(code)), getattr(code, "__func__", None)
        return (mark is not None and mark.is_of(code.__self__, function)) or _marked(function)
    return _marked(code) or _marked(class_of(code) if isinstance(code, nn.Module) else type(code))


def class_of(module: nn.Module) -> type:
    """The module's class; of a parametrized module, or one that FSDP2 shards, the one that it was made of."""
    layer = type(module)
    if layer.__module__.startswith("torch.distributed.fsdp"):
        layer = next(
            base for base in layer.__mro__ if not base.__module__.startswith("torch.distributed.fsdp")
        )
    return layer.__bases__[0] if parametrize.is_parametrized(module) else layer


class _Mark:
    """On the object that was declared; what else has it was given it by a wrapper."""

    def __init__(self, owner: Any, function: Any = None) -> None:
        self._owner, self._function = weakref.ref(owner), function

    def is_of(self, owner: Any, function: Any = None) -> bool:
        return self._owner() is owner and self._function is function

    def __deepcopy__(self, copies: dict[int, Any]) -> "_Mark":
        copied = copies.get(id(self._owner()))
        return self if copied is None else _Mark(copied, self._function)

    def __reduce__(self) -> Any:
        owner = self._owner()
        return (object, ()) if owner is None else (_Mark, (owner, self._function))


def _marked(code: Any) -> bool:
    mark = _own(code).get(MARK)
    return isinstance(mark, _Mark) and mark.is_of(code)


def _own(code: Any) -> Any:
    return getattr(code, "__dict__", {})


def _is_method(code: Any) -> TypeGuard[MethodType | BuiltinMethodType]:
    """Of an object, or of a class in C: since PyTorch 2.14 ``apply`` of an autograd function is one."""
    return isinstance(code, MethodType) or (
        isinstance(code, BuiltinMethodType) and isinstance(code.__self__, type)
    )


def _of_method(code: MethodType | BuiltinMethodType) -> str:
    written = getattr(code, "__func__", code)
    name = written.__code__.co_name if hasattr(written, "__code__") else getattr(written, "__name__", "")
    return f"{MARK}_{name}" if name else MARK
