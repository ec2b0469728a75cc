"""``second-pass``: the document is read twice, and the second reading counts: learning *from* the context.

    x_1 ... x_n  becomes  x_1 ... x_n x_1 ... x_n,    w_t = first for t <= n, 1 for t > n + 1

and x_1 is predicted neither time: nothing says that the text begins anew. A row holds T / 2 tokens of a document,
twice, so that a step learns from half as many. At the second reading all that there is to know of a token has been
read, n tokens before: the loss falls by what the state keeps of it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rwkv_rev.errors import ConfigError
from rwkv_rev.training.objectives.objective import IGNORED, Draw, Objective, Row


@dataclass(frozen=True)
class SecondPass(Objective):
    """See the module's docstring."""

    name: ClassVar[str] = "second-pass"
    not_with: ClassVar[tuple[tuple[str, str], ...]] = (
        ("recall", "the second reading asks for everything again"),
        ("adapt", "each lays rows out by itself"),
        ("carry_state", "of a document in several rows each row would be read twice, not the document"),
    )
    first: float = 0.0

    def __post_init__(self) -> None:
        self.require("first", 0, 1)

    def room(self, length: int) -> int:
        if length < 4:
            raise ConfigError(
                f"objective second-pass needs a context of 4 tokens, two for each reading, not {length}"
            )
        return length // 2

    def grown(self, tokens: np.ndarray, length: int) -> np.ndarray:
        return 2 * tokens

    def change(self, row: Row, length: int, draw: Draw) -> Row:
        again = replace(row, labels=row.labels.copy())
        again.labels[:1] = IGNORED
        return Row.joined([replace(row, weights=row.weights * np.float32(self.first)), again])

    def note(self, length: int) -> str:
        return f"second-pass: a row holds up to {self.room(length):,} tokens of a document, twice"
