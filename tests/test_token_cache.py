"""Tokenised once, found again, never stale, safe between processes."""

import gc
import json
import os
import pickle
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from byte_tokens import Bytes
from processes import context, run_python

from rwkv_rev.errors import DataError
from rwkv_rev.tokenization import RwkvByteTokenizer
from rwkv_rev.training import documents, tokenise
from rwkv_rev.training.documents import Fields
from rwkv_rev.training.rows import RowDataset
from rwkv_rev.training.token_cache import load_tokens
from rwkv_rev.training.token_store import TokenStore
from rwkv_rev.training.tokenise import tokenizer_fingerprint


def texts(store: TokenStore) -> list[str]:
    return [bytes(store.tokens(i).astype(np.uint8)).decode() for i in range(len(store))]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tokenises begins with everything imported; where the fixture is not asked for, afresh."""
    started = context()
    monkeypatch.setattr("multiprocessing.get_context", lambda method: started)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("first\nsecond\n")
    records = [
        {"prompt": "2+2=", "completion": "4"},
        {"text": ""},
        {"text": "ünï"},
        {"text": ""},
    ]
    (tmp_path / "data" / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "data"


def test_tokens_prompts_places_and_end_tokens(data: Path, tmp_path: Path) -> None:
    store = load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")
    assert texts(store) == ["first\nsecond\n\0", "2+2=4\0", "ünï\0"]
    assert store.lengths().tolist() == [14, 6, 6]
    assert store.prompt_lengths().tolist() == [0, 4, 0]
    assert store.text_bytes().tolist() == [13, 1, 5]
    assert store.ids_at(store.lengths() - 1).tolist() == [0, 0, 0]
    assert [store.place(i) for i in range(3)] == [
        f"{data / 'a.txt'}:1",
        f"{data / 'b.jsonl'}:1",
        f"{data / 'b.jsonl'}:3",
    ]
    assert (store.empty_documents, store.end_token, store.total_tokens) == (2, 0, 26)
    assert store.tokens(0, 2, 5).tolist() == list(b"rst") and store.tokens(0, 20).tolist() == []
    without = load_tokens(data, Bytes(), end_token=None, cache_dir=tmp_path / "cache")
    assert texts(without)[0] == "first\nsecond\n" and without.fingerprint != store.fingerprint


def test_no_byte_ends_a_document_of_bytes_unless_asked(data: Path, tmp_path: Path) -> None:
    """``eos_token`` of the tokenizer of bytes is an ordinary byte, which the bundled models do not know as an end.

    A completion ends with it: what answers has to learn where to end.
    """
    tokenizer = RwkvByteTokenizer()
    assert tokenizer.eos_token_id == 0
    store = load_tokens(data, tokenizer, cache_dir=tmp_path / "cache")
    assert store.end_token is None and texts(store) == ["first\nsecond\n", "2+2=4\0", "ünï"]
    asked = load_tokens(data, tokenizer, end_token=0, cache_dir=tmp_path / "cache")
    assert asked.end_token == 0 and texts(asked)[0] == "first\nsecond\n\0"


def test_second_load_reads_the_cache(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")
    again = load_tokens([data / "a.txt", data / "b.jsonl"], Bytes(), cache_dir=tmp_path / "cache")
    assert again.cache == first.cache and again.fingerprint == first.fingerprint
    data.rename(tmp_path / "moved")
    moved = load_tokens(tmp_path / "moved", Bytes(), cache_dir=tmp_path / "cache")
    assert moved.cache == first.cache and moved.place(0) == f"{tmp_path / 'moved' / 'a.txt'}:1"
    assert not log.exists()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_file()] == [".lock"]


def test_what_is_not_kept_goes_with_the_store(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, cache = tmp_path / "scratch", tmp_path / "cache"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    store = load_tokens(data, Bytes(), cache_dir=cache, num_workers=1, keep=False)
    assert not cache.exists() and len(list(scratch.iterdir())) == 1
    tokens, fingerprint = len(store), store.fingerprint
    del store
    gc.collect()
    assert not list(scratch.iterdir())
    kept = load_tokens(data, Bytes(), cache_dir=cache, num_workers=1)
    assert (len(kept), kept.fingerprint) == (tokens, fingerprint)
    again = load_tokens(
        data, Bytes(), cache_dir=cache, num_workers=1, keep=False
    )  # it is there, so it is read
    assert again.cache == kept.cache and not list(scratch.iterdir())
    (data / "bad.txt").write_text("\uffff")
    with pytest.raises(DataError, match=r"bad\.txt"):
        load_tokens(data, Bytes(), cache_dir=cache, num_workers=1, keep=False)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("change", ["data", "tokenizer", "end", "fields"])
def test_a_stale_cache_is_not_read(data: Path, tmp_path: Path, change: str) -> None:
    tokenizer, options = Bytes(), {}
    first = load_tokens(data / "a.txt", tokenizer, cache_dir=tmp_path / "cache")
    if change == "data":
        path = data / "a.txt"
        stat = path.stat()
        path.write_text("FIRST\nsecond\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and date: only the content tells
    elif change == "tokenizer":
        tokenizer = Bytes(shift=1)
    elif change == "end":
        options = {"end_token": 7}
    else:
        options = {"fields": Fields(text="body")}
    second = load_tokens(data / "a.txt", tokenizer, cache_dir=tmp_path / "cache", **options)
    assert second.fingerprint != first.fingerprint
    if change != "fields":
        assert second.tokens(0).tolist() != first.tokens(0).tolist()


@pytest.mark.parametrize("damage", ["meta.json", "tokens.bin", "documents.bin"])
def test_a_damaged_cache_is_built_again(data: Path, tmp_path: Path, damage: str) -> None:
    first = load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")
    assert first.cache is not None
    entry = first.cache / damage
    entry.write_bytes(entry.read_bytes()[:-1])
    (first.cache.parent / f"{first.cache.name}.building-dead").mkdir()
    assert texts(load_tokens(data, Bytes(), cache_dir=tmp_path / "cache"))[1] == "2+2=4\0"
    assert not list((tmp_path / "cache").glob("*.building-*"))


def test_a_failed_build_leaves_nothing(data: Path, tmp_path: Path) -> None:
    (data / "c.txt").write_text("good\nbad \uffff\n", "utf-8")
    with pytest.raises(DataError, match=r"c\.txt:2: cannot be tokenised: ValueError: not a character"):
        load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_tokenising_errors_name_the_record(data: Path, tmp_path: Path) -> None:
    with (data / "b.jsonl").open("a") as file:
        file.write('{"text": "\\uffff"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:5: cannot be tokenised"):
        load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")


EMPTY = "field '{}' is empty, and no other record holds text to train on"


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("", {}, ": the data holds no text at all"),
        ('\n{"text": ""}\n', {}, ":2: " + EMPTY.format("text")),
        ('{"prompt": "a", "completion": ""}', {}, ":1: field 'completion' is empty"),
        ('{"q": "a", "a": ""}', {"prompt": "q", "completion": "a"}, ":1: field 'a' is empty"),
        ('{"prompt": "a", "chosen": ""}', {"format": "chosen"}, ":1: field 'chosen' is empty"),
    ],
)
def test_empty_data_is_refused(tmp_path: Path, content: str, fields: dict[str, str], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl" + message):
        load_tokens(path, Bytes(), fields=Fields(**fields), cache_dir=tmp_path / "cache")


def test_data_that_changes_while_it_is_read_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Bytes.encode

    def meddle(self: Bytes, text: str) -> list[int]:
        if text.startswith("first"):
            (data / "a.txt").write_text("something else")
        return encode(self, text)

    monkeypatch.setattr(Bytes, "encode", meddle)
    with pytest.raises(DataError, match="changed while"):
        load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")


def test_vocabulary(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"token id 1[0-9]+ at position 0 is outside the model's vocabulary of 256"
    ):
        load_tokens(data, Bytes(shift=1000), vocab_size=256, cache_dir=tmp_path / "cache")
    store = load_tokens(data, Bytes(shift=100_000), cache_dir=tmp_path / "cache")
    assert store.parts[0].dtype.itemsize == 4 and store.tokens(1).tolist()[0] == 100_000 + ord("2")


def test_a_cache_that_cannot_be_written_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot be written .*cache_dir"):
        load_tokens(data, Bytes(), cache_dir=tmp_path / "file" / "cache")


@pytest.mark.usefixtures("forked")
def test_workers_and_pieces_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text in many pieces, two processes: ids, order and document borders as in one go."""
    text = "".join(f"line {i} of a longish text\n" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    log = tmp_path / "log"
    whole = load_tokens(sources, Bytes(), cache_dir=tmp_path / "one")
    monkeypatch.setattr(documents, "PIECE_BYTES", 4000)
    monkeypatch.setattr(tokenise, "BATCH_BYTES", 8000)
    store = load_tokens(sources, Bytes(log=log), num_workers=2, cache_dir=tmp_path / "two")
    assert texts(store) == [text + "\0", "short\0"] == texts(whole)
    assert store.text_bytes().tolist() == whole.text_bytes().tolist() == [len(text), 5]
    pids = {line.split()[0] for line in log.read_text().splitlines()}
    assert str(os.getpid()) not in pids and len(log.read_text().splitlines()) > 10


@pytest.mark.usefixtures("forked")
def test_large_data_is_handed_to_other_processes_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    monkeypatch.setattr(tokenise, "BATCH_BYTES", 500)
    monkeypatch.setattr(tokenise, "POOL_WORTH_SECONDS", 0.0)
    monkeypatch.setattr(tokenise, "worker_count", lambda num_workers: 2)
    log = tmp_path / "log"
    store = load_tokens(tmp_path / "a.jsonl", Bytes(log=log, nap=0.02), cache_dir=tmp_path / "cache")
    assert texts(store) == [f"document {i}\0" for i in range(100)]
    pids = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert pids[0] == os.getpid() and 0 < pids.count(os.getpid()) < 100 and len(pids) == 100


def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(documents, "PIECE_BYTES", 20_000)
    line = json.dumps({"text": "x" * 2000}) + "\n"
    peaks = []
    for count in (99, 100, 200, 400, 800):  # the first round warms up
        (tmp_path / "a.jsonl").write_text(line * count)
        (tmp_path / "b.txt").write_text(line * count)
        tracemalloc.start()
        store = load_tokens([tmp_path / "a.jsonl", tmp_path / "b.txt"], Bytes(), cache_dir=tmp_path / "cache")
        rows = RowDataset(store, 512)
        for i in range(0, len(rows), 50):
            rows[i]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert store.total_tokens > 4000 * count
    slope = np.polyfit((100, 200, 400, 800), peaks[1:], 1)[0]
    assert slope < 100, peaks  # bytes per 4,000 bytes of text: its lines in the tables at most


def test_errors_come_out_of_workers(data: Path, tmp_path: Path) -> None:
    (data / "c.txt").write_text("good\nbad \uffff\n", "utf-8")
    with pytest.raises(DataError, match=r"c\.txt:2: cannot be tokenised"):
        load_tokens(data, Bytes(), num_workers=2, cache_dir=tmp_path / "cache")
    unpicklable = Bytes()
    unpicklable.hook = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"cannot be sent to processes .* num_workers=1"):
        load_tokens(data / "a.txt", unpicklable, num_workers=2, cache_dir=tmp_path / "cache")


