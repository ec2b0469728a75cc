"""The objectives of a run, one after another: which there are, how people name them, what goes together.

``recall:span=64,position-weighted`` is two of them, the first with a setting of its own. In whatever order they are
named, rows are laid out first (``adapt``, ``second-pass``), then questions are put in (``recall``), then places are
weighted (``position-weighted``), and the weights multiply. All that is drawn follows from the seed, the epoch and the
row, so that a resumed run, and any number of processes, sees the same.
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rwkv_rev.counts import number, whole
from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import shortened
from rwkv_rev.training.draws import uniform
from rwkv_rev.training.objectives.adapt import Adapt
from rwkv_rev.training.objectives.next_token import NextToken
from rwkv_rev.training.objectives.objective import IGNORED, Objective, Row
from rwkv_rev.training.objectives.position_weighted import PositionWeighted
from rwkv_rev.training.objectives.recall import AFTER, MARKER, Recall
from rwkv_rev.training.objectives.second_pass import SecondPass

KINDS: dict[str, type[Objective]] = {
    kind.name: kind for kind in (NextToken, Adapt, SecondPass, Recall, PositionWeighted)
}
"""By name, in the order in which they change a row."""
LAYOUTS = {"pack": "--pack", "carry_state": "--carry-state"}


@dataclass(frozen=True)
class Objectives:
    """Those of a run, in the order of :data:`KINDS`."""

    parts: tuple[Objective, ...] = (NextToken(),)

    @property
    def plain(self) -> bool:
        """Whether rows are what documents are, and all their tokens count the same."""
        return self.parts == (NextToken(),)

    @property
    def adapt(self) -> Adapt | None:
        """The one that lays parts of several documents into a row."""
        return next((part for part in self.parts if isinstance(part, Adapt)), None)

    @property
    def carries(self) -> bool:
        """Whether rows may go on with the state of the row before."""
        return all(other != "carry_state" for part in self.parts for other, _ in part.not_with)

    def room(self, length: int) -> int:
        """Tokens of one document that a row of ``length`` tokens holds at most.

        Raises:
            ConfigError: where it is too short.
        """
        for part in reversed(self.parts):
            length = part.room(length)
        return length

    def grown(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Tokens of rows of at most ``length`` that are made of so many, int64 [...]."""
        for part in self.parts:
            tokens = part.grown(tokens, length)
        return tokens

    def row(self, given: Row, length: int, *keys: int) -> Row:
        """What is trained on of a document's part, or of the joined segments of several; labels of weight 0 are -100.

        ``keys`` tell rows, epochs and seeds apart.
        """
        for part in self.parts:
            given = part.change(given, length, partial(_drawn, keys))
        return dataclasses.replace(given, labels=np.where(given.weights > 0, given.labels, IGNORED))

    def notes(self, length: int) -> list[str]:
        """What rows of ``length`` tokens look like: one line each."""
        return [note for part in self.parts if (note := part.note(length)) is not None]

    def read_by(self, ids_of: Callable[[str], list[int]]) -> "Objectives":
        """With the token ids that a tokenizer gives to marks."""
        return Objectives(
            tuple(
                dataclasses.replace(part, marker=tuple(ids_of(MARKER)), after=tuple(ids_of(AFTER)))
                if isinstance(part, Recall)
                else part
                for part in self.parts
            )
        )

    def refuse_layout(self, **chosen: bool) -> None:
        """Refuse ``pack`` or ``carry_state`` where one makes no sense.

        Raises:
            ConfigError: naming both.
        """
        for part in self.parts:
            for other, reason in part.not_with:
                if chosen.get(other):
                    raise ConfigError(
                        f"objective {part.name} and {LAYOUTS[other]} exclude each other: {reason}"
                    )

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))


def objectives_of(text: str) -> Objectives:
    """Objectives by their names, separated by commas, each with its settings: ``recall:span=64,position-weighted``.

    Raises:
        ConfigError: for names, settings and values that do not exist, and for what makes no sense together.
    """
    found: dict[str, Objective] = {}
    for given in text.split(","):
        name, *settings = (piece.strip() for piece in given.split(":"))
        if name in found:
            raise ConfigError(f"objective {name} is named twice; name it once")
        found[name] = _one(name, settings)
    if "next-token" in found and len(found) > 1:
        raise ConfigError(
            "objective next-token is what every other one begins with; leave it out beside others"
        )
    parts = tuple(found[name] for name in KINDS if name in found)
    for part in parts:
        for other, reason in part.not_with:
            if other in found:
                raise ConfigError(f"objectives {part.name} and {other} exclude each other: {reason}")
    return Objectives(parts)


def _one(name: str, settings: list[str]) -> Objective:
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(KINDS)}"
        raise ConfigError(f"objective {shortened(repr(name))} does not exist; {hint}")
    kind = KINDS[name]
    types: dict[str, Any] = {key: type(value) for key, value in kind().settings().items()}
    values: dict[str, int | float] = {}
    for setting in settings:
        key, _, value = (piece.strip() for piece in setting.partition("="))
        if key not in types:
            has = f"it has {', '.join(types)}" if types else "it has none"
            raise ConfigError(f"objective {name} has no setting {shortened(repr(key))}; {has}")
        if key in values:
            raise ConfigError(f"objective {name}: {key} is given twice; give it once")
        try:
            values[key] = whole(value) if types[key] is int else number(value)
        except ValueError as error:
            raise ConfigError(f"objective {name}: {key} = {error}") from None
    return kind(**values)


def _drawn(keys: tuple[int, ...], count: int) -> np.ndarray:
    return uniform(count, *keys)
