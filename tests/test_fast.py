"""``tokenizer.json`` of our tokenizers: the same ids by the ``tokenizers`` library, and by transformers alone."""

import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from foreign import blinkdl_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenization import PIECES, TEXTS, neox_like
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rwkv_rev.conversion import convert
from rwkv_rev.converters.export import export
from rwkv_rev.errors import OutputError
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer
from rwkv_rev.tokenization.byte_level import ByteLevelTokenizer
from rwkv_rev.tokenization.fast import fast_tokenizer, greedy_pattern

CHARACTERS = st.characters(codec="utf-8")
TEXT = st.lists(st.one_of(st.text(CHARACTERS), PIECES, st.text("ab \n", max_size=200)), max_size=12)
RANGES = [
    "".join(chr(code) for code in range(first, first + 0x40) if not 0xD800 <= code < 0xE000)
    for first in [*range(0, 0x3000, 0x40), *range(0x3000, 0x110000, 0x1000)]
]
"""Every character of the first 12,288, then the first 64 of each block of 4,096."""
HARD = [
    *TEXTS.values(),
    *RANGES,
    " " * 20_001,
    "=" * 300,
    "ab" * 5_000,
    "日本" * 3_000,
    "🤖" * 999,
    "\0Ā\0ĀÃ©",
]


@pytest.fixture(scope="module", params=[RwkvByteTokenizer, RwkvWorldTokenizer], ids=["byte", "world"])
def both(request: pytest.FixtureRequest) -> tuple[ByteLevelTokenizer, PreTrainedTokenizerFast]:
    tokenizer = request.param()
    return tokenizer, fast_tokenizer(tokenizer)


@settings(max_examples=40, deadline=None)
@given(
    entries=st.sets(st.text("ab[]()|.*^-\\/é", min_size=1, max_size=5), min_size=1),
    text=st.text("ab[]()|.*^-\\/é"),
)
def test_the_pattern_matches_the_longest_entry(entries: set[str], text: str) -> None:
    pattern = re.compile(greedy_pattern(tuple(entries)))
    for place in range(len(text)):
        found = pattern.match(text, place)
        fits = [entry for entry in entries if text.startswith(entry, place)]
        assert (found[0] if found else None) == max(fits, key=len, default=None)


def test_hard_texts(both: tuple[ByteLevelTokenizer, PreTrainedTokenizerFast]) -> None:
    ours, fast = both
    for text, ids in zip(HARD, fast(HARD).input_ids, strict=True):
        assert ids == ours(text).input_ids, text[:80]
        assert fast.decode(ids) == text


@settings(max_examples=40, deadline=None)
@given(pieces=TEXT)
def test_any_text(both: tuple[ByteLevelTokenizer, PreTrainedTokenizerFast], pieces: list[str]) -> None:
    ours, fast = both
    text = "".join(pieces)
    ids = fast(text).input_ids
    assert ids == ours(text).input_ids
    assert fast.decode(ids) == text
    for skip in (False, True):
        assert fast.decode([0, *ids, 0], skip_special_tokens=skip) == ours.decode([0, *ids, 0], skip)


def test_every_entry() -> None:
    """Those that are text alone, and all of them as the library's own words: each is its own longest match."""
    ours = RwkvWorldTokenizer()
    fast = fast_tokenizer(ours)
    texts = {}
    for index, piece in ours.token_bytes.items():
        try:
            texts[index] = piece.decode()
        except UnicodeDecodeError:
            # Its bytes end or begin inside a character: reached from text only beside others.
            word = fast.convert_ids_to_tokens(index)
            assert fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str(word) == [(word, (0, len(word)))]
            assert fast.convert_tokens_to_ids(word) == index
        assert fast.decode([index]) == piece.decode("utf-8", "replace")
    assert len(texts) > 64_000
    assert fast(list(texts.values())).input_ids == [[index] for index in texts]
    assert ours.get_vocab().keys() and len(fast) == len(ours) == 65530


def test_special_tokens_padding_and_offsets(both: tuple[ByteLevelTokenizer, PreTrainedTokenizerFast]) -> None:
    ours, fast = both
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "padding_side", "model_input_names"):
        assert getattr(fast, name) == getattr(ours, name), name
    texts = ["a longer text", "é", "", "<|endoftext|>"]
    assert dict(fast(texts, padding=True)) == dict(ours(texts, padding=True))
    text = "Hi 🤖é\n"
    found = fast(text, return_offsets_mapping=True)
    at = 0
    for index, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
        piece = ours.decode_bytes([index])
        around = text[start:end].encode()
        assert piece in around  # a token inside a character has that character's place
        assert start <= len(text.encode()[:at].decode("utf-8", "ignore")) < end
        at += len(piece)
    pieces = fast("x" * 300, truncation=True, max_length=7, stride=2, return_overflowing_tokens=True)
    assert len(pieces.input_ids) > 1 and all(len(ids) <= 7 for ids in pieces.input_ids)


