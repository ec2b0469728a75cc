"""``recall``: spans of the far past are asked for again behind a marker, at distances drawn up to the whole context.

Into a document x_1 ... x_n questions are put, each at a place p (before x_{p+1}):

    ... x_p  MARKER x_{a+1} ... x_{a+cue}  x_{a+cue+1} ... x_{a+span}  AFTER  x_{p+1} ...
             no loss                       w = weight                  no loss

    a = p - d,    d = floor(span * (p / span)^v),    v uniform in [0, 1)

so that as many distances d, in tokens of the document, lie between 100 and 200 as between 1,000 and 2,000, up to all
that has been read. Places are drawn one in each of as many equal parts of the document as there are questions. Of a
full row they take ``share`` at most; shorter documents get fewer, in proportion. The document's own tokens keep their
loss. What had no loss where it stood (a prompt) has none where it is asked for again.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rwkv_rev.errors import ConfigError
from rwkv_rev.training.objectives.objective import IGNORED, Draw, Objective, Row

MARKER = "\n\nRecall: "
AFTER = "\n\n"


@dataclass(frozen=True)
class Recall(Objective):
    """See the module's docstring.

    Attributes:
        marker, after: token ids of :data:`MARKER` and :data:`AFTER`, which depend on the tokenizer; no settings.
    """

    name: ClassVar[str] = "recall"
    span: int = 32
    cue: int = 8
    share: float = 0.125
    weight: float = 1.0
    marker: tuple[int, ...] = tuple(MARKER.encode())
    after: tuple[int, ...] = tuple(AFTER.encode())

    def __post_init__(self) -> None:
        self.require("span", 2)
        if self.cue >= self.span != type(self).span:
            raise ConfigError(
                f"objective recall: span = {self.span} leaves no room behind its cue of {self.cue} tokens: span must "
                f"be at least {self.cue + 1}, or set cue to less than {self.span}"
            )
        self.require("cue", 1, self.span - 1)
        self.require("share", 0.001, 0.5)
        self.require("weight", 0.001, 1000)

    def settings(self) -> dict[str, int | float]:
        return {"span": self.span, "cue": self.cue, "share": self.share, "weight": self.weight}

    @property
    def block(self) -> int:
        """Tokens that a question takes."""
        return len(self.marker) + self.span + len(self.after)

    def questions(self, length: int) -> int:
        """Of a full row of ``length`` tokens.

        Raises:
            ConfigError: where there is room for none.
        """
        count = int(self.share * length) // self.block
        if not count:
            least = -(-self.block / self.share // 1)
            raise ConfigError(
                f"objective recall: a question takes {self.block} tokens, more than share = {self.share:g} of a "
                f"context of {length:,}; give {least:,.0f} tokens of context, a larger share, or a shorter span"
            )
        return count

    def room(self, length: int) -> int:
        return length - self.questions(length) * self.block

    def _asked(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Questions in documents of so many tokens."""
        return tokens * self.questions(length) // self.room(length)

    def grown(self, tokens: np.ndarray, length: int) -> np.ndarray:
        return tokens + self.block * self._asked(tokens, length)

    def change(self, row: Row, length: int, draw: Draw) -> Row:
        n = len(row.ids)
        count = int(self._asked(np.array(n), length))
        where, far = draw(2 * count).reshape(2, count)
        # of a row at least half is the document: its first part has room for a span
        places = np.maximum(self.span, (n * (np.arange(count) + where) / max(1, count)).astype(np.int64))
        parts, last = [], 0
        for place, share in zip(places.tolist(), far.tolist(), strict=True):
            distance = int(self.span * (place / self.span) ** share)
            parts += [_part(row, last, place), self._question(row, place - distance)]
            last = place
        return Row.joined([*parts, _part(row, last, n)])

    def _question(self, row: Row, begin: int) -> Row:
        span = _part(row, begin, begin + self.span)
        labels = span.labels.copy()
        labels[: self.cue] = IGNORED
        asked = Row(span.ids, labels, span.weights * np.float32(self.weight))
        return Row.joined([_silent(self.marker), asked, _silent(self.after)])

    def note(self, length: int) -> str:
        count = self.questions(length)
        return (
            f"recall: a full row holds {self.room(length):,} tokens of text and {count:,} "
            f"{'question' if count == 1 else 'questions'} of {self.block} tokens"
        )


def _part(row: Row, start: int, stop: int) -> Row:
    return Row(row.ids[start:stop], row.labels[start:stop], row.weights[start:stop], row.start)


def _silent(ids: tuple[int, ...]) -> Row:
    """Tokens that nobody is asked to predict."""
    tokens = np.array(ids, np.int64)
    return Row.of(tokens, np.full_like(tokens, IGNORED))
