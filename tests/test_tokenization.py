"""Tokenizers: ids against the trie of the ``rwkv`` package, round trips of any text, saving, choice."""

import importlib.util
import json
import pickle
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TextStreamer

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import CheckpointError, RwkvRevError, SourceError
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer, choose_tokenizer, world
from rwkv_rev.tokenization.byte_level import ByteLevelTokenizer, text_to_bytes

TEXTS = {
    "empty": "",
    "spaces": "  leading, inner   and trailing spaces  \n\n \t",
    "special-text": "a document about <|endoftext|> and <|padding|> and \0",
    "languages": "Ünïcödé Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 中文 한국어 ქართული",
    "emoji": "🤖👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u2028",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x9f\xa0",
    "planes": "\uffff\U00010000\U0010ffff\ufffd",
    "code": "def f(x):\n    return {'a': x[0] ** 2}  # \\n\r\n",
}
# Pieces that exercise long entries, entries that are not UTF-8, and runs.
PIECES = st.sampled_from(
    [" " * 130, "=" * 90, "\n\n", "\r\n", "日本", "🤖", "é", "\0", "http://", "<|endoftext|>", "0"]
)
TEXT = st.lists(st.one_of(st.text(), PIECES, st.text("ab \n", max_size=200)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def world_tokenizer() -> RwkvWorldTokenizer:
    return RwkvWorldTokenizer()


@pytest.fixture(scope="module", params=["world", "byte"])
def tokenizer(request: pytest.FixtureRequest, world_tokenizer: RwkvWorldTokenizer) -> ByteLevelTokenizer:
    return world_tokenizer if request.param == "world" else RwkvByteTokenizer()


@pytest.fixture(scope="module")
def oracle() -> Any:
    """The trie of the ``rwkv`` package over its own vocabulary file."""
    found = pytest.importorskip("rwkv.rwkv_tokenizer")
    return found.TRIE_TOKENIZER(str(Path(found.__file__).parent / world.VOCABULARY_FILE))


def neox_like(path: Path, highest: int = 50276) -> Path:
    """A tiny byte-level BPE file with the special tokens and the highest id of GPT-NeoX."""
    vocabulary = {"<|endoftext|>": 0, "<|padding|>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    vocabulary["highest"] = highest
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.save(str(path))
    return path


# Ids and round trips


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_world_ids_are_those_of_the_reference_trie(
    text: str, world_tokenizer: RwkvWorldTokenizer, oracle: Any
) -> None:
    expected = oracle.encode(text)
    assert world_tokenizer.trie.rust is not None
    assert world_tokenizer.encode(text) == expected
    assert world_tokenizer(text).input_ids == expected
    assert world_tokenizer.convert_tokens_to_ids(world_tokenizer.tokenize(text)) == expected
    assert world_tokenizer.trie.python.encode(text.encode()) == expected


@settings(max_examples=30, deadline=None)
@given(text=TEXT)
def test_world_fuzz_against_the_reference_trie(
    text: str, world_tokenizer: RwkvWorldTokenizer, oracle: Any
) -> None:
    ids = world_tokenizer.encode(text)
    assert ids == oracle.encode(text) == world_tokenizer.trie.python.encode(text.encode())
    assert world_tokenizer.decode(ids) == text
    assert world_tokenizer.decode_bytes(ids) == oracle.decodeBytes(ids)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300))
@example(data=bytes(range(256)))
@example(data="🤖".encode()[:3] + b"\n" + "日".encode()[1:])
def test_binary_data_survives(data: bytes, world_tokenizer: RwkvWorldTokenizer, oracle: Any) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for tokenizer, expected in (
        (world_tokenizer, oracle.encodeBytes(data)),
        (RwkvByteTokenizer(), list(data)),
    ):
        assert tokenizer.encode_bytes(data) == expected
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode_bytes(expected) == data
        assert tokenizer.decode(expected, errors="surrogateescape") == text
        assert tokenizer.decode(expected) == data.decode("utf-8", "replace")


@settings(max_examples=40, deadline=None)
@given(text=TEXT)
def test_byte_ids_are_the_bytes(text: str) -> None:
    tokenizer = RwkvByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == list(text.encode())


def test_every_entry_encodes_as_itself(world_tokenizer: RwkvWorldTokenizer) -> None:
    assert sorted(world_tokenizer.token_bytes) == list(range(1, 65530))
    for i, piece in world_tokenizer.token_bytes.items():
        assert world_tokenizer.encode_bytes(piece) == [i]
        assert world_tokenizer.convert_tokens_to_ids(world_tokenizer.convert_ids_to_tokens(i)) == i


@pytest.mark.parametrize("unit", [" ", "\n", "=", "a", "é", "🤖", "ab", "\0"], ids=repr)
def test_very_long_runs(unit: str, world_tokenizer: RwkvWorldTokenizer, oracle: Any) -> None:
    text = unit * 20_001
    ids = world_tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert world_tokenizer.decode(ids) == text


def test_lone_surrogates_become_bytes(tokenizer: ByteLevelTokenizer) -> None:
    assert text_to_bytes("a\udcff\ud83d\udc80é") == b"a\xff\xed\xa0\xbd\x80\xc3\xa9"
    ids = tokenizer.encode("a\udcff\ud83d")
    assert tokenizer.decode_bytes(ids) == b"a\xff\xed\xa0\xbd"
    assert tokenizer.decode(tokenizer.encode("a\ud83d"), errors="surrogatepass") == "a\ud83d"


# Special tokens


def test_nothing_is_added_and_text_is_never_a_special_token(
    tokenizer: ByteLevelTokenizer, world_tokenizer: RwkvWorldTokenizer
) -> None:
    for text in (" <|endoftext|>", "<|endoftext|> ", "x"):
        assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.pad_token_id not in tokenizer.encode(text)
    found = world_tokenizer.encode("a<|endoftext|> b", split_special_tokens=False)
    assert found == [*world_tokenizer.encode("a"), 0, *world_tokenizer.encode(" b")]


def test_end_of_text_is_id_0(world_tokenizer: RwkvWorldTokenizer) -> None:
    assert world_tokenizer.eos_token_id == world_tokenizer.pad_token_id == 0
    assert world_tokenizer.vocab_size == len(world_tokenizer) == 65530
    assert world_tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    ids = [0, *world_tokenizer.encode(" hi"), 0]
    assert world_tokenizer.decode(ids) == "<|endoftext|> hi<|endoftext|>"
    assert world_tokenizer.decode(ids, skip_special_tokens=True) == " hi"
    assert world_tokenizer.batch_decode(torch.tensor([ids]), skip_special_tokens=True) == [" hi"]


def test_the_byte_0_pads_and_ends_a_text() -> None:
    tokenizer = RwkvByteTokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 0, 256)
    tokenizer.pad_token = tokenizer.eos_token  # as tutorials have it
    assert tokenizer(["a", "bc"], padding=True).input_ids == [[0, 97], [98, 99]]
    assert tokenizer.decode([0, 104, 105]) == "\0hi"
    assert tokenizer.decode([0, 104, 105], skip_special_tokens=True) == "hi"