@pytest.mark.parametrize("kind", [RwkvByteTokenizer, RwkvWorldTokenizer])
def test_added_tokens(kind: type[ByteLevelTokenizer], tmp_path: Path) -> None:
    ours = kind(split_special_tokens=False)
    ours.add_tokens(["<usér> one", "<|im_end|>"])
    ours.add_special_tokens({"eos_token": "<|end|>"})
    fast = fast_tokenizer(ours)
    for text in ("a<usér> one b<|im_end|>", "<|end|>é<|end|>", "\0<|endoftext|>"):
        assert fast(text).input_ids == ours(text).input_ids
        assert fast.decode(ours(text).input_ids) == text
    assert fast.eos_token_id == ours.eos_token_id
    fast.save_pretrained(tmp_path)
    assert (
        PreTrainedTokenizerFast.from_pretrained(tmp_path)("<|end|>é").input_ids == ours("<|end|>é").input_ids
    )


def test_offsets_come_from_our_classes_too(tmp_path: Path) -> None:
    """``AutoTokenizer`` gives our class where this package is imported; asked for offsets it leaves none out."""
    RwkvWorldTokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Grüße, 世界! 🙂\n\nUser: x", "a"]
    for text, ids, offsets in zip(
        texts,
        *(tokenizer(texts, return_offsets_mapping=True)[k] for k in ("input_ids", "offset_mapping")),
        strict=True,
    ):
        assert ids == tokenizer(text)["input_ids"]
        for index, (begin, end) in zip(ids, offsets, strict=True):
            written = tokenizer.decode_bytes([index])
            assert written in text[begin:end].encode() and end > begin
    tokenizer = RwkvByteTokenizer()
    cut = tokenizer(texts, padding=True, truncation=True, max_length=3, return_offsets_mapping=True)
    assert [len(row) for row in cut["offset_mapping"]] == [3, 3] and cut["offset_mapping"][1][0] == (0, 0)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer("a<new>", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 6)]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again("a<new>", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 6)]


def test_an_id_that_the_library_cannot_give_is_refused() -> None:
    ours = RwkvWorldTokenizer(split_special_tokens=False)
    ours.add_tokens([" user"])  # an entry of the vocabulary, made a token to be found
    with pytest.raises(OutputError, match="' user' has id"):
        fast_tokenizer(ours)


CHILD = """
import json, sys
sys.modules["rwkv_rev"] = None  # as if it were not installed
from transformers import AutoTokenizer
for folder, cases in json.loads(sys.stdin.read()).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
    assert tokenizer(["a", "bc"], padding=True, return_tensors="pt").keys() == {"input_ids", "attention_mask"}
    for text, ids in cases:
        found = tokenizer(text).input_ids
        assert found == ids, (folder, text[:80], found[:20], ids[:20])
        assert tokenizer.decode(ids) == text, (folder, text[:80])
print("alike")
"""


def test_transformers_alone_reads_what_was_converted_and_exported(tmp_path: Path) -> None:
    """Byte, world and Pile models, in a process that cannot import this package."""
    import torch

    neox_like(tmp_path / "neox.json")
    cases: dict[str, Any] = {}
    for name, version, vocabulary, tokenizer in (
        ("byte", "5.2", 256, None),
        ("world", "5.2", 65536, None),
        ("pile", "4", 50277, tmp_path / "neox.json"),
    ):
        weights = blinkdl_state_dict(version, vocab=vocabulary, D=16, head_size=8)
        torch.save(weights, tmp_path / f"{name}.pth")
        chosen = None if tokenizer is None else str(tokenizer)
        model = convert(tmp_path / f"{name}.pth", tmp_path / name, tokenizer=chosen).directory
        exported = export(model, tmp_path / f"{name}-hf", to="hf").path
        ours = AutoTokenizer.from_pretrained(model)
        expected = [(text, ours(text).input_ids) for text in ([*TEXTS.values()] if name == "pile" else HARD)]
        cases |= {str(model): expected[: len(TEXTS)], str(exported): expected}
        assert (
            json.loads((exported / "tokenizer_config.json").read_text())["tokenizer_class"]
            == "PreTrainedTokenizerFast"
        )
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
        timeout=120,
    )
    # before it, of RWKV-5, the question whether the model's remote code may run
    assert done.stdout.endswith("alike\n"), done.stderr[-2000:]


@pytest.mark.timing
def test_speed(
    both: tuple[ByteLevelTokenizer, PreTrainedTokenizerFast], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the pattern against the trie, and that the time grows with the text alone."""
    ours, fast = both
    text = "".join(f"{TEXTS['languages']} line {i}: {TEXTS['code']}" for i in range(2_000))

    def seconds(function: Any, argument: Any) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function(argument)
            times.append(time.perf_counter() - start)
        return min(times)

    one, four = seconds(fast, text), seconds(fast, text * 4)
    trie = seconds(ours, text)
    megabytes = len(text.encode()) / 1e6
    with capsys.disabled():
        print(
            f"\n{type(ours).__name__}: tokenizer.json {megabytes / one:.1f} MB/s, ours {megabytes / trie:.1f} MB/s"
        )
    assert four < 10 * one, "a time that grows with the square would be 16 times as long"
