"""What all modules of a model go by beside the numbers in their weights: equal as long as they do the same.

Work that is done once more later, from a recording or for a gradient, must find the modules as they were. What code
goes by is not only in tensors: adapters that are active, their scale, weights that are merged, dropout's probability,
training or evaluation, which activation stands in a sequence, hooks. :func:`settings` looks at all of that: classes,
modules inside modules, plain attributes, hooks, and where parameters and buffers lie. Not seen is what changes inside
an object of another kind, which is compared by identity, and what code looks up outside of its module.

Some attributes are notes that calls make (counts, the last output, a weight that a hook sets before each call): what a
call changes that is not a module's first, the calls of the second time change again, and :func:`notes_of` says which
that are. Whether results depend on them is to be seen from the results.

Attributes of whole models (``PreTrainedModel``) are not looked at but for the methods that strategies call, nor whether
blocks are computed once more for their gradient: layers do not go by them, and they are how gradients are made.
"""

import copy
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Size, Tensor, device, dtype, nn
from torch.nn.modules import module as module_globals
from transformers import PreTrainedModel

from rwkv_rev.cells.block import keeps_the_contract
from rwkv_rev.code_origin import origin
from rwkv_rev.foreign.search import CALLED

_HOOKS = frozenset({"_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"})
_TENSORS = frozenset({"_parameters", "_buffers"})
_MACHINERY = vars(nn.Module()).keys() - _HOOKS - _TENSORS - {"training"}
"""What every module has and no result depends on; modules inside a module are looked at themselves."""
_OF_MODELS = _HOOKS | _TENSORS | {"training", *CALLED}
_CONSTANTS = frozenset({str, bool, int, float, bytes, complex, type(None), device, dtype, Size})

_HARMLESS = "transformers.modeling_utils"
"""Where the hook is from that lets embeddings require a gradient, which trainers put on and take off at will."""

Mark = Callable[[Tensor], Any]
Place = tuple[str, str]
"""A module's name in the model, and an attribute's in it."""


class Settings(NamedTuple):
    """Of one module: its name in the model, itself, its class with what that calls, and what it goes by, by name."""

    path: str
    module: "Same"
    kind: tuple[type, Any]
    own: dict[str, Any]


def settings(model: nn.Module, *, versions: bool = False) -> list[Settings]:
    """What the modules of ``model`` go by, itself included, but for hooks on it; keeps none of them alive.

    ``versions``: whether tensors that are plain attributes must be the same objects with the same numbers, and
    parameters and buffers the same memory, wherever it lies (sharding frees it between two uses). Else all tensors
    have to lie in the same place, and their numbers may be others.
    """
    marks = (_same_memory, _same_numbers) if versions else (_same_place, _same_place)
    functions: dict[type, Any] = {}
    found = []
    for path, module in model.named_modules():
        layer = type(module)
        if layer not in functions:
            functions[layer] = _functions(layer)
        found.append(Settings(path, Same(module), (layer, functions[layer]), _own(module, *marks)))
    own = found[0].own
    for kind in _HOOKS:  # those on the model see whole contexts, and no chunk
        own.pop(kind, None)
        if hooks := _hooks(getattr(module_globals, f"_global{kind}", {})):
            own[f"global{kind}"] = hooks
    return found


def numbers_and_switches(model: nn.Module) -> list[tuple[str, str, float | bool]]:
    """Of :func:`settings` those that any process can compare: modules' names, attributes, and their values.

    No integers, in which a module may well keep which of several processes it is in.
    """
    return [
        (one.path, name, value[1])
        for one in settings(model)
        for name, value in sorted(one.own.items())
        if isinstance(value, tuple) and value[0] in (float, bool)
    ]


def first_change(before: list[Settings], now: list[Settings], notes: Container[Place] = ()) -> str | None:
    """The first thing that is not the same in both and not among ``notes``, by its name in the model; None without."""
    if before == now:
        return None
    for old, new in zip(before, now, strict=False):
        if old[:3] != new[:3]:
            more = new.path not in {one.path for one in before}
            return f"the module {new.path if more else old.path}"
        for name in _changes(old, new):
            if not any((old.path, place) in notes for place in _around(name)):
                return _words(f"{old.path}." if old.path else "", name, old.own.get(name), new.own.get(name))
    if len(before) != len(now):
        return f"the module {max(before, now, key=len)[min(len(before), len(now))].path}"
    return None


