"""Turns of a conversation as records hold them, and whether what they say of the loss is what they get.

A turn of the assistant carries loss, but in a prompt, with ``weight`` 0, and, where ``last`` asks for it, before the
last. Other fields by which other trainers tell it (:data:`FLAGS`) must say the same: they are compared, not obeyed.
"""

from collections.abc import Iterable
from typing import Any

from rwkv_rev.errors import DataError
from rwkv_rev.printable import is_utf8, shortened

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    "system": "system",
}
FLAGS = ("weight", "train", "training", "train_on_turn", "trainable", "loss", "loss_weight", "loss_mask")
Turns = tuple[dict[str, Any], ...]


def read_turns(value: Any, name: str, where: str) -> Turns:
    """The list of turns in a field, with ``role`` and ``content`` whatever they were called."""
    if not isinstance(value, list):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: field '{name}' is {found}, not a list of turns with 'role' and 'content'")
    if not value:
        raise DataError(f"{where}: field '{name}' is a list without turns")
    return tuple(
        read_turn(turn, f"{where}: turn {number} of '{name}'") for number, turn in enumerate(value, start=1)
    )


def read_turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn, without fields that are null. Raises DataError naming ``where``."""
    if not isinstance(turn, dict):
        raise DataError(f"{where} is a {type(turn).__name__}, not an object with 'role' and 'content'")
    who, what = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    for key in (who, what):
        if not isinstance(turn.get(key), str):
            kind = "null" if turn.get(key) is None else f"a {type(turn[key]).__name__}"
            raise DataError(
                f"{where} has no '{key}'; it has {listed(map(str, turn))}"
                if key not in turn
                else f"{where}: '{key}' is {kind}, not a string"
            )
    role, content = turn[who], turn[what]
    if who == "from" and role not in ROLES:
        raise DataError(f"{where}: 'from' is {shortened(repr(role))}; known are {', '.join(ROLES)}")
    if not is_utf8(content) or not is_utf8(role):
        raise DataError(f"{where} holds half a surrogate pair, no text")
    if not content.strip() and role != "system":
        raise DataError(f"{where}: its '{what}' is empty")
    for name in FLAGS:
        value = turn.get(name)
        if value is not None and (value not in (0, 1) or (name == "weight" and isinstance(value, bool))):
            raise DataError(
                f"{where}: its '{name}' is {shortened(repr(value))}; known are 0, no loss on this turn, and 1"
            )
    if turn.get("mask") is not None:
        raise DataError(
            f"{where} has a 'mask', which is loss in some tools and no loss in others; write 'weight', 0 or 1"
        )
    more = {key: value for key, value in turn.items() if key not in (who, what) and value is not None}
    return more | {"role": ROLES.get(role, role), "content": content}


def joined(before: Turns, turns: Turns, names: tuple[str, ...], where: str) -> tuple[Turns, int]:
    """A prompt's turns and those of its answer, which may hold the prompt again, whole; and how many are the prompt's.

    Raises:
        DataError: for an answer that holds a part of the prompt again, or in which somebody else goes on.
    """
    asked, answered = ([(turn["role"], turn["content"].strip()) for turn in some] for some in (before, turns))
    if answered[: len(asked)] == asked:
        return turns, len(before)
    again = any(answered[: len(asked) - i] == asked[i:] for i in range(1, len(asked)))
    if again or (asked[-1][0] == "user" and answered[0][0] != "assistant"):
        raise DataError(
            f"{where}: '{names[-1]}' begins with a turn of the {shortened(answered[0][0])} behind the turns of "
            f"'{names[0]}', and does not hold all of these; begin it with the assistant's answer, or with the whole "
            f"of '{names[0]}'"
        )
    return before + turns, len(before)


def refuse_silence(turns: Turns, train_on: str | None, where: str) -> None:
    """Raise DataError if none of these turns carries loss."""
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        unknown = dict.fromkeys(turn["role"] for turn in turns if turn["role"] not in ROLES.values())
        if unknown:
            names = ", ".join(shortened(repr(name)) for name in list(unknown)[:8])
            raise DataError(
                f"{where}: the role {names} is not known, and no turn is the assistant's, to train on: its role is "
                "written 'assistant', the other's 'user'"
            )
        raise DataError(f"{where}: no turn of the assistant to train on (--train-on all takes every turn)")
    if train_on == "last" and answers[-1].get("weight") == 0:
        raise DataError(f"{where}: --train-on last, and the assistant's last turn has the weight 0")
    if all(turn.get("weight") == 0 for turn in answers):
        raise DataError(f"{where}: no turn of the assistant to train on: each has the weight 0")


def refuse_contradictions(turns: Turns, silent: int, train_on: str | None, where: str) -> None:
    """Raise DataError for a turn of which a field says what its loss is not; the first ``silent`` are a prompt's."""
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    for at, turn in enumerate(turns):
        reasons = {
            f"loss is on turns of the assistant, and its role is {shortened(repr(turn['role']))}": turn[
                "role"
            ]
            != "assistant",
            "it is part of the prompt": at < silent,
            "its weight is 0": turn.get("weight") == 0,
            "--train-on last takes the last answer alone": train_on == "last" and at != last,
        }
        why = None if train_on == "all" else next((each for each, true in reasons.items() if true), None)
        for name in FLAGS:
            says = turn.get(name)
            if says is None or bool(says) == (why is None):
                continue
            what = f"{where}: turn {at + 1} ({shortened(repr(turn['content']), 40)}) has '{name}': {says!r}"
            if why is not None:
                raise DataError(f"{what} and gets no loss, since {why}; leave one of them out")
            how = "--train-on all takes every turn" if train_on == "all" else "only 'weight': 0 takes it away"
            raise DataError(f"{what} and gets loss: {how}")


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(shortened, sorted(set(names))[:12])) or "nothing"