def test_ids_without_a_token(world_tokenizer: RwkvWorldTokenizer) -> None:
    assert world_tokenizer.decode([65535]) == "\ufffd"
    with pytest.raises(ValueError, match="id -100 is not a token"):
        world_tokenizer.decode([-100])


def test_added_tokens_use_the_free_rows(tmp_path: Path) -> None:
    tokenizer = RwkvWorldTokenizer()
    assert tokenizer.encode("<|endoftext|>") != [0]
    assert tokenizer.add_tokens(["<user>"]) == 1
    ids = tokenizer.encode("a <user>é")
    assert 65530 in ids
    assert tokenizer.decode(ids) == "a <user>é"
    tokenizer.save_pretrained(tmp_path)
    again = RwkvWorldTokenizer.from_pretrained(tmp_path)
    assert again.encode("a <user>é") == ids
    assert 65530 not in again.encode("a <user>é", split_special_tokens=True)


@pytest.mark.parametrize("how", ["special", "plain", "eos"])
def test_tokens_of_chats_are_found(tokenizer: ByteLevelTokenizer, tmp_path: Path, how: str) -> None:
    """Whichever way they are added, by templates too, and in the ``tokenizer.json`` that others read."""
    tokenizer = type(tokenizer)()  # the fixture's is everybody's
    if how == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    elif how == "plain":
        tokenizer.add_tokens(["<|user|>"])
    else:
        tokenizer.eos_token = "<|user|>"
        tokenizer.add_special_tokens({"eos_token": "<|user|>"})
    new = len(tokenizer) - 1
    expected = [new, *tokenizer.encode("hi")]
    assert tokenizer("<|user|>hi").input_ids == expected and tokenizer(["<|user|>hi"]).input_ids == [expected]
    template = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    asked = {"chat_template": template, "tokenize": True, "return_dict": True}
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, **asked)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path)
    for kind in (type(tokenizer), PreTrainedTokenizerFast):
        assert kind.from_pretrained(tmp_path)("<|user|>hi").input_ids == expected


# Batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_mask(side: str, tokenizer: ByteLevelTokenizer) -> None:
    texts = ["a longer text of several words", "short", "", "é"]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    alone = [tokenizer.encode(text) for text in texts]
    length = max(map(len, alone))
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, length)
    for row, mask, ids in zip(batch.input_ids, batch.attention_mask, alone, strict=True):
        assert row[mask.bool()].tolist() == ids
        padding = [0] * (length - len(ids))
        ones = [1] * len(ids)
        assert mask.tolist() == (padding + ones if side == "left" else ones + padding)
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == texts


def test_padding_is_on_the_left_by_default(tokenizer: ByteLevelTokenizer) -> None:
    assert tokenizer(["ab c", "a"], padding=True).attention_mask[1][0] == 0


def test_conversations(tokenizer: ByteLevelTokenizer) -> None:
    """By a template that does not say who speaks: the text, and no mask of the assistant's tokens."""
    talk = [{"role": "user", "content": "Hello"}]
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}!"
    asked = {"chat_template": template, "tokenize": True, "return_dict": True}
    ids = tokenizer.apply_chat_template(talk, **asked)["input_ids"]
    assert tokenizer.decode(ids) == "Hello!"
    with pytest.raises(ValueError, match=r"assistant_only_loss.*needs {% generation %} marks"):
        tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, **asked)


def test_truncation(tokenizer: ByteLevelTokenizer) -> None:
    assert (
        tokenizer("one two three four", truncation=True, max_length=3).input_ids
        == tokenizer.encode("one two three four")[:3]
    )


# Streaming


