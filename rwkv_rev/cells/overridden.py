"""Which methods of cells and blocks every way through a chunk calls: stepping, both sweeps, and all again.

A subclass of a cell that overrides one way through a chunk alone computes other numbers in that one. What the ways of a
class by itself have to agree in is the contract's.
"""

from functools import lru_cache
from typing import Any

from rwkv_rev.cells.block import ResidualBlock
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.code_origin import origin

_BLOCKS = frozenset({"forward", "parts", "refuse_changing", "lift"})
_CELLS = frozenset(
    {
        "forward",
        "project",
        "compute",
        "output_of",
        "handed_up",
        "mixes",
        "log_decay",
        "gates",
        "update",
        "read",
    }
)
"""Methods of blocks and cells that every way calls."""

_STEPS = ("step", "step_again", "advance", "replay", "retreat")
_STATES = ("exact", "values", "plan", "carried", "is_left")
_MEMORIES = ("update", "advance_memory", "retreat_memory")
_OF_MEMORIES = ("exact_memory", "memory_plan", "compute")


def of_every_way(layer: type, name: str) -> bool:
    """Whether every way calls the method of a class, be it a cell's or a block's, where it would call that of ours."""
    if issubclass(layer, ResidualBlock):
        return name in _BLOCKS
    if issubclass(layer, ReversibleCell):
        if name == "compute":
            return not _has_memory(layer)
        return name in _CELLS and not (name == "update" and hasattr(layer, "advance_memory"))
    return True


def _has_memory(layer: type) -> bool:
    """Whether a cell with a token shift has a memory beside it: then ``compute`` makes what a chunk adds to that."""
    return sum("advance_memory" in vars(base) for base in layer.__mro__) > 1


def overridden_alone(layer: type) -> str | None:
    """A method of a cell or a block that a subclass overrides without those that do the same in other ways."""
    if is_ours(layer) or not issubclass(layer, ResidualBlock | ReversibleCell):
        return None
    if issubclass(layer, ResidualBlock):
        names = [n for n, v in vars(ResidualBlock).items() if not n.startswith("__") and is_method(v)]
        return next(
            (name for name in names if name not in _BLOCKS and not is_ours(_holder(layer, name))), None
        )
    steps = _filled_in(layer, _STEPS)
    if not any(steps.values()):
        return _newer_alone(layer)
    memories = _filled_in(layer, _MEMORIES) if hasattr(layer, "advance_memory") else {}
    looked_at = steps | _filled_in(layer, _STATES)
    if any(memories.values()):
        looked_at |= memories | _filled_in(layer, _OF_MEMORIES)
    return next((name for name, ours in looked_at.items() if not ours), None) or _newer_alone(layer)


def _newer_alone(layer: type) -> str | None:
    """A way that a class of others, or a mixin, has anew before ways that are still those of a base of others."""
    memories = (*_MEMORIES, *_OF_MEMORIES) if hasattr(layer, "advance_memory") else ()
    for ways, states in ((_STEPS, _STATES), (memories[: len(_MEMORIES)], memories[len(_MEMORIES) :])):
        holders = {name: _places(layer, name) for name in (*ways, *states)}
        last = max((holders[name][0] for name in ways if holders[name]), default=0)
        for name, places in holders.items():
            if len(places) > 1 and places[0] < last:
                return name
    return None


def _places(layer: type, name: str) -> list[int]:
    """Where classes of others fill a method in, in the order in which it is looked for."""
    return [
        place
        for place, base in enumerate(layer.__mro__)
        if name in vars(base)
        and not is_ours(base)
        and not getattr(vars(base)[name], "__isabstractmethod__", False)
    ]


def first_of_ours(layer: type) -> Any:
    """The first class of ours that a class is or derives from; None for others."""
    return next((base for base in layer.__mro__ if is_ours(base)), None)


def _filled_in(layer: type, names: tuple[str, ...]) -> dict[str, bool]:
    """Of the methods that a class of ours has filled in: whether what it has is what is called."""
    found = {}
    for name in names:
        holders = [base for base in layer.__mro__ if name in vars(base)]
        if any(map(is_ours, holders[:-1])):
            found[name] = is_ours(holders[0])
    return found


def _holder(layer: type, name: str) -> type:
    return next(base for base in layer.__mro__ if name in vars(base))


def is_method(value: Any) -> bool:
    """Whether what a class has under a name is a function or a property."""
    return callable(value) or isinstance(value, property | classmethod | staticmethod)


@lru_cache(maxsize=256)
def is_ours(layer: type) -> bool:
    """Whether a class is one of this package's."""
    return layer.__module__.startswith("rwkv_rev.") and origin(layer) != ""
