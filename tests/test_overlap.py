"""Held-out documents that are training documents, too."""

import json
from pathlib import Path

import numpy as np
from finetune_cases import counting_text, settings
from test_binidx import write_pair

from rwkv_rev.training.finetune import plan
from rwkv_rev.training.overlap import shared_documents
from rwkv_rev.training.token_cache import load_tokens


class Bytes:
    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def found(tmp_path: Path, training: Path, held_out: Path) -> list[str]:
    cache = tmp_path / "cache"
    return shared_documents(
        load_tokens(training, Bytes(), cache_dir=cache),
        load_tokens(held_out, Bytes(), end_token=None, cache_dir=cache),
    )


def write_jsonl(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_same_file_and_a_copy(tmp_path: Path) -> None:
    one, other = counting_text(tmp_path / "one.txt"), tmp_path / "other.txt"
    other.write_bytes(one.read_bytes())
    for held_out in (one, other):
        (text,) = found(tmp_path, one, held_out)
        assert f"{held_out} (1 of 1 document, the first is {one}:1)" in text
    other.write_bytes(one.read_bytes() + b"more")
    assert found(tmp_path, one, other) == []


def test_single_documents_in_any_format(tmp_path: Path) -> None:
    training = write_jsonl(tmp_path / "a.jsonl", "one", "two", "three", "", "six")
    held_out = write_jsonl(tmp_path / "b.jsonl", "uno", "six", "three", "four", "thx", "")
    (text,) = found(tmp_path, training, held_out)
    assert f"{held_out} (2 of 5 documents, the first is {training}:5)" in text
    pair = write_pair(tmp_path / "pair", [list(b"four"), list(b"three"), []])
    (text,) = found(tmp_path, training, pair)
    assert f"{pair} (1 of 3 documents, the first is {training}:3)" in text
    assert found(tmp_path, pair, write_jsonl(tmp_path / "c.jsonl", "five", "thrxe")) == []


def test_many_short_documents(tmp_path: Path) -> None:
    """Against a search of every pair."""
    numbers = np.random.default_rng(0)
    texts = ["".join(map(chr, numbers.integers(97, 100, numbers.integers(1, 6)))) for _ in range(300)]
    training, held_out = texts[:200], texts[200:]
    (text,) = found(
        tmp_path, write_jsonl(tmp_path / "a.jsonl", *training), write_jsonl(tmp_path / "b.jsonl", *held_out)
    )
    assert f"({sum(text in training for text in held_out)} of 100 documents" in text


def test_a_plan_warns(bundled: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 20)
    config = settings(bundled["4"], data, tmp_path / "out", eval_data=[str(data)])
    assert any(
        "held-out data is training data, too" in note and str(data) in note for note in plan(config).notes
    )
    other = counting_text(tmp_path / "other.txt", 19)
    config.eval_data = [str(other)]
    assert not any("held-out" in note for note in plan(config).notes)
