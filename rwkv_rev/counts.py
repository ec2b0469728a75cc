"""Numbers of tokens as people write them: ``4096``, ``16k`` (times 1024), ``1m`` (times 1024 * 1024)."""

from rwkv_rev.printable import shortened

_UNITS = {"k": 1024, "m": 1024**2}
MOST = 2**40


def tokens(text: str | int) -> int:
    """The number that ``text`` stands for.

    Raises:
        ValueError: for anything else, below 1, and above :data:`MOST`.
    """
    written = str(text).strip().lower()
    unit = _UNITS.get(written[-1:], 1)
    digits = written[:-1] if unit > 1 else written
    if not digits.isascii() or not digits.isdigit() or digits.strip("0") == "":
        raise ValueError(f"{shortened(repr(text))} is not a number of tokens such as 4096, 16k or 1m")
    if len(digits) > 15 or (number := int(digits) * unit) > MOST:
        raise ValueError(f"{shortened(text)} is more tokens than {MOST:,}")
    return number
