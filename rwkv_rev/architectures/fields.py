"""What an architecture needs of the configuration for itself: ranks of low-rank maps, grids, limits.

Such a field is saved in ``config.json`` and read from it like all others, and checked when a configuration is made.
A ``config.json`` without one is damaged: the default is for new models alone.
"""

import math
from dataclasses import dataclass
from typing import Any

from rwkv_rev.printable import shortened

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Field:
    """A field of the configuration.

    Attributes:
        kind: of its values: int, float, bool or str.
        default: its value where nobody gives one, or a function of the configuration's other fields.
        what: it is, in some words for people.
        least, most: of a number, included.
        among: the values that there are; any when empty.
    """

    kind: type[int] | type[float] | type[bool] | type[str]
    default: Any
    what: str
    least: float = -math.inf
    most: float = math.inf
    among: tuple[Any, ...] = ()

    def value(self, config: Any) -> Any:
        """The default for a configuration."""
        return self.default(config) if callable(self.default) else self.default

    def checked(self, name: str, value: Any) -> Any:
        """The value, a whole number made a float where one is wanted.

        Raises:
            ValueError: saying what the field called ``name`` may be.
        """
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise ValueError(f"{name} = {shortened(repr(value))} must be {_WORDS[self.kind]}")
        if self.among and value not in self.among:
            raise ValueError(
                f"{name} = {shortened(repr(value))} must be one of {', '.join(map(str, self.among))}"
            )
        number: Any = value if self.kind in (int, float) else None
        if number is not None and not (math.isfinite(number) and self.least <= number <= self.most):
            raise ValueError(f"{name} = {value} must be {self._range()}")
        return value

    def _range(self) -> str:
        if math.isinf(self.most):
            return "finite" if math.isinf(self.least) else f"at least {self.least:g}"
        return f"from {self.least:g} to {self.most:g}" if self.least > -math.inf else f"at most {self.most:g}"
