"""Which modules of a model strategies call: of a language model, the base model and the head with what is in them.

What a subclass has beside them, such as a value head, computes nothing of a labelled loss, and may be code of any kind.
Where a hook or a module calls it after all, it is part of what that does, which is for that to declare.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from rwkv_rev.foreign.overriding import is_foreign_tensor


def _children(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Right below a module, with their paths; not what computes its weights, which sees no positions."""
    return [
        (f"{path}{name}", child)
        for name, child in module._modules.items()
        if child is not None and not (name == "parametrizations" and parametrize.is_parametrized(module))
    ]


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Right below ``model``, what strategies call, with paths."""
    children = _children(model)
    if isinstance(model, PreTrainedModel) and (base := model.base_model) is not model:
        called = {id(base), id(getattr(model, "head", None))}
        if called <= {id(child) for _, child in children}:
            return [(name, child) for name, child in children if id(child) in called]
    return children


def never_called(model: nn.Module) -> list[nn.Module]:
    """Right below ``model``, what no strategy calls."""
    parts = {id(part) for _, part in _parts(model)}
    return [child for _, child in _children(model) if id(child) not in parts]


def below(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``model`` that strategies call."""
    waiting = _parts(model)[::-1]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        waiting += reversed(_children(module, f"{path}."))


def foreign_tensors(model: nn.Module) -> dict[type, str]:
    """Subclasses of tensors in the modules' places for weights, with one place of each in words."""
    parts = _parts(model)
    kinds: set[type] = set()
    for module in (model, *(module for _, part in parts for module in part.modules())):
        kinds.update(map(type, module._parameters.values()))
        kinds.update(map(type, module._buffers.values()))
        kinds.update(map(type, vars(module).values()))
    return {kind: _place_of_tensors(model, parts, kind) for kind in kinds if is_foreign_tensor(kind)}


def _place_of_tensors(model: nn.Module, parts: list[tuple[str, nn.Module]], kind: type) -> str:
    for path, module in (
        ("", model),
        *(named for name, part in parts for named in part.named_modules(prefix=name)),
    ):
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if type(value) is kind:
                return f"the tensor class {kind.__name__} of {path}{'.' if path else ''}{name}"
    raise AssertionError