@pytest.mark.parametrize("text", ["日本語🤖 ok, né\n🤖🤖 end", "no space🤖é"])
def test_streaming_never_breaks_a_character(
    text: str, tokenizer: ByteLevelTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    for i in tokenizer.encode(text):
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert capsys.readouterr().out == text + "\n"


# Saving and loading


def test_save_and_load(tokenizer: ByteLevelTokenizer, tmp_path: Path) -> None:
    RwkvRevConfig(vocab_size=256, hidden_size=64, num_attention_heads=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    text = " ".join(TEXTS.values())
    for loader in (type(tokenizer), AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(tokenizer)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert loaded.padding_side == "left"
    loaded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    assert {p.name for p in tmp_path.iterdir()} == set(first)


def test_saved_vocabulary_is_the_original_file(world_tokenizer: RwkvWorldTokenizer, tmp_path: Path) -> None:
    (saved,) = world_tokenizer.save_vocabulary(str(tmp_path), filename_prefix="x")
    assert Path(saved).name == f"x-{world.VOCABULARY_FILE}"
    assert Path(saved).read_bytes() == world.find_world_vocabulary().read_bytes()


def test_saves_again_after_its_directory_is_gone(world_tokenizer: RwkvWorldTokenizer, tmp_path: Path) -> None:
    world_tokenizer.save_pretrained(tmp_path / "a")
    loaded = RwkvWorldTokenizer.from_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    copy = pickle.loads(pickle.dumps(loaded))
    assert copy.trie.rust is None
    assert copy.encode("日本 hi\xff") == RwkvWorldTokenizer.from_pretrained(tmp_path / "b").encode(
        "日本 hi\xff"
    )


def test_pickles_with_its_rust_trie(world_tokenizer: RwkvWorldTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(world_tokenizer))
    assert copy.trie.rust is not None
    assert copy.encode("hello world") == world_tokenizer.encode("hello world")


def test_fingerprint_of_datasets(tokenizer: ByteLevelTokenizer) -> None:
    fingerprint = pytest.importorskip("datasets.fingerprint")
    first = fingerprint.Hasher.hash(tokenizer)
    tokenizer("some text")
    assert fingerprint.Hasher.hash(tokenizer) == first


# The vocabulary file


def test_works_without_the_rust_wheel(monkeypatch: pytest.MonkeyPatch, oracle: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    vocabulary = Path(sys.modules[type(oracle).__module__].__file__ or "").parent / world.VOCABULARY_FILE
    monkeypatch.setattr(world, "find_world_vocabulary", lambda: vocabulary)
    tokenizer = RwkvWorldTokenizer()
    assert tokenizer.trie.rust is None
    for text in TEXTS.values():
        assert tokenizer.encode(text) == oracle.encode(text)


def test_no_package_with_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip install pyrwkv-tokenizer"):
        RwkvWorldTokenizer()


@pytest.mark.parametrize(
    "content, message",
    [
        ("<!DOCTYPE html>\n", "line 1: not an entry"),
        ("1 'a' 1\n2 'b' 2\n", "line 2: not an entry"),
        ("1 'a' 1\n1 'b' 1\n", "line 2: not an entry"),
        ("0 'a' 1\n", "line 1: not an entry"),
        ("1 __import__('os') 1\n", "line 1: not an entry"),
        ("1 'a' 1\n2 'b' 1\n", "entries are missing"),
        ("", "entries are missing"),
    ],
    ids=["web-page", "length", "twice", "id-0", "code", "bytes-missing", "empty"],
)
def test_malformed_vocabulary(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        RwkvWorldTokenizer(path)
    assert "\n" not in str(caught.value)


def test_each_file_is_its_own_vocabulary(world_tokenizer: RwkvWorldTokenizer, tmp_path: Path) -> None:
    """Whatever was read before it, by either trie."""
    text = world.find_world_vocabulary().read_text("utf-8")
    one, other = (world_tokenizer.encode(word)[0] for word in (" hello", " world"))
    (tmp_path / "own.txt").write_text(
        text.replace(f"\n{one} ' hello' ", "\n?").replace(f"\n{other} ' world' ", f"\n{one} ' world' ")
        .replace("\n?", f"\n{other} ' hello' "), "utf-8"
    )  # fmt: skip
    for path, expected in ((None, one), (tmp_path / "own.txt", other), (None, one)):
        tokenizer = RwkvWorldTokenizer(path)
        assert (tokenizer.trie.rust is None) == (path is not None)  # it wants the ids in order
        for data in (b" hello", b" hello\xff"):
            assert tokenizer.encode_bytes(data)[0] == expected, (path, data)


def test_another_table_than_the_files_takes_no_trie_of_the_file(world_tokenizer: RwkvWorldTokenizer) -> None:
    """Whatever the file was compared with before; one with the same entries takes it."""
    path, table = world.find_world_vocabulary(), dict(world_tokenizer.token_bytes)
    one, other = (world_tokenizer.encode(word)[0] for word in (" hello", " world"))
    assert world.load_rust_trie(path, table) is world.load_rust_trie(path, dict(table)) is not None
    table[one], table[other] = table[other], table[one]
    assert world.load_rust_trie(path, table) is None


# Choice


@pytest.mark.parametrize("size, kind", [(256, RwkvByteTokenizer), (65536, RwkvWorldTokenizer)])
def test_chosen_from_the_vocabulary_size(size: int, kind: type) -> None:
    assert type(choose_tokenizer(size)) is kind


@pytest.mark.parametrize("size", [1, 255, 1000, 50253, 50433, 65529, 65537])
def test_unknown_sizes_are_refused(size: int) -> None:
    with pytest.raises(CheckpointError, match=rf"vocabulary of {size} .*tokenizer=") as caught:
        choose_tokenizer(size)
    assert "\n" not in str(caught.value)


def test_override_of_an_unknown_size() -> None:
    assert type(choose_tokenizer(300, override="byte")) is RwkvByteTokenizer
    with pytest.raises(CheckpointError, match=r"world tokenizer has ids up to 65529 .* 256 rows.*tokenizer="):
        choose_tokenizer(256, override="world")


@pytest.mark.parametrize("file", ["tokenizer.json", "20B_tokenizer.json"])
def test_neox_of_the_source(file: str, tmp_path: Path) -> None:
    neox_like(tmp_path / file)
    tokenizer = choose_tokenizer(50277, source_directory=tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (0, 1, "left")
    check_neox(tokenizer, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="ids up to 50276 but the model only 50254 rows"):
        choose_tokenizer(50254, source_directory=tmp_path)


def check_neox(tokenizer: PreTrainedTokenizerBase, saved: Path) -> None:
    """Round trip, no special tokens added, and loading beside the model's config."""
    text = " two  spaces\n日本 ."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids
    RwkvRevConfig(vocab_size=50277, hidden_size=64, num_attention_heads=1).save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    loaded = AutoTokenizer.from_pretrained(saved)
    assert loaded.encode(text) == ids
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    assert loaded.decode(ids) == text


def test_override_by_path(tmp_path: Path, world_tokenizer: RwkvWorldTokenizer) -> None:
    neox_like(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert isinstance(choose_tokenizer(60000, override=path), PreTrainedTokenizerFast)
    world_tokenizer.save_pretrained(tmp_path / "world")
    for path in (tmp_path / "world", tmp_path / "world" / world.VOCABULARY_FILE):
        assert type(choose_tokenizer(70000, override=str(path))) is RwkvWorldTokenizer


@pytest.mark.parametrize("override", ["neox", None, "someone/some-tokenizer"])
def test_offline_says_what_would_work(
    override: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="tokenizer") as caught:
        choose_tokenizer(50277, override=override, source_directory=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{}", "<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1"]
)
def test_unreadable_tokenizer_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RwkvRevError, match=r"not a readable tokenizer\.json"):
        choose_tokenizer(50277, source_directory=tmp_path)


@pytest.mark.parametrize("override", ["no/such/directory/at-all", "."])
def test_paths_without_a_tokenizer(override: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no tokenizer can be loaded") as caught:
        choose_tokenizer(256, override=override)
    assert "\n" not in str(caught.value)


# Speed


def test_faster_than_the_reference_trie(
    world_tokenizer: RwkvWorldTokenizer, oracle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ratio of processor seconds within one run: the wrapped Rust trie, and the Python one it falls back to."""
    text = "".join(f"{TEXTS['languages']} line {i}: {TEXTS['code']}" for i in range(400))

    def seconds(encode: Any, argument: Any) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            encode(argument)
            times.append(time.process_time() - start)
        return min(times)

    reference = seconds(oracle.encode, text)
    wrapped = reference / seconds(lambda t: world_tokenizer(t).input_ids, text)
    python = reference / seconds(world_tokenizer.trie.python.encode, text.encode())
    with capsys.disabled():
        print(f"\nspeed against the reference trie: Rust, wrapped {wrapped:.1f}x; Python {python:.1f}x")
    assert wrapped > 3
    assert python > 0.3
