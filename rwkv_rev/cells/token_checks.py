"""What the methods of a :class:`~rwkv_rev.cells.token_cell.TokenCell` give, looked at before anything broadcasts it.

Kinds and shapes alone, which no device is asked for. Each of these raises a ConfigError that names class and method.
"""

from typing import Any, Protocol

from torch import Tensor

from rwkv_rev.cells.contract import Stream, residual
from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import shortened

Token = tuple[Tensor, ...]
"""What a cell has projected of one token, [B, ...] each."""
Update = tuple[Tensor | None, Tensor]
"""z (None for 1) and c of ``part' = z part + c``, [B, M]."""


class Layered(Protocol):
    """What messages need of a cell."""

    layer: int


def check_halves(kind: type) -> None:
    """Refuse a class whose halves do not name every part from 0 on once: others would be stepped twice, or never."""
    halves = getattr(kind, "halves", None)
    try:
        named = [int(part) for half in halves or () for part in half]
    except (TypeError, ValueError):
        named = []
    if not named or sorted(named) != list(range(len(named))):
        raise ConfigError(
            f"{kind.__name__}.halves = {shortened(repr(halves))} must name each part of the state once, from 0 on: "
            "((0,), (1,)) for two halves of one part each"
        )


def projected(cell: Layered, given: Any, x: Tensor) -> Token:
    """What ``project`` has made of x [B, C, D]: tensors [B, C, ...], which gates are handed token by token."""
    parts = given if isinstance(given, tuple | list) else ()
    if not parts or not all(isinstance(part, Tensor) and part.shape[:2] == x.shape[:2] for part in parts):
        batch, length = x.shape[:2]
        raise _other(cell, "project", given, f"a tuple of tensors [B, C, ...], here [{batch}, {length}, ...]")
    return tuple(parts)


def updated(cell: Layered, given: Any, part: Tensor) -> Update:
    """What ``update`` gives for a ``part`` [B, M] of the state: z, which may be None, and c."""
    shape = list(part.shape)
    if not (isinstance(given, tuple | list) and len(given) == 2):
        raise _other(cell, "update", given, f"a pair (z, c) of {shape} each, z None for 1")
    decay, change = given
    for name, tensor in (("z", decay), ("c", change)):
        if tensor is None and name == "z":
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != part.shape:
            raise _other(cell, "update", tensor, f"{shape}, as each part of the state is", f" as {name}")
    return decay, change


def output_of(cell: Layered, given: Any, x: Tensor) -> Stream:
    """What ``read`` gives for x [B, C, D]: as many numbers, since it is added to the residual."""
    if not isinstance(given, Tensor | tuple) or residual(given).shape != x.shape:
        raise _other(cell, "read", given, f"{list(x.shape)}, as its input is")
    return given


def _other(cell: Layered, method: str, given: Any, wanted: str, name: str = "") -> ConfigError:
    return ConfigError(
        f"{type(cell).__name__}.{method} of layer {cell.layer} gives {_described(given)}{name}; it must give {wanted}"
    )


def _described(given: Any) -> str:
    if isinstance(given, tuple | list):
        return f"({', '.join(map(_described, given))})"
    if isinstance(given, Tensor):
        return f"a tensor {list(given.shape)}"
    return "None" if given is None else f"a {type(given).__name__}"
