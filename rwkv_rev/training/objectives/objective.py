"""What an objective is: a change of a row's tokens, a weight for each of its labels, or both.

    loss = sum_t w_t nll_t / sum_t w_t

over the labels of all rows of a step (:mod:`rwkv_rev.loss_weights`), nll_t = -ln p(x_t | all tokens of the row before
t, and the state carried into it). Every objective begins with w_t = 1 where a token has loss and with no label where it
has none; what it changes is its own docstring.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from rwkv_rev.errors import ConfigError

IGNORED = -100
Draw = Callable[[int], np.ndarray]
"""Gives so many numbers from 0 to 1, which follow from the seed, the epoch and the row; the same in every call."""


@dataclass(frozen=True)
class Row:
    """Tokens of a document, or of a row made of several.

    Attributes:
        ids: int64 [n].
        labels: int64 [n], not shifted; -100 where there is no loss.
        weights: float32 [n], of the labels.
        start: tokens of the document before the first one here, where these are carried as a state.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    start: int = 0

    @classmethod
    def of(cls, ids: np.ndarray, labels: np.ndarray, start: int = 0) -> "Row":
        return cls(ids, labels, np.ones(len(ids), np.float32), start)

    @classmethod
    def joined(cls, rows: list["Row"]) -> "Row":
        """One behind the other."""
        ids, labels, weights = zip(*((row.ids, row.labels, row.weights) for row in rows), strict=True)
        return cls(np.concatenate(ids), np.concatenate(labels), np.concatenate(weights), rows[0].start)


@dataclass(frozen=True)
class Objective:
    """One objective; its fields are its settings, numbers that have defaults."""

    name: ClassVar[str]
    not_with: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Other objectives, ``pack`` and ``carry_state``, each with the reason why the two make no sense together."""

    def room(self, length: int) -> int:
        """Tokens of documents that a row of ``length`` tokens holds.

        Raises:
            ConfigError: where it is too short.
        """
        return length

    def grown(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """What so many of them, int64 [...], become, at most ``length`` each."""
        return tokens

    def change(self, row: Row, length: int, draw: Draw) -> Row:
        """The row to train on, and the weights of its labels."""
        return row

    def note(self, length: int) -> str | None:
        """What rows look like, for the user."""
        return None

    def settings(self) -> dict[str, int | float]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def require(self, name: str, least: float, most: float = math.inf) -> None:
        """Refuse a setting outside of a range.

        Raises:
            ConfigError: naming it.
        """
        value = self.settings()[name]
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise ConfigError(f"objective {self.name}: {name} = {value:g} must be {limits}")

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{name}={value!r}" for name, value in self.settings().items())])
