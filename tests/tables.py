"""Tables of small cases as one test, which names each row that fails.

Tests import it as ``from tables import failing``.
"""

from collections.abc import Callable, Iterable
from typing import Any


def failing(check: Callable[..., object], rows: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """What ``check(*row)`` says of each row that it does not hold for."""
    found = {}
    for row in rows:
        try:
            check(*row)
        except Exception as error:
            found[row] = str(error).split("\n", 1)[0] or "failed"
    return found
