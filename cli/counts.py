"""Numbers of tokens as options: a wrong one is a usage error."""

import typer

from rwkv_rev.counts import tokens


def count(text: str | int) -> int:
    """:func:`rwkv_rev.counts.tokens`.

    Raises:
        typer.BadParameter: for what is no such number.
    """
    try:
        return tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def counts(text: str, option: str) -> tuple[int, ...]:
    """Several, separated by commas.

    Raises:
        typer.BadParameter: naming ``option``.
    """
    try:
        return tuple(count(part) for part in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint=option) from None
