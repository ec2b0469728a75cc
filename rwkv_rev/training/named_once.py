"""Records whose fields have a name each: of two values of one name readers disagree which counts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rwkv_rev.printable import shortened


class NamedTwice(ValueError):
    """A name that stands for two values."""

    def __init__(self, name: str) -> None:
        super().__init__(f"two fields of one record are called {shortened(name)!r}; rename or remove one")


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What ``json.loads`` makes of an object, as its ``object_pairs_hook``.

    Raises:
        NamedTwice: where ``json`` would take the last in silence.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        refuse_twice([name for name, _ in pairs])
    return found


def refuse_twice(names: Sequence[str]) -> None:
    """Raise NamedTwice for the first name that stands there twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise NamedTwice(name)
