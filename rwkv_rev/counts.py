"""Numbers as people write them, by one rule for files of settings, options and functions.

A plain number has neither underscores (``1_0``) nor zeros in front (``010``), which some readers take for others than
they look like. A number of tokens may be ``16k`` (times 1024) or ``1m`` (times 1024 * 1024).
"""

import re

from rwkv_rev.printable import shortened

_UNITS = {"k": 1024, "m": 1024**2}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-f]+)", re.IGNORECASE)
_NUMBER = re.compile(
    r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?(e[-+]?[0-9]+)?|\.[0-9]+(e[-+]?[0-9]+)?|0x[0-9a-f]+|\.?inf|\.?nan)",
    re.IGNORECASE,
)
MOST = 2**40
_DIGITS = 40  # before anything is multiplied; what is too large for a setting is told of by its name


def is_plain(text: str) -> bool:
    """Whether all readers make the same number of a text."""
    return _NUMBER.fullmatch(text) is not None


def whole(text: str | int) -> int:
    """The whole number that ``text`` stands for.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(text, int):
        return text
    if not _WHOLE.fullmatch(text) or len(text) > _DIGITS:
        raise ValueError(f"{shortened(repr(text))} is not a plain whole number such as 10")
    return int(text, 16 if "x" in text.lower() else 10)


def number(text: str | float) -> float:
    """The number that ``text`` stands for, infinite and NaN ones too.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(text, int | float):
        return float(text)
    if not is_plain(text):
        raise ValueError(f"{shortened(repr(text))} is not a plain number such as 10, 0.5 or 1e-4")
    return (
        float(whole(text))
        if "x" in text.lower()
        else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    )


def tokens(text: str | int) -> int:
    """The number of tokens that ``text`` stands for.

    Raises:
        ValueError: for anything else, below 1, and above :data:`MOST`.
    """
    written = str(text).strip().lower()
    unit = _UNITS.get(written[-1:], 1)
    digits = written[:-1] if unit > 1 else written
    if not re.fullmatch("[1-9][0-9]*", digits):
        raise ValueError(f"{shortened(repr(text))} is not a number of tokens such as 4096, 16k or 1m")
    if len(digits) > 15 or (count := int(digits) * unit) > MOST:
        raise ValueError(f"{shortened(text)} is more tokens than {MOST:,}")
    return count
