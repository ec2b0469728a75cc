"""Where code is defined, by what a wrapper around it cannot take over.

``functools.wraps`` gives a wrapper the name, the ``__module__`` and the attributes of what it wraps, and may do so to
objects and classes as well. Not so the globals of a function, its code object, and which class a module holds by a
name: only these are looked at. Code that calls other code which it was handed (a decorator, a partial) is from where
all of it is from. Not seen are functions of a module replaced by others (``torch.nn.functional.linear = ...``).
"""

import sys
from collections.abc import Iterable, Iterator
from functools import partial, partialmethod
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

_CODE = (
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    partial,
    partialmethod,
    property,
    classmethod,
    staticmethod,
)
_HOLDERS = ("torch.jit", "torch.fx", "torch._")
"""Modules of PyTorch whose objects hold other people's code."""

_KNOWN = (
    "rwkv_rev.",
    "torch.",
    "peft.",
    "transformers.",
    "accelerate.",
    "contextlib",
    "functools",
    "typing_extensions",
)
"""What may put functions on classes of ours, of PyTorch's and of peft's."""
_GUARDED = ("rwkv_rev.", "torch.", "peft.")


class Patch(NamedTuple):
    """A function of a class that is not from where the class is: both names in words, and each by itself."""

    where: str
    code: Any
    layer: type
    name: str


def origin(code: Any) -> str:
    """The module in which a class, a function or an object's class is defined; empty where that cannot be said."""
    if isinstance(code, partial):
        return origin(code.func)
    if isinstance(code, FunctionType):
        return str(code.__globals__.get("__name__", ""))
    if isinstance(code, MethodType):
        return origin(code.__func__)
    if isinstance(code, BuiltinFunctionType):
        owner = getattr(code, "__self__", None)
        return str((code if owner is None or isinstance(owner, ModuleType) else owner).__module__)
    return _origin_of_class(code if isinstance(code, type) else type(code))


def qualified_name(code: Any) -> str:
    """The name that a class or a function has where it is defined."""
    if isinstance(code, FunctionType):
        return code.__code__.co_qualname
    return str(getattr(code, "__qualname__", ""))


def defined_in(code: Any, places: tuple[str, ...]) -> bool:
    """Whether code, and all code that it was handed to call, is from modules whose names begin with ``places``."""
    return _all_in(code, places, set())


def patches(layers: Iterable[type]) -> Iterator[Patch]:
    """Functions that somebody has put on classes of ours, PyTorch's or peft's, among ``layers`` and their bases."""
    for base in dict.fromkeys(base for layer in layers for base in layer.__mro__):
        if not base.__module__.startswith(_GUARDED):
            continue
        home = getattr(sys.modules.get(base.__module__), "__dict__", None)
        for name, value in vars(base).items():
            if type(value) is FunctionType and value.__globals__ is home and value.__closure__ is None:
                continue
            if _is_code(value) and not defined_in(value, _KNOWN):
                yield Patch(f"the replaced {name} of the class {base.__name__}", value, base, name)


def _is_code(value: Any) -> bool:
    """Whether what a class has under a name is called where an instance uses it: no class, and no data."""
    return isinstance(value, _CODE) or (
        callable(value)
        and not isinstance(value, type)
        and not type(value).__module__.startswith(("typing", "builtins"))
    )


def _all_in(code: Any, places: tuple[str, ...], seen: set[int]) -> bool:
    if id(code) in seen:
        return True
    seen.add(id(code))
    if isinstance(code, FunctionType):
        return origin(code).startswith(places) and all(
            _all_in(inner, places, seen) for inner in _cells(code) if isinstance(inner, _CODE)
        )
    if isinstance(code, MethodType):
        return _all_in(code.__func__, places, seen) and origin(code.__self__).startswith(places)
    if isinstance(code, partial | partialmethod):
        handed = [inner for inner in (*code.args, *code.keywords.values()) if isinstance(inner, _CODE)]
        return all(_all_in(inner, places, seen) for inner in (code.func, *handed))
    if isinstance(code, property):
        return all(
            _all_in(inner, places, seen) for inner in (code.fget, code.fset, code.fdel) if inner is not None
        )
    if isinstance(code, classmethod | staticmethod):
        return _all_in(code.__func__, places, seen)
    place = origin(code)
    holder = not isinstance(code, type | BuiltinFunctionType) and (
        isinstance(code, nn.Module) or place.startswith(_HOLDERS)
    )
    return place.startswith(places) and not holder


def _cells(code: FunctionType) -> Iterator[Any]:
    for cell in code.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _origin_of_class(layer: type) -> str:
    place = layer.__module__
    found: Any = sys.modules.get(place)
    for name in layer.__qualname__.split("."):
        found = getattr(found, name, None)
    return place if found is layer else ""
