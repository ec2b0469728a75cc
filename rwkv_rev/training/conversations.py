r"""Documents as parts of text with and without loss, each of which is tokenised by itself.

A conversation becomes text by the tokenizer's chat template. With ``train_on`` None or ``assistant`` every turn of the
assistant carries loss, with ``last`` the last one, with ``all`` all that there is. A turn is what stands between the
template's ``{% generation %}`` marks: after ``Assistant:``, up to what ends the turn.

A text of RWKV's own form, ``User: ...\n\nAssistant: ...``, is read the same way where ``train_on`` asks for it: a turn
begins where ``User:``, ``Assistant:`` or ``System:`` does, at the beginning or after an empty line, and goes on over
further empty lines. The text stays as it is.
"""

import re
from typing import Any

from rwkv_rev.errors import DataError
from rwkv_rev.printable import shortened
from rwkv_rev.tokenization.chat_template import parts, render
from rwkv_rev.training.records import Piece

Parts = list[tuple[str, bool]]
_SPEAKER = re.compile(r"(?:\A\s*|(?<=\n\n))(User|Assistant|System):")


def parts_of(tokenizer: Any, piece: Piece) -> Parts:
    """(text, whether it carries loss) of a document, in order.

    Raises:
        DataError: for what the template refuses, and where nobody can tell who speaks; without the place.
    """
    if piece.turns:
        return _spoken(tokenizer, piece)
    if piece.prompt is not None:
        if not piece.text:
            return []  # nothing to learn from: counts as empty
        return [(piece.prompt, piece.train_on == "all"), (piece.text, True)]
    if piece.train_on in ("assistant", "last"):
        return parts(piece.text, _kept(_turns_of_text(piece), 0, piece.train_on))
    return [(piece.text, True)]


def _spoken(tokenizer: Any, piece: Piece) -> Parts:
    text, spans = render(tokenizer, piece.turns)
    if piece.train_on == "all":
        return [(part, True) for part, _ in parts(text, spans)]
    turns = sum(turn["role"] == "assistant" for turn in piece.turns)
    if len(spans) != turns:
        raise DataError(
            f"the chat template marks {len(spans)} of the assistant's {turns} turns by {{% generation %}}, and the "
            "loss is to be on them: put the marks into a copy of it (--chat-template FILE), or --train-on all"
        )
    silent = sum(turn["role"] == "assistant" for turn in piece.turns[: piece.silent])
    kept = {tuple(span) for span in _kept(spans, silent, piece.train_on)}
    at, found = 0, []
    for part, spoken in parts(text, spans):
        found.append((part, spoken and (at, at + len(part)) in kept))
        at += len(part)
    return found


def _kept(spans: list[list[int]], silent: int, train_on: str | None) -> list[list[int]]:
    """Those with loss."""
    return spans[-1:] if train_on == "last" else spans[silent:]


def _turns_of_text(piece: Piece) -> list[list[int]]:
    """What the assistant says in a text of RWKV's form: [begin, end) in characters."""
    found = list(_SPEAKER.finditer(piece.text))
    if not found or found[0].start() > 0 or piece.continues:
        raise DataError(
            f"--train-on {piece.train_on}, and this text is no conversation: it begins with "
            f"{shortened(repr(piece.text[:30]))}, not with User:, System: or Assistant: "
            "(leave --train-on out for texts)"
        )
    ends = [*(match.start() for match in found[1:]), len(piece.text)]
    spans = [
        [m.end(), end] for m, end in zip(found, ends, strict=True) if m[1] == "Assistant" and m.end() < end
    ]
    if not spans:
        raise DataError(f"--train-on {piece.train_on}, and the assistant says nothing in this text")
    return spans