def notes_of(before: list[Settings], after: list[Settings]) -> set[Place]:
    """Attributes that calls of the modules have changed themselves, from what was before and after such calls."""
    return {
        (old.path, name)
        for old, new in zip(before, after, strict=False)
        if old[:3] == new[:3] and old.own != new.own
        for name in _changes(old, new)
        if name not in _HOOKS | _TENSORS | {"training"}
    }


def _changes(old: Settings, new: Settings) -> list[str]:
    names = dict.fromkeys([*old.own, *new.own])
    return [n for n in names if _value(old, n) != _value(new, n)]


def _value(one: Settings, name: str) -> Any:
    """What a module has by a name, or by its class; ``()``, which no value equals, without either."""
    if name in one.own:
        return one.own[name]
    inherited = getattr(one.kind[0], name, ())
    return (type(inherited), inherited) if type(inherited) in _CONSTANTS else ()


def _around(name: str) -> Iterator[str]:
    """The name of something inside an attribute, and of all that it is in: ``a['b'][0]``, ``a['b']``, ``a``."""
    yield name
    for end in range(len(name) - 1, 0, -1):
        if name[end] == "[":
            yield name[:end]


def _words(path: str, name: str, old: Any, new: Any) -> str:
    if name not in _TENSORS:
        return f"{path}{name.removeprefix('_')}"
    old, new = dict(old or ()), dict(new or ())
    return path + next(key for key in [*old, *new] if old.get(key) != new.get(key))


def _functions(layer: type[nn.Module]) -> list[Any]:
    """What a class calls; of whole models, what strategies call."""
    if issubclass(layer, PreTrainedModel):
        return [layer.forward, *(getattr(layer, name, None) for name in CALLED)]
    bases = [base for base in layer.__mro__ if base not in (nn.Module, object)]
    own = [
        value for base in bases for value in vars(base).values() if callable(value) or type(value) is property
    ]
    return [nn.Module._call_impl, *own]


def _own(module: nn.Module, registered: Mark, beside: Mark) -> dict[str, Any]:
    of_model = isinstance(module, PreTrainedModel)
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _MACHINERY or (of_model and name not in _OF_MODELS):
            continue
        if name == "recompute" and keeps_the_contract(type(module)):
            continue
        kind = type(value)
        if kind in _CONSTANTS:
            found[name] = kind, value
        elif name in _TENSORS:
            if value:
                found[name] = [
                    (key, None if tensor is None else registered(tensor)) for key, tensor in value.items()
                ]
        elif name in _HOOKS:
            if value and (hooks := _hooks(value)):
                found[name] = hooks
        else:
            _look_into(found, name, value, beside)
    return found


def _hooks(hooks: dict[int, Any]) -> list["Same"]:
    return [Same(hook) for hook in hooks.values() if origin(hook) != _HARMLESS]


def _look_into(found: dict[str, Any], name: str, value: Any, mark: Mark) -> None:
    """Note what equals another one only where nothing that code could go by differs, of all that is in ``value``."""
    kind = type(value)
    inside: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        found[name] = kind, [_mark(key, mark) for key in value]
        inside = value.items()
    elif isinstance(value, list | tuple):
        found[name] = kind, len(value)
        inside = enumerate(value)
    elif kind is partial:
        found[name] = kind
        inside = enumerate((value.func, value.args, value.keywords))
    else:
        found[name] = _mark(value, mark)
        return
    for number, (key, item) in enumerate(inside):
        place = repr(key) if type(key) in _CONSTANTS else number
        _look_into(found, f"{name}[{place}]", item, mark)


def _mark(value: Any, mark: Mark) -> Any:
    kind = type(value)
    if kind in _CONSTANTS:
        return kind, value
    if isinstance(value, Tensor):
        return mark(value)
    return (kind, copy.copy(value)) if isinstance(value, set | frozenset) else Same(value)


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
