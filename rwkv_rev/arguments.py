"""Arguments of public functions are of the names and kinds that their signatures say, or refused before anything else.

Kinds alone: what a number or text of the right kind may say is checked where its meaning is known. A truth value is no
number, a text no truth value, bytes no path; a path or name names something, and no text holds half a character.
"""

import collections.abc
import difflib
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import is_utf8, shortened

_BITS = 63
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}


P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that raises ConfigError for arguments of other kinds than it is annotated with, and expands ``~``."""
    signature = inspect.signature(function)
    hints = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(function.__name__, signature, kwargs, {})
        given = signature.bind(*args, **kwargs)
        check_kinds(hints, given.arguments)
        for name, value in given.arguments.items():
            if Path in _choices(hints.get(name)) and (name != "text" or isinstance(value, Path)):
                given.arguments[name] = expanded(value)
        return function(*given.args, **given.kwargs)

    return checking


def named(
    function: Callable[P, R], name: str | None = None, elsewhere: Mapping[str, str] | None = None
) -> Callable[P, R]:
    """A function that raises TypeError for a keyword argument that it does not take, with the nearest that it takes.

    Args:
        function: any.
        name: what its users call it.
        elsewhere: what others call its arguments.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def naming(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(name or function.__name__, signature, kwargs, elsewhere or {})
        return function(*args, **kwargs)

    return naming


def named_fields(made: type[C], elsewhere: Mapping[str, str] | None = None) -> type[C]:
    """A class whose constructor is :func:`named`."""
    made.__init__ = named(made.__init__, made.__name__, elsewhere)  # type: ignore[method-assign]
    return made


def refuse_unknown(
    name: str, signature: inspect.Signature, kwargs: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> None:
    """Raise TypeError for the first of ``kwargs`` that the function of that name and signature does not take."""
    known = signature.parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for given in kwargs:
        if given not in known:
            takes = [parameter for parameter in known if parameter != "self"]
            near = difflib.get_close_matches(given, [*takes, *elsewhere], n=1)
            hint = (
                f"did you mean {elsewhere.get(near[0], near[0])}?" if near else f"it takes {', '.join(takes)}"
            )
            raise TypeError(f"{name}() got an unexpected keyword argument {shortened(repr(given))}; {hint}")


def expanded(path: Any) -> Any:
    """A path with the home folder for its ``~``, as shells expand it; anything else as it is."""
    if isinstance(path, str | Path) and str(path).startswith("~"):
        return type(path)(os.path.expanduser(path))  # noqa: PTH111 (Path's own fails for users that are not there)
    return path


def check_kinds(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first of ``values`` that is not of the kind that ``hints`` has under its name."""
    for name, hint in hints.items():
        if name not in values:
            continue
        value = values[name]
        if not _is(value, hint):
            raise ConfigError(f"{name} = {shortened(repr(value))} must be {_described(hint)}")
        if isinstance(value, Integral) and abs(int(value)) >= 1 << _BITS:
            raise ConfigError(f"{name} is a number of more than {_BITS} bits")
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str | os.PathLike) and (wrong := _no_text(name, text)):
                raise ConfigError(f"{name} = {shortened(repr(value))} {wrong}")
            if Path in _choices(hint) and name != "text" and "\0" in str(text):
                raise ConfigError(f"{name} = {shortened(repr(value))} holds a zero byte, which no name does")


def _choices(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _is(value: Any, hint: Any) -> bool:
    choices = _choices(hint)
    if len(choices) > 1:
        return any(_is(value, choice) for choice in choices)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(choice) for choice in inner)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is not None:
        items = isinstance(value, origin) and not isinstance(value, str | bytes)
        return items and all(_is(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    return isinstance(value, hint)


_CONTENTS = ("prompt", "text", "command")
"""Arguments that are texts to be read, which may be empty but must be UTF-8; all others name something."""


def _no_text(name: str, given: str | os.PathLike[str]) -> str | None:
    """Why an argument of that name cannot be this text or path."""
    text = os.fspath(given)
    if name in _CONTENTS and isinstance(given, str):
        return None if is_utf8(text) else "is no text: it holds half a character, or bytes that are no UTF-8"
    if not text:
        return "must name something"
    return None if is_name(text) else "is no text: it holds half a character"


def is_name(text: str) -> bool:
    """Whether a text can name a file: JSON and YAML can write half of a surrogate pair."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _described(hint: Any) -> str:
    names: list[str] = []
    for choice in _choices(hint):
        origin, inner = typing.get_origin(choice), typing.get_args(choice)
        if choice is Path:
            names = [*(name for name in names if name != _NAMES[str]), "a text or a path"]
        elif origin is Literal:
            names.append("one of " + ", ".join(map(repr, inner)))
        elif origin is collections.abc.Callable:
            names.append("a function")
        elif origin is not None:
            names.append(f"a {'tuple' if origin is tuple else 'list'} ({_described(inner[0])} each)")
        else:
            names.append(_NAMES.get(choice, f"a {getattr(choice, '__name__', choice)}"))
    return " or ".join(dict.fromkeys(names))
