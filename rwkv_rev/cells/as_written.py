"""Whether a cell computes by this package's own methods alone, so that nobody else has what they hand to each other.

A subclass may give a weight for a gate, keep what :meth:`~.shifted_cell.ShiftedCell.project` made, read it once more
in ``output_of``, or draw random numbers. What goes without saying of a cell of ours is then to be looked at, or left.
"""

from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from rwkv_rev.cells.gates import returns_new_memory
from rwkv_rev.cells.overridden import is_method, is_ours
from rwkv_rev.code_origin import defined_in


class _Written(NamedTuple):
    """Methods that classes of ours give a kind of cell: their names, and the functions among them."""

    names: frozenset[str]
    functions: tuple[tuple[str, Any], ...]


def is_as_written(cell: nn.Module) -> bool:
    """Whether every method that a class of ours has is what is called, on the cell and on its class.

    Some microseconds, since anybody may replace one at any time.
    """
    kind: type = type(cell)
    written = _written(kind)
    if written is None or not written.names.isdisjoint(vars(cell)):
        return False
    return all(getattr(kind, name, None) is function for name, function in written.functions)


def may_take(cell: nn.Module, module: nn.Module) -> bool:
    """Whether a method of the cell may write to what the linear map ``module`` gave another of its methods.

    False where there are gradients, and where a model is compiled, which makes no difference there.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return returns_new_memory(module) and is_as_written(cell)


@lru_cache(maxsize=256)
def _written(kind: type) -> _Written | None:
    """None where a method is not ours."""
    names = frozenset(
        name
        for base in kind.__mro__
        if is_ours(base)
        for name, value in vars(base).items()
        if is_method(value) and not name.startswith("__")
    )
    found = {name: next(vars(base)[name] for base in kind.__mro__ if name in vars(base)) for name in names}
    if not all(defined_in(value, ("rwkv_rev.", "torch.")) for value in found.values()):
        return None
    functions = tuple((name, value) for name, value in found.items() if type(value) is FunctionType)
    return _Written(names, functions)
