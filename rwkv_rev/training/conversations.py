r"""Documents as parts of text with and without loss, each of which is tokenised by itself.

A conversation becomes text by the tokenizer's chat template. With ``train_on`` None or ``assistant`` every turn of the
assistant carries loss, with ``last`` the last one, with ``all`` all that there is; a turn of ``weight`` 0 carries none.
A turn is what stands between the template's ``{% generation %}`` marks: after ``Assistant:``, up to what ends the turn.

A text of RWKV's own form, ``User: ...\n\nAssistant: ...``, is read the same way where ``train_on`` asks for it: a turn
begins where ``User:``, ``Assistant:`` or ``System:`` does, at the beginning or after an empty line, and goes on over
further empty lines. The text stays as it is, but for line ends: ``\r\n`` and ``\r`` become ``\n``.
"""

import re
from typing import Any

from rwkv_rev.errors import DataError
from rwkv_rev.printable import shortened
from rwkv_rev.tokenization.chat_template import parts, refuse_misplaced_marks, render
from rwkv_rev.training.records import Piece

Parts = list[tuple[str, bool]]
_SPEAKER = re.compile(r"(?:\A\s*|(?<=\n\n))(User|Assistant|System):")
_ALMOST = re.compile(r"^[^\S\n]*(?:(?i:user|human|assistant)|System)[^\S\n]*[:\uff1a]", re.MULTILINE)
_BLANKS = re.compile(r"\n[^\S\n]+\n(User|Assistant|System):")


def parts_of(tokenizer: Any, piece: Piece) -> Parts:
    """(text, whether it carries loss) of a document, in order.

    Raises:
        DataError: for what the template refuses, and where nobody can tell who speaks; without the place.
    """
    if piece.turns:
        return _spoken(tokenizer, piece)
    if piece.prompt is not None:
        return [(piece.prompt, piece.train_on == "all"), (piece.text, True)]
    if piece.train_on in ("assistant", "last"):
        text = piece.text.replace("\r\n", "\n").replace("\r", "\n")
        return parts(text, _kept(_turns_of_text(piece, text), 0, piece.train_on))
    return [(piece.text, True)]


def _spoken(tokenizer: Any, piece: Piece) -> Parts:
    text, spans = render(tokenizer, piece.turns)
    if piece.train_on == "all":
        return [(part, True) for part, _ in parts(text, spans)]
    weights = [turn.get("weight") for turn in piece.turns if turn["role"] == "assistant"]
    if len(spans) != len(weights):
        raise DataError(
            f"the chat template marks {len(spans)} of the assistant's {len(weights)} turns by {{% generation %}}, and "
            "the loss is to be on them: put the marks into a copy of it (--chat-template FILE), or --train-on all"
        )
    refuse_misplaced_marks(tokenizer, [turn["role"] for turn in piece.turns])
    silent = sum(turn["role"] == "assistant" for turn in piece.turns[: piece.silent])
    unheard = [span for span, weight in zip(spans, weights, strict=True) if weight == 0]
    kept = {tuple(span) for span in _kept(spans, silent, piece.train_on) if span not in unheard}
    at, found = 0, []
    for part, spoken in parts(text, spans):
        found.append((part, spoken and (at, at + len(part)) in kept))
        at += len(part)
    return found


def _kept(spans: list[list[int]], silent: int, train_on: str | None) -> list[list[int]]:
    """Those with loss."""
    return spans[-1:] if train_on == "last" else spans[silent:]


def _turns_of_text(piece: Piece, text: str) -> list[list[int]]:
    r"""What the assistant says in a text of RWKV's form, whose lines end in ``\n``: [begin, end) in characters."""
    if piece.continues:
        raise DataError(
            f"--train-on {piece.train_on}, and this text is too long to be one conversation: it is read in pieces; "
            "give conversations as .jsonl, each as the 'text' of a line of its own"
        )
    found = list(_SPEAKER.finditer(text))
    if not found or found[0].start() > 0:
        raise DataError(
            f"--train-on {piece.train_on}, and this text is no conversation: it begins with "
            f"{shortened(repr(piece.text[:30]))}, not with User:, System: or Assistant: "
            "(leave --train-on out for texts)"
        )
    if blanks := _BLANKS.search(text):
        raise DataError(
            f"--train-on {piece.train_on}, and before '{blanks[1]}:' in line {_line(text, blanks.start(1))} of this "
            "text stands a line of blanks, which does not end a turn; make it an empty line"
        )
    begun = {match.end() for match in found}
    if almost := next((match for match in _ALMOST.finditer(text) if match.end() not in begun), None):
        raise DataError(
            f"--train-on {piece.train_on}, and in line {_line(text, almost.start())} of this text "
            f"{shortened(repr(almost[0]))} is no turn of its own: those begin with User:, System: or Assistant: behind "
            "an empty line; write it so, or, where it is part of a turn, give the conversation as 'messages'"
        )
    ends = [*(match.start() for match in found[1:]), len(text)]
    for number, (match, end) in enumerate(zip(found, ends, strict=True), start=1):
        if not text[match.end() : end].strip():
            raise DataError(
                f"--train-on {piece.train_on}, and turn {number} of this text, '{match[1]}:' in its line "
                f"{_line(text, match.start(1))}, is empty; write what is said, or leave the turn out"
            )
    spans = [[m.end(), end] for m, end in zip(found, ends, strict=True) if m[1] == "Assistant"]
    if not spans:
        raise DataError(f"--train-on {piece.train_on}, and the assistant says nothing in this text")
    return spans


def _line(text: str, at: int) -> int:
    """The line of a character, from 1."""
    return text.count("\n", 0, at) + 1
