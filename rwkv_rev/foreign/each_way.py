"""Which methods of models every way to a gradient calls.

``full`` calls the base model, which steps its cells; the sweeps embed, advance, replay and normalise by methods of
their own. What stands in the place of a method that one way calls and another does not makes their losses differ,
whatever was declared of it. So it is refused, on an object, on a class and in a subclass; of cells and blocks, too
(:mod:`rwkv_rev.cells.overridden`). What transformers' own models have, such as ``prepare_inputs_for_generation``, is
everybody's to override.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from rwkv_rev.cells.overridden import is_method, is_ours, of_every_way
from rwkv_rev.code_origin import defined_in
from rwkv_rev.foreign.declared_code import original

IN_A_MODEL = (
    "is not called by every strategy: put the code into a hook or a module inside the model, and declare that with "
    "rwkv_rev.position_wise(...)"
)
IN_A_CELL = (
    "is not called by every strategy: put the code into a hook or a module inside the model, declared with "
    "rwkv_rev.position_wise(...), or write a cell with its own step, advance, replay and retreat"
)
IN_COMPUTE = (
    "makes what a chunk adds to the memory, so that results would depend on where the context is cut: put what treats "
    "each token by itself into the cell's project, output_of or handed_up, or write a cell with its own step, advance, "
    "replay and retreat"
)
ON_THE_BASE = (
    "is not called by every strategy, which call its layers one by one: put it on the model with the head, on a block "
    "or on the final norm"
)
IN_PLACE_OF_A_LAYER = (
    "stands in the place of a whole block or cell, which the sweeps take apart: use bptt='full', or put your code into "
    "a hook on the block or cell, or around a linear map inside of it, declared with rwkv_rev.position_wise(...)"
)
NO_LAYER = (
    "is no block and no cell, and stands where one belongs: a layer is left out by taking its block out of the model's "
    "blocks, and lowering config.num_hidden_layers by one"
)
OBJECTIONS = (IN_A_MODEL, IN_A_CELL, IN_COMPUTE, ON_THE_BASE, IN_PLACE_OF_A_LAYER, NO_LAYER)
"""These say what works."""

DECLARABLE = frozenset({"initial_state"})
"""Methods of models that every way calls alike."""

_SETTINGS = frozenset({"bptt", "set_bptt", "add_initial_state", "set_context_parallel"})
_OF_OTHERS = frozenset({"get_input_embeddings", "modules", "named_parameters", "parameters"})
"""Methods of models that are not ours alone, and that strategies call."""
_KNOWN = ("rwkv_rev.", "torch.", "transformers.")
_CALLS = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl"})
"""Ways into a base model, which the sweeps leave out."""


def overridden(model: nn.Module, *, inside: bool) -> Iterator[tuple[str, Any]]:
    """Methods and properties of one of our models that are not its own, by name.

    Args:
        inside: whether the model is called by another one, or not at all.
    """
    if not isinstance(model, PreTrainedModel):
        return
    kind: Any = type(model)
    for name in (*sorted(_called(kind)), *(sorted(_CALLS) if inside else ())):
        value = replaced(model, name)
        if value is None:
            value = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
            if value is None or defined_in(value, _KNOWN):
                continue
        if name in _OF_OTHERS and _gives_the_same(model, name):
            continue
        yield name, value


def replaced(module: nn.Module, name: str) -> Any:
    """What stands on a module itself before a method of its class; None where nothing does."""
    value = original(vars(module).get(name))
    own = getattr(value, "__self__", None) is module
    return None if own and value.__func__ is getattr(type(module), name, None) else value


def _gives_the_same(model: Any, name: str) -> bool:
    """Whether what stands in the place of a method without arguments gives what that gives, the very objects."""
    places = [vars(base)[name] for base in type(model).__mro__ if name in vars(base)]
    ours = next(method for method in places if defined_in(method, _KNOWN))
    given, expected = getattr(model, name)(), ours(model)
    if isinstance(expected, nn.Module):
        return given is expected
    return [_identity(each) for each in given] == [_identity(each) for each in expected]


def _identity(value: Any) -> Any:
    return (value[0], id(value[1])) if isinstance(value, tuple) else id(value)


def in_a_cell(name: str) -> str:
    """What is said of a method of a cell or a block that stands in the place of one of ours."""
    return IN_COMPUTE if name == "compute" else IN_A_CELL


def is_called_everywhere(layer: type, name: str) -> bool:
    """Whether every way to a gradient calls the method of a class where it would call that of ours."""
    of_model: Any = layer
    if issubclass(layer, PreTrainedModel):
        return name in DECLARABLE or name not in _called(of_model) | _CALLS
    return of_every_way(layer, name)


@lru_cache(maxsize=16)
def _called(kind: type) -> frozenset[str]:
    """Methods and properties that our models have and transformers' have not, and what else strategies call."""
    names = {
        name
        for base in kind.__mro__
        if is_ours(base)
        for name, value in vars(base).items()
        if is_method(value) and not hasattr(PreTrainedModel, name) and not hasattr(GenerationMixin, name)
    }
    return frozenset(names - _SETTINGS | _OF_OTHERS)
