"""What ``docs/data.md`` shows: each format of data with the exact tokens, and which of them carry loss."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from rwkv_rev.tokenization import RwkvByteTokenizer
from rwkv_rev.training.records import Fields
from rwkv_rev.training.token_cache import load_tokens

TURNS = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.\n\nCount!"},
]


@dataclass
class Example:
    """A record, how it is read, and the heading above it."""

    name: str
    record: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


EXAMPLES = (
    Example("A text", {"text": "What is 2+2? 4."}),
    Example("Prompt and completion", {"prompt": "2+2=", "completion": "4"}),
    Example("Messages", {"messages": TURNS}),
    Example("Messages, `--train-on last`", {"messages": TURNS}, {"train_on": "last"}),
    Example("Messages, `--train-on all`", {"messages": TURNS[:2]}, {"train_on": "all"}),
    Example(
        "Conversations",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "What is 2+2?"},
                {"from": "gpt", "value": "4."},
            ]
        },
    ),
    Example("Instructions", {"instruction": "Add.", "input": "2, 2", "output": "4"}),
    Example(
        "Instructions with `system` and `history`",
        {
            "system": "Be brief.",
            "history": [["What is 2+2?", "4."]],
            "instruction": "Sure?",
            "output": "Yes.",
        },
    ),
    Example("Messages with a `weight`", {"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]}),
    Example("Prompt and completion as turns", {"prompt": TURNS[:3], "completion": TURNS[3:]}),
    Example(
        "RWKV's own text, `--train-on assistant`",
        {"text": "User: What is 2+2?\n\nAssistant: Let me count.\n\n4.\n\nUser: Sure?\n\nAssistant: Yes."},
        {"train_on": "assistant"},
    ),
    Example(
        "Preference pairs, `--data-format chosen`",
        {"prompt": TURNS[:1], "chosen": [{"role": "assistant", "content": "4."}], "rejected": [TURNS[3]]},
        {"format": "chosen"},
    ),
)


def tokens_of(example: Example, tokenizer: Any, folder: Path) -> list[tuple[str, bool]]:
    """(token as text, whether it carries loss) of an example's document, read from a file."""
    path = folder / "example.jsonl"
    path.write_text(json.dumps(example.record) + "\n", "utf-8")
    store = load_tokens(
        path, tokenizer, fields=Fields(**example.options), cache_dir=folder / "cache", num_workers=1
    )
    ids = store.tokens(0).tolist()
    return [
        ("end" if token == 0 else repr(tokenizer.decode([token]))[1:-1], bool(loss))
        for token, loss in zip(ids, store.loss(0), strict=True)
    ]


def by_byte(example: Example, folder: Path) -> list[tuple[str, bool]]:
    return tokens_of(example, RwkvByteTokenizer(), folder)


def in_bytes(parts: list[str]) -> list[tuple[str, bool]]:
    """Byte by byte what parts become, every second of which carries loss."""
    return [
        ("end" if letter == "|" else repr(letter)[1:-1], bool(number % 2))
        for number, part in enumerate(parts)
        for letter in part
    ]


def weighed(*weights: Any) -> dict[str, Any]:
    """A conversation with a weight in each turn; None: without one."""
    return {
        "messages": [
            turn if weight is None else turn | {"weight": weight}
            for turn, weight in zip(TURNS, weights, strict=True)
        ]
    }


def shown(tokens: list[tuple[str, bool]]) -> str:
    """Tokens side by side, a line for each run with or without loss."""
    lines: list[str] = []
    before: bool | None = None
    for text, loss in tokens:
        if loss != before:
            lines.append("loss |" if loss else "     |")
        lines[-1] += f"{text}|"
        before = loss
    return "\n".join(lines)


def folded(record: dict[str, Any]) -> str:
    """A record as JSON, which is one line in a file."""
    return "\n".join(wrap(json.dumps(record), 110, break_long_words=False, break_on_hyphens=False))


def page_of(tokenizer: Any, folder: Path) -> str:
    """The examples in Markdown."""
    return "\n".join(
        f"### {example.name}\n\n```\n{folded(example.record)}\n```\n\nbecomes\n\n```\n"
        f"{shown(tokens_of(example, tokenizer, folder))}\n```\n"
        for example in EXAMPLES
    )
