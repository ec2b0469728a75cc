"""Numbers as options: a wrong one is a usage error. By the rule of :mod:`rwkv_rev.counts`, as in files of settings."""

import math
from collections.abc import Callable
from typing import TypeVar

import typer

from rwkv_rev import counts as plain
from rwkv_rev.bptt_settings import AUTO

T = TypeVar("T")


def count(text: str | int) -> int:
    """:func:`rwkv_rev.counts.tokens`.

    Raises:
        typer.BadParameter: for what is no such number.
    """
    try:
        return plain.tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def length(text: str | int) -> int | str:
    """A chunk length: :func:`count`, or ``auto``.

    Raises:
        typer.BadParameter: for what is neither.
    """
    if text == AUTO:
        return AUTO
    try:
        return plain.tokens(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}, or auto") from None


def counts(text: str, option: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """Several of what ``kind`` reads, separated by commas.

    Raises:
        typer.BadParameter: naming ``option``.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint=option) from None


def whole(least: float = -math.inf, most: float = math.inf) -> Callable[[str | int], int]:
    """Parser of options that are whole numbers from ``least`` to ``most``."""

    def parse(text: str | int) -> int:
        try:
            found = plain.whole(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        _refuse_outside(found, least, most)
        return found

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str | float], float]:
    """Parser of options that are numbers from ``least`` to ``most``."""

    def parse(text: str | float) -> float:
        try:
            found = plain.number(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        _refuse_outside(found, least, most)
        return found

    return parse


def _refuse_outside(found: float, least: float, most: float) -> None:
    if found < least:
        raise typer.BadParameter(f"{found} must be at least {least}")
    if found > most:
        raise typer.BadParameter(f"{found} must be at most {most}")
