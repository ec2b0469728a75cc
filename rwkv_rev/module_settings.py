"""What all modules of a model go by beside the numbers in their weights: equal as long as they do the same.

Work that is done once more later, from a recording or for a gradient, must find the modules as they were. What code
goes by is not only in tensors: adapters that are active, their scale, weights that are merged, dropout's probability,
training or evaluation, which activation stands in a sequence, hooks. :func:`settings` looks at all of that: classes,
modules inside modules, plain attributes, hooks, and where parameters and buffers lie. Not seen is what changes inside
an object of another kind, which is compared by identity, and what code looks up outside of its module.

Attributes of whole models (``PreTrainedModel``) are not looked at, nor whether blocks are computed once more for their
gradient: layers do not go by them, and they are how gradients are made.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Size, Tensor, device, dtype, nn
from transformers import PreTrainedModel

from rwkv_rev.cells.block import keeps_the_contract

_HOOKS = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
)
_TENSORS = frozenset({"_parameters", "_buffers"})
_MACHINERY = vars(nn.Module()).keys() - _HOOKS - _TENSORS - {"training"}
"""What every module has and no result depends on; modules inside a module are looked at themselves."""
_OF_BLOCKS = _MACHINERY | {"recompute"}
_OF_MODELS = _HOOKS | _TENSORS | {"training"}
_CONSTANTS = frozenset({str, bool, int, float, bytes, complex, type(None), device, dtype, Size})

_HARMLESS = "transformers.modeling_utils"
"""Where the hook is from that lets embeddings require a gradient, which trainers put on and take off at will."""

Mark = Callable[[Tensor], Any]


class Settings(NamedTuple):
    """Of one module: its name in the model, itself, its class, and what it goes by, by name."""

    path: str
    module: "Same"
    kind: type
    own: dict[str, Any]


def settings(model: nn.Module, *, versions: bool = False) -> list[Settings]:
    """What the modules of ``model`` go by, itself included; keeps none of them alive.

    ``versions``: whether tensors that are plain attributes must be the same objects with the same numbers, and
    parameters and buffers the same memory, wherever it lies (sharding frees it between two uses). Else all tensors
    have to lie in the same place, and their numbers may be others.
    """
    marks = (_same_memory, _same_numbers) if versions else (_same_place, _same_place)
    return [
        Settings(path, Same(module), type(module), _own(module, *marks))
        for path, module in model.named_modules()
    ]


def first_change(before: list[Settings], now: list[Settings]) -> str | None:
    """The first thing that is not the same in both, by its name in the model; None where all is."""
    if before == now:
        return None
    for old, new in zip(before, now, strict=False):
        if old[:3] != new[:3]:
            more = new.path not in {one.path for one in before}
            return f"the module {new.path if more else old.path}"
        for name in [*old.own, *new.own]:
            if name not in old.own or name not in new.own or old.own[name] != new.own[name]:
                return _words(f"{old.path}." if old.path else "", name, old.own.get(name), new.own.get(name))
    return f"the module {max(before, now, key=len)[min(len(before), len(now))].path}"


def _words(path: str, name: str, old: Any, new: Any) -> str:
    if name not in _TENSORS:
        return f"{path}{name.removeprefix('_')}"
    old, new = dict(old or ()), dict(new or ())
    return path + next(key for key in [*old, *new] if old.get(key) != new.get(key))


def _own(module: nn.Module, registered: Mark, beside: Mark) -> dict[str, Any]:
    of_model = isinstance(module, PreTrainedModel)
    ignored = _OF_BLOCKS if keeps_the_contract(type(module)) else _MACHINERY
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        kind = type(value)
        if name in ignored or (of_model and name not in _OF_MODELS):
            continue
        if kind in _CONSTANTS:
            found[name] = kind, value
        elif name not in _HOOKS and name not in _TENSORS:
            found[name] = _plain(value, beside)
        elif name in _HOOKS:
            hooks = [Same(hook) for hook in value.values() if getattr(hook, "__module__", "") != _HARMLESS]
            if hooks and not name.endswith("_kwargs"):
                found[name] = hooks
        elif value:
            found[name] = _plain(value, registered)
    return found


def _plain(value: Any, mark: Mark) -> Any:
    """Something that equals another one only where nothing that code could go by differs."""
    kind = type(value)
    if kind in _CONSTANTS:
        return kind, value
    if isinstance(value, Tensor):
        return mark(value)
    if isinstance(value, dict):
        return [(name, _plain(item, mark)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return kind, [_plain(item, mark) for item in value]
    if isinstance(value, set | frozenset):
        return kind, copy.copy(value)
    if kind is partial:
        return [_plain(part, mark) for part in (value.func, value.args, value.keywords)]
    return Same(value)


def _same_place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), *_look(tensor)


def _same_memory(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), *_look(tensor)


def _same_numbers(tensor: Tensor) -> Any:
    return Same(tensor), None if tensor.is_inference() else tensor._version, _same_place(tensor)


def _look(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


class Same:
    """Equal to the same object alone, while that is alive."""

    __slots__ = ("_get",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._get() is other._get() is not None
