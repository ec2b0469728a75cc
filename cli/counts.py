"""Numbers of tokens as people write them."""

import typer

from rwkv_rev.printable import shortened

_UNITS = {"k": 1024, "m": 1024**2}
MOST = 2**40


def count(text: str | int) -> int:
    """``4096``, ``16k`` (times 1024) or ``1m`` (times 1024 * 1024).

    Raises:
        typer.BadParameter: for anything else, below 1, and above :data:`MOST`.
    """
    written = str(text).strip().lower()
    unit = _UNITS.get(written[-1:], 1)
    digits = written[:-1] if unit > 1 else written
    if not digits.isascii() or not digits.isdigit() or digits.strip("0") == "":
        raise typer.BadParameter(f"{text!r} is not a number of tokens such as 4096, 16k or 1m")
    if len(digits) > 15 or (number := int(digits) * unit) > MOST:
        raise typer.BadParameter(f"{shortened(text)} is more tokens than {MOST:,}")
    return number


def counts(text: str, option: str) -> tuple[int, ...]:
    """Several, separated by commas.

    Raises:
        typer.BadParameter: naming ``option``.
    """
    try:
        return tuple(count(part) for part in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint=option) from None
