"""Who speaks in RWKV's own text, what ends a turn, and which turns carry loss."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_page import TURNS, Example, by_byte, in_bytes, weighed

from rwkv_rev.errors import DataError
from rwkv_rev.tokenization import RwkvByteTokenizer
from rwkv_rev.training.records import Fields
from rwkv_rev.training.token_cache import load_tokens

ASKED = "User: What is 2+2?\n\nAssistant:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Once upon a time", "is no conversation: it begins with 'Once upon"),
        ("User: hi", "the assistant says nothing"),
        (
            "User: hi\n\nAssistant:\n\nUser: x\n\nAssistant: u",
            "turn 2 of this text, 'Assistant:' in its line 3, is",
        ),
        (
            "User: hi\n\nAssistant: a\n\nUser: x\n\nAssistant:",
            "turn 4 of this text, 'Assistant:' in its line 7, is",
        ),
        ("User: hi\n\nAssistant: a\n\nUser: x\n\nAssistant: \n\n", "turn 4 of this text, .*, is empty"),
        ("User:\n\nAssistant: a", "turn 1 of this text, 'User:' in its line 1, is empty"),
        (
            "User: a\n\nAssistant: b\n \nUser: c",
            "before 'User:' in line 5 of this text stands a line of blanks",
        ),
        ("User: a\n\nAssistant: b\0", r"the text holds '\\x00'"),
        *(
            (
                f"User: a\n\nAssistant: b{turn} c\n\nAssistant: d",
                f"line {4 + turn.count(chr(10)) - 1} .*{name}.*is no turn",
            )
            for turn, name in (
                ("\n\n User:", "' User:'"),
                ("\n\nuser:", "'user:'"),
                ("\n\nHuman:", "'Human:'"),
                ("\n\nUser :", "'User :'"),
                ("\n\nUser：", "'User：'"),
                ("\nUser:", "'User:'"),
                ("\nASSISTANT:", "'ASSISTANT:'"),
            )
        ),
    ],
)
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_a_text_of_which_nobody_knows_who_speaks(
    text: str, message: str, train_on: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    records = ({"text": "User: a\n\nAssistant: b"}, {"text": text})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: (train_on {train_on}.*)?{message}"):
        load_tokens(path, RwkvByteTokenizer(), fields=Fields(train_on=train_on), cache_dir=tmp_path / "c")


@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_line_ends_of_other_systems_end_turns(line_end: str, train_on: str, tmp_path: Path) -> None:
    """RWKV's own text, whole or in part, and turns; plain texts stay byte for byte."""
    lines = "User: a\n\nAssistant: b\n\nc\n\nUser: d\n\nAssistant: e\n"
    options = {"train_on": train_on}
    expected = by_byte(Example("", {"text": lines}, options), tmp_path)
    half = len(lines) // 2
    for text in (lines.replace("\n", line_end), lines[:half] + lines[half:].replace("\n", line_end)):
        assert by_byte(Example("", {"text": text}, options), tmp_path) == expected
    path = tmp_path / "chat.txt"
    path.write_bytes(lines.replace("\n", line_end).encode())
    store = load_tokens(path, RwkvByteTokenizer(), fields=Fields(**options), cache_dir=tmp_path / "cache")
    assert bytes(store.tokens(0).tolist()).decode() == lines + "\0"
    assert store.loss(0).tolist() == [loss for _, loss in expected]
    plain = load_tokens(path, RwkvByteTokenizer(), cache_dir=tmp_path / "cache")
    assert bytes(plain.tokens(0).tolist()) == path.read_bytes()
    said = [turn | {"content": turn["content"].replace("\n", line_end)} for turn in TURNS]
    spoken, wanted = (by_byte(Example("", {"messages": m}, options), tmp_path) for m in (said, TURNS))
    assert spoken == wanted


def test_a_text_in_pieces_is_no_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn may go over from one piece into the next, so nobody can tell who speaks there."""
    monkeypatch.setattr("rwkv_rev.training.documents.PIECE_BYTES", 64)
    (tmp_path / "a.txt").write_text("User: hello\n\nAssistant: hello, you\n\n" * 4)
    with pytest.raises(DataError, match=r"a\.txt:7: train_on assistant, and this text is too long .*jsonl"):
        load_tokens(
            tmp_path / "a.txt",
            RwkvByteTokenizer(),
            fields=Fields(train_on="assistant"),
            cache_dir=tmp_path / "cache",
            num_workers=1,
        )


@pytest.mark.parametrize(
    ("weights", "train_on", "expected"),
    [
        ((None, 0, None, 1), None, [f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"]),
        ((0.0, 1.0, 0.0, 0.0), None, [ASKED, " 4.\n\n", "User: Sure?\n\nAssistant: Yes.\nCount!\n\n|"]),
        ((0, 0, 0, 1), "last", [f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"]),
        ((1, 1, 1, 1), "all", ["", f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant: Yes.\nCount!\n\n|"]),
    ],
)
def test_a_turn_of_weight_0_carries_no_loss(
    weights: Any, train_on: str | None, expected: list[str], tmp_path: Path
) -> None:
    """Nor does the end of text behind it."""
    found = by_byte(Example("", weighed(*weights), {"train_on": train_on}), tmp_path)
    assert found == in_bytes(expected)


@pytest.mark.parametrize(
    ("weights", "train_on", "message"),
    [
        ((None, 1, None, 0), "last", "train_on last, and the assistant's last turn has the weight 0"),
        ((None, 0, None, 1), "all", "turn 2 .*has 'weight': 0 and gets loss: train_on all takes every"),
        (
            (None, 1, None, 1),
            "last",
            "turn 2 .*'weight': 1 and gets no loss, since train_on last takes the last",
        ),
    ],
)
def test_weights_that_contradict_are_refused(
    weights: Any, train_on: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"example\.jsonl:1: .*{message}|example\.jsonl:1: {message}"):
        by_byte(Example("", weighed(*weights), {"train_on": train_on}), tmp_path)
