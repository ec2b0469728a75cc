"""What a record of a data file is to be trained as, by the names of its fields.

| format | fields | with loss |
|---|---|---|
| ``text`` | ``text`` | everything |
| ``completion`` | ``prompt``, ``completion`` | the completion |
| ``messages`` | ``messages`` or ``conversations``: turns, ``role``/``content`` or ``from``/``value`` | the assistant |
| ``instruction`` | ``instruction``, ``input`` (may be missing or empty), ``output`` | the output |
| ``chosen`` | of a preference pair: ``prompt``, ``chosen``; only where it is asked for | the chosen answer |

Of ``completion`` and ``chosen`` both fields may be lists of turns, too. What is a list of turns becomes text by the
tokenizer's chat template, where it is tokenised (:mod:`rwkv_rev.training.conversations`); so do instructions. A field
``system`` beside them is their first turn, ``history`` of instructions the turns before; a turn of ``weight`` 0 carries
no loss. Other fields are not read. Pairs train a model by trl's ``DPOTrainer``, which is why they are not taken without
a word.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.printable import is_utf8, shortened
from rwkv_rev.training.turns import (
    Turns,
    joined,
    listed,
    read_turn,
    read_turns,
    refuse_contradictions,
    refuse_silence,
)

FORMATS = ("auto", "text", "completion", "messages", "instruction", "chosen")
TRAIN_ON = ("assistant", "all", "last")
_LISTS = ("messages", "conversations")
_SYSTEM = ("system", "system_prompt")
_BESIDE = (*_SYSTEM, "history")
_NAMED = (
    "--text-field NAME, or --prompt-field NAME and --completion-field NAME, or --messages-field NAME, or "
    f"--data-format {'|'.join(FORMATS[1:])}"
)
_UNREAD = {  # what would be learned otherwise, by name: values that change nothing, and what to do about others
    **dict.fromkeys(
        ("weight", "loss_weight", "sample_weight", "train"),
        ((None, "", 1, "1", "1.0", "true", "True"), "leave the record out, or the field"),
    ),
    **dict.fromkeys(
        ("tools", "functions", "image", "images", "mask"),
        ((None, "", [], {}, "[]", "{}", "null"), "write it into a turn as text, or leave the field out"),
    ),
}


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long one.

    ``text`` carries the loss, ``prompt`` (None: no prompt) does not. ``turns``: instead of both a conversation, of
    which the first ``silent`` turns carry no loss. ``train_on``: one of :data:`TRAIN_ON` where it was asked for.
    ``line`` counts lines (or rows) from 1. ``continues``: this piece goes on with the document of the piece before it.
    ``many_lines``: the text is raw lines of the file, so that line ``i`` of the text is line ``line + i`` of the file.
    """

    text: str
    prompt: str | None
    source: str
    line: int
    unit: str = "line"
    continues: bool = False
    many_lines: bool = False
    turns: Turns = ()
    silent: int = 0
    train_on: str | None = None

    @property
    def where(self) -> str:
        return place(self.source, self.line, self.unit)

    @property
    def size(self) -> int:
        """Characters, about."""
        return len(self.text) + len(self.prompt or "") + sum(len(turn["content"]) for turn in self.turns) + 64

    @property
    def answers(self) -> bool:
        """Whether somebody asks and somebody answers, who has to learn where to end."""
        return bool(self.turns) or self.prompt is not None or self.train_on in ("assistant", "last")


def place(source: str, line: int, unit: str = "line") -> str:
    """``source:line`` as compilers write it, or ``source: row N`` for tables."""
    return f"{source}:{line}" if unit == "line" else f"{source}: {unit} {line}"


