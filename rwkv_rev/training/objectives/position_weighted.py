"""``position-weighted``: later tokens count more, so that what only a long context explains is what is learned.

    w_t = first + (1 - first) * min(1, t / (T - 1))^power

t counts the tokens of its document before a token (of its row, where the state is not carried on), T is the context
length. So the last token of a full context weighs 1, the first one ``first``, and a short document counts less than a
long one. The gradient is a weighted mean over fewer tokens in effect: with power = 1 and first = 0 over three quarters
of them ((sum w)^2 / sum w^2).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rwkv_rev.training.objectives.objective import Draw, Objective, Row


@dataclass(frozen=True)
class PositionWeighted(Objective):
    """See the module's docstring."""

    name: ClassVar[str] = "position-weighted"
    power: float = 1.0
    first: float = 0.1

    def __post_init__(self) -> None:
        self.require("power", 0, 100)
        self.require("first", 0, 1)

    def change(self, row: Row, length: int, draw: Draw) -> Row:
        place = np.minimum(1.0, (row.start + np.arange(len(row.ids))) / (length - 1))
        weights = self.first + (1 - self.first) * place**self.power
        return replace(row, weights=(row.weights * weights).astype(np.float32))
