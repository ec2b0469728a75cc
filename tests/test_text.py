"""The text of a verification and how it becomes tokens."""

from pathlib import Path

import pytest

from rwkv_rev.equivalence import text
from rwkv_rev.errors import CheckpointError, DataError


def test_default_text_is_long_english_and_always_the_same() -> None:
    words = text.default_text()
    assert len(words) > 300_000
    assert words == text.default_text()
    assert words.count(" the ") > 1000


def test_bytes_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    ids = text.encode_text("Grüße", tmp_path, vocabulary=256, tokens=4)
    assert ids.tolist() == list("Grüße".encode()[:4])


def test_short_text_gives_what_it_has(tmp_path: Path) -> None:
    assert len(text.encode_text("abc", tmp_path, vocabulary=256, tokens=9)) == 3


def test_whole_text_is_read_when_tokens_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_encode", lambda words, *_: list(range(len(words) // 40)))
    assert len(text.encode_text("x" * 400, tmp_path, vocabulary=256, tokens=8)) == 8


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer for its 65536 tokens.*with tokenizer"):
        text.encode_text("abc", tmp_path, vocabulary=65536, tokens=4)


def test_empty_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        text.encode_text("", tmp_path, vocabulary=256, tokens=4)


def test_tokenizer_of_another_vocabulary_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_encode", lambda *_: [1, 300])
    with pytest.raises(DataError, match="gives id 300, the model knows ids below 256"):
        text.encode_text("ab", tmp_path, vocabulary=256, tokens=4)


def test_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged: no valid JSON") as caught:
        text.encode_text("ab", tmp_path, vocabulary=256, tokens=4)
    assert "\n" not in str(caught.value)


def test_read_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Grüße", encoding="utf-8")
    assert text.read_text(tmp_path / "a.txt") == "Grüße"
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 2\)"):
        text.read_text(tmp_path / "b.txt")
    with pytest.raises(DataError, match="No such file"):
        text.read_text(tmp_path / "c.txt")
