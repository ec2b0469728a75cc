"""A setting's value as the type of its field, without guessing across kinds; what else it is, is refused by name."""

import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rwkv_rev.arguments import is_name
from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.counts import is_plain, number, tokens
from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import shortened

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 80, 80

_KIND_NAMES: Mapping[Any, Literal["a text", "a whole number", "a number", "true or false", "null"]] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def as_type(key: str, value: Any, wanted: Any, *, length: bool = False) -> Any:
    """``value`` as ``wanted``, the type of the field ``key``; a ``length`` is taken as ``16k`` or ``1m``, too.

    Raises:
        ConfigError: for a value of another type.
    """
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ConfigError(f"{key} is a number of more than 63 bits")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not is_name(text):
            raise ConfigError(f"{key} = {_quoted(text)} is no text: it holds half a character")
    kinds = _kinds(wanted)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if typing.get_origin(kind) is list:
            items = [value] if isinstance(value, str) else value
            if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
                return list(items)
        elif kind is int and isinstance(value, str) and length:
            if str in kinds and value == AUTO:
                return value
            try:
                return tokens(value)
            except ValueError as error:
                raise ConfigError(f"{key} = {error}{', or auto' if str in kinds else ''}") from None
        elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            if not isinstance(value, str) or is_plain(value):
                return number(value)  # YAML reads 1e-4, without a dot, as a string
        elif (
            isinstance(kind, type)
            and isinstance(value, kind)
            and not (kind is int and isinstance(value, bool))
        ):
            return value
    raise ConfigError(f"{shortened(key)} = {_quoted(value)} must be {described(wanted, length=length)}")


def described(wanted: Any, *, length: bool = False) -> str:
    """A field's type in words."""
    kinds = _kinds(wanted)
    if length and str in kinds:
        return f"a whole number or {AUTO}"
    return " or ".join(_KIND_NAMES.get(kind, "a list of texts") for kind in kinds)


def _kinds(wanted: Any) -> tuple[Any, ...]:
    return typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)


def _quoted(value: Any) -> str:
    """A value as Python writes it, at most two levels of it."""
    return shortened(_REPR.repr(value))