@dataclass(frozen=True)
class RowLayout:
    """Which fields of a record are read, as one of :data:`FORMATS`; ``beside``: those that say what was before."""

    format: str
    columns: tuple[str, ...]
    train_on: str | None
    beside: tuple[str, ...] = ()

    def piece(self, row: dict[str, Any], source: str, line: int, unit: str) -> Piece:
        """The document that a record holds. Raises DataError naming its place."""
        where = place(source, line, unit)
        values = {name: row.get(name) for name in self.columns}
        prompt: str | None = None
        turns: Turns = ()
        text, silent = "", 0
        self._refuse_unread(row, where)
        if self.format == "messages":
            given = [name for name in self.columns if values[name]] or [*self.columns[:1]]
            turns, *others = (read_turns(values[name], name, where) for name in given)
            if any(other != turns for other in others):
                raise DataError(
                    f"{where}: has both {_quoted(self.columns)}, which differ; name what is to be read: "
                    "--messages-field NAME"
                )
        elif self.format == "instruction":
            asked, answer = (_text(values, name, where) for name in (self.columns[0], self.columns[-1]))
            more = "" if row.get("input") is None else _text(row, "input", where)
            asked = f"{asked}\n\n{more}" if more.strip() else asked
            said = (("user", asked), ("assistant", answer))
            for name, (_, content) in zip((self.columns[0], self.columns[-1]), said, strict=True):
                if not content.strip():
                    raise DataError(f"{where}: field '{name}' is empty")
            turns = (
                *self._history(row, where),
                *({"role": role, "content": content} for role, content in said),
            )
        elif isinstance(values[self.columns[-1]], list):
            turns, silent = self._answer(values, where)
        else:
            text = _text(values, self.columns[-1], where)
            prompt = _text(values, self.columns[0], where) if len(self.columns) == 2 else None
            if self.format == "chosen" and prompt is None:
                raise DataError(
                    f"{where}: field 'chosen' is a text, and there is no 'prompt' before it: write what stands before "
                    "the answer into 'prompt' (of Anthropic's form all up to the last 'Assistant:'), or 'chosen' as a "
                    "list of turns with 'role' and 'content'; --text-field chosen trains on the whole text"
                )
            if prompt is not None and not text.strip():
                raise DataError(f"{where}: field '{self.columns[-1]}' is empty")
        if self.format != "instruction" and "history" in self.beside and row.get("history"):
            raise DataError(
                f"{where}: field 'history' is read beside 'instruction' and 'output' alone; write its turns into "
                "'messages', or leave it out"
            )
        before = self._system(row, turns, where)
        turns, silent = before + turns, silent + len(before)
        if turns and self.train_on != "all":
            refuse_silence(turns[silent:], self.train_on, where)
        refuse_contradictions(turns, silent, self.train_on, where)
        return Piece(text, prompt, source, line, unit, turns=turns, silent=silent, train_on=self.train_on)

    def _refuse_unread(self, row: dict[str, Any], where: str) -> None:
        """Raise DataError for a field that would change what is learned, and is not read."""
        for name, (without_effect, instead) in _UNREAD.items():
            if name in self.beside and (value := row.get(name)) not in without_effect:
                raise DataError(
                    f"{where}: field '{name}' is {shortened(repr(value), 40)}, which is not read; {instead}"
                )

    def _answer(self, values: dict[str, Any], where: str) -> tuple[Turns, int]:
        """An answer's turns behind those of its prompt, and how many these are."""
        turns = read_turns(values[self.columns[-1]], self.columns[-1], where)
        if len(self.columns) == 1:
            return turns, 0
        name = self.columns[0]
        if isinstance(values[name], list):
            return joined(read_turns(values[name], name, where), turns, self.columns, where)
        begins = turns[0]["role"] == "assistant"
        asked = "" if values[name] is None and not begins else _text(values, name, where)
        if begins:
            if not asked.strip():
                raise DataError(f"{where}: field '{name}' is empty")
            return ({"role": "user", "content": asked}, *turns), 1
        first = next((turn for turn in turns if turn["role"] != "system"), turns[0])
        if asked.strip() not in ("", first["content"].strip()):
            raise DataError(
                f"{where}: field '{name}' is a text beside a conversation that begins otherwise, '{self.columns[-1]}'; "
                "write it into its turns, or leave it out"
            )
        return turns, 0

    def _history(self, row: dict[str, Any], where: str) -> Turns:
        """The turns before an instruction: pairs of what the user said and the answer."""
        value = row.get("history") if "history" in self.beside else None
        if not value and (value is None or isinstance(value, list | str)):
            return ()  # a table's empty field is an empty text
        pairs = value if isinstance(value, list) else [value]
        if not all(isinstance(pair, list | tuple) and [*map(type, pair)] == [str, str] for pair in pairs):
            raise DataError(f"{where}: field 'history' is no list of pairs of texts, [user, assistant]")
        return tuple(
            read_turn({"role": role, "content": said}, f"{where}: pair {number} of 'history'")
            for number, pair in enumerate(pairs, start=1)
            for role, said in zip(("user", "assistant"), pair, strict=True)
        )

    def _system(self, row: dict[str, Any], turns: Turns, where: str) -> Turns:
        """The turn that a field ``system`` is, if it says anything that the turns do not."""
        given = [
            n for n in _SYSTEM if n in self.beside and row.get(n) is not None and _text(row, n, where).strip()
        ]
        if not given:
            return ()
        name, said = given[0], row[given[0]]
        if not turns:
            raise DataError(
                f"{where}: field '{name}' beside texts that are read as they are; write it into "
                f"'{self.columns[0]}', or give a list of turns, 'messages'"
            )
        there = [turn["content"].strip() for turn in turns if turn["role"] == "system"]
        if any(other != said.strip() for other in [*there, row[given[-1]].strip()]) or len(there) > 1:
            raise DataError(
                f"{where}: a field '{name}', and another turn of the role system; leave one of them out"
            )
        return () if there else ({"role": "system", "content": said},)


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold what is trained on, and what of it.

    ``format`` one of :data:`FORMATS`; with ``auto`` and without names the fields that are there tell it, and a record
    that could be read in two ways is refused as ambiguous. ``train_on`` one of :data:`TRAIN_ON`; None: the assistant's
    turns and completions, and all of a text.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    format: str = "auto"
    train_on: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise DataError("a prompt field needs a completion field and the other way round; name both")
        named = [name for name in (self.text, self.prompt, self.messages) if name is not None]
        if len(named) > 1:
            raise DataError(
                "name either a text field, a field of messages, or a prompt and a completion field, not both"
            )
        if self.format not in FORMATS or self.train_on not in (None, *TRAIN_ON):
            raise DataError(
                f"a data format is one of {', '.join(FORMATS)}; train_on of {', '.join(TRAIN_ON)}"
            )
        if self.format not in ("auto", self._named()) and named:
            raise DataError(
                f"a field {shortened(repr(named[0]))} was named, which data of the format {self.format} does not have"
            )

    def _named(self) -> str:
        """The format that named fields are of."""
        if self.text is not None:
            return "text"
        return "completion" if self.prompt is not None else "auto" if self.messages is None else "messages"

    def refuse_unused(self, kinds: Iterable[str]) -> None:
        """Raise DataError for the name of a field, or a format, where nothing has fields."""
        kinds = set(kinds)
        named = [name for name in (self.text, self.prompt, self.messages) if name is not None]
        if named and kinds <= {"text", "binidx"}:
            raise DataError(
                f"a field {shortened(repr(named[0]))} was named, but none of the data has fields; leave it out"
            )
        if self.format != "auto" and kinds <= {"text", "binidx"}:
            raise DataError(
                f"the format {self.format} is one of records, and the data has none; leave it out"
            )
        if self.train_on in ("assistant", "last") and kinds == {"binidx"}:
            raise DataError(
                f"--train-on {self.train_on}: of the token ids of a .bin/.idx pair nobody can tell who speaks; "
                "give the conversations as .jsonl"
            )

    def choose(self, names: Iterable[str], where: str) -> RowLayout:
        """What to read among fields called ``names``; DataError naming ``where`` if that is nothing, or not clear."""
        present = set(names)
        found = self._found(present)
        wanted = self._named() if self.format == "auto" else self.format
        if wanted != "auto":
            if wanted in found:
                return self._layout(wanted, found[wanted], present)
            raise DataError(
                f"{where}: no field {self._wanted(wanted)}; found: {listed(present)}; name yours: {_NAMED}"
            )
        if len(found) > 1:
            first, second = (_quoted(columns) for columns in list(found.values())[:2])
            raise DataError(f"{where}: has both {first} and {second}; name what is to be read: {_NAMED}")
        if "chosen" in found:
            raise DataError(
                f"{where}: a preference pair, 'chosen' and 'rejected', which trl's DPOTrainer trains on "
                "(docs/data.md#preference-pairs); to train on the chosen answer alone: --data-format chosen"
            )
        for format, columns in found.items():
            return self._layout(format, columns, present)
        raise DataError(
            f"{where}: no field 'text' (or 'prompt' and 'completion', 'messages', 'conversations', 'instruction' and "
            f"'output'); found: {listed(present)}; name yours: {_NAMED}"
        )

    def _layout(self, format: str, columns: tuple[str, ...], present: set[str]) -> RowLayout:
        read = (
            ()
            if format == "text"
            else tuple(n for n in (*_BESIDE, *_UNREAD) if n in present and n not in columns)
        )
        return RowLayout(format, columns, self.train_on, read)

    def _found(self, present: set[str]) -> dict[str, tuple[str, ...]]:
        """Of each format that the fields allow, those that it reads."""
        pair = (self.prompt or "prompt", self.completion or "completion")
        lists = [name for name in ((self.messages,) if self.messages else _LISTS) if name in present]
        found: dict[str, tuple[str, ...]] = {}
        if (text := self.text or "text") in present:
            found["text"] = (text,)
        if present.issuperset(pair):
            found["completion"] = pair
        if lists:
            found["messages"] = tuple(lists)
        if {"instruction", "output"} <= present:
            found["instruction"] = ("instruction", *(["input"] if "input" in present else []), "output")
        if "chosen" in present and ("rejected" in present or self.format == "chosen"):
            found["chosen"] = ("prompt", "chosen") if "prompt" in present else ("chosen",)
        return found

    def _wanted(self, format: str) -> str:
        return {
            "text": f"'{self.text or 'text'}'",
            "completion": f"'{self.prompt or 'prompt'}' and '{self.completion or 'completion'}'",
            "messages": f"'{self.messages}'" if self.messages else "'messages' or 'conversations'",
            "instruction": "'instruction' and 'output'",
            "chosen": "'chosen'",
        }[format]


def _quoted(columns: tuple[str, ...]) -> str:
    return "/".join(f"'{name}'" for name in columns)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: field '{name}' is {found}, not a string")
    if not is_utf8(value):
        raise DataError(f"{where}: field '{name}' holds half a surrogate pair, no text")
    return value


def refuse_half_named(
    text: str | None, prompt: str | None, completion: str | None, messages: str | None = None
) -> None:
    """Raise ConfigError for names of fields that do not go together."""
    if (prompt is None) != (completion is None):
        raise ConfigError("--prompt-field and --completion-field go together; name both")
    if text is not None and prompt is not None:
        raise ConfigError("--text-field and --prompt-field exclude each other; name one of them")
    if messages is not None and (text or prompt) is not None:
        other = "--prompt-field" if text is None else "--text-field"
        raise ConfigError(f"{other} and --messages-field exclude each other; name one of them")