def build_slowly(folder: Path) -> list[int]:
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    tokenizer = Bytes(log=folder / "log", nap=0.5)
    return load_tokens(folder / "a.txt", tokenizer, cache_dir=folder / "cache").tokens(0).tolist()


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("shared")
    with context().Pool(2) as pool:
        found = pool.map(build_slowly, [tmp_path, tmp_path], chunksize=1)
    assert found == [[*b"shared", 0]] * 2
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_script_without_main_guard_fails_instead_of_hanging(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    script = tmp_path / "script.py"
    script.write_text(
        "from rwkv_rev.training.token_cache import load_tokens\n"
        "class Ids:\n    def encode(self, text): return [1]\n"
        f"load_tokens({str(tmp_path / 'a.txt')!r}, Ids(), num_workers=2,"
        f" cache_dir={str(tmp_path / 'cache')!r})\n"
    )
    done = run_python([sys.executable, script])
    assert done.returncode == 1
    assert "DataError: a tokenising process died" in done.stderr.splitlines()[-1]


def test_store_travels_to_other_processes_without_its_tokens(data: Path, tmp_path: Path) -> None:
    store = load_tokens(data, Bytes(), cache_dir=tmp_path / "cache")
    store.tokens(0)
    sent = pickle.dumps(store)
    assert len(sent) < 4000 and b"second" not in sent
    assert texts(pickle.loads(sent)) == texts(store)


def test_transformers_tokenizer(data: Path, tmp_path: Path) -> None:
    """A fast tokenizer of the transformers kind: called, without special tokens, told apart by its rules."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    def build(*words: str) -> PreTrainedTokenizerFast:
        vocabulary = {word: index for index, word in enumerate(["<end>", "<unk>", *words])}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")

    tokenizer = build("first", "second")
    store = load_tokens(data / "a.txt", tokenizer, cache_dir=tmp_path / "cache")
    assert store.tokens(0).tolist() == [2, 3, 0]
    assert store.parts[0].dtype.itemsize == 2
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(build("first", "second"))
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(build("first", "third"))


def test_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "dd"], "id": [1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    store = load_tokens("hf:owner/name", Bytes(), cache_dir=tmp_path / "cache")
    assert texts(store) == ["ac\0", "bdd\0"] and store.prompt_lengths().tolist() == [1, 1]
    assert store.place(1) == "hf:owner/name: row 2"
    assert load_tokens("owner/name", Bytes(), cache_dir=tmp_path / "cache").cache == store.cache


def test_a_killed_build_is_made_good(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    tokenizer = Bytes(log=tmp_path / "log", nap=60)
    options = {"cache_dir": tmp_path / "cache"}
    child = context().Process(target=load_tokens, args=(tmp_path / "a.txt", tokenizer), kwargs=options)
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.join()
    assert list((tmp_path / "cache").glob("*.building-*")) and not list(
        (tmp_path / "cache").glob("*/meta.json")
    )
    assert texts(load_tokens(tmp_path / "a.txt", Bytes(), **options)) == ["text\0"]
    assert (
        not list((tmp_path / "cache").glob("*.building-*")) and len(list((tmp_path / "cache").iterdir())) == 2
    )
