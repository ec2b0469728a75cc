"""What of a folder is data, and what is skipped."""

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rwkv_rev.errors import DataError
from rwkv_rev.training.documents import Fields
from rwkv_rev.training.sources import describe_skipped, find_sources
from rwkv_rev.training.token_cache import load_tokens


def read(path: Path, fields: Fields | None = None) -> list[tuple[str, str]]:
    (source,) = find_sources(path)
    return [(piece.text, piece.where.removeprefix(str(path))) for piece in source.pieces(fields)]


@pytest.mark.parametrize("name", ["a.md", "a.rst", "a.py", "A.MD", "a.txt.gz", "a.py.gz"])
def test_texts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    raw = b"one\n\n* two\n"
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read(path) == [("one\n\n* two\n", ":1")]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text\n1,"one, and\nmore"\n\n2,12\n'.encode() + b"3," + b"x" * 200_000 + b"\n")
    assert read(path) == [("one, and\nmore", ":2"), ("12", ":5"), ("x" * 200_000, ":6")]
    path.write_text("q,a\nwhy,so\n")
    (piece,) = find_sources(path)[0].pieces(Fields(prompt="q", completion="a"))
    assert (piece.prompt, piece.text) == ("why", "so")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"id,body\n1,x\n", r"a\.csv:1: no field 'text' .*; found: body, id"),
        (b"id,text\n1,x\n2\n", r"a\.csv:3: 1 fields, but the first row names 2"),
        (b'text\n"x"y\n', r"a\.csv:2: not valid CSV"),
        (b'text\nfine\n"open\n', r"a\.csv:3: not valid CSV"),
        (b"text\nfine\n\xff\n", r"a\.csv:3: not UTF-8 text \(byte 0xff\)"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', [("a", ": record 1"), ("b", ": record 2")]),
        ('{\n "text": "a"\n}', [("a", ": record 1")]),
        ('{"text": "a"}\n\n{"text": "b"}\n', [("a", ": record 1"), ("b", ": record 2")]),
        ("[]", []),
    ],
)
def test_json(tmp_path: Path, text: str, expected: list[tuple[str, str]]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', r"a\.json:2: not valid JSON"),
        ('[{"text": "a"}, 3]', r"a\.json: record 2: a int, not an object"),
        ('{"data": []}', r"a\.json: record 1: no field 'text'"),
        ('{"text": "a"}\n{"text"\n', r"a\.json:2: not valid JSON"),
        ("[" * 100_000, r"a\.json: not valid JSON: RecursionError"),
    ],
)
def test_json_errors_name_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_packed_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    path.write_bytes(gzip.compress(lines))
    assert read(path) == [("a", ":1"), ("b", ":2")]
    whole = gzip.compress(os.urandom(1000).hex().encode() + lines)
    damaged = bytearray(whole)
    damaged[-20] ^= 1
    for raw in (whole[:-9], b"no gzip at all", bytes(damaged)):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz(:1)?: not"):
            read(path)


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "number": [1, 2]})
    datasets.disable_progress_bars()
    table.save_to_disk(str(tmp_path / "data" / "saved"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "data" / "a.txt").write_text("x")
    assert read(tmp_path / "data" / "saved") == [("one", ": row 1"), ("two", ": row 2")]
    assert [source.kind for source in find_sources(tmp_path / "data")] == ["text", "arrow"]
    assert [source.name for source in find_sources(tmp_path / "splits")] == [
        str(tmp_path / "splits" / "train")
    ]
    kept = find_sources(tmp_path / "data" / "saved")[0].content_hash()
    assert kept == find_sources(tmp_path / "splits" / "train")[0].content_hash() != ""
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "test-only"))
    with pytest.raises(DataError, match="has no split train; name one of its folders: test"):
        find_sources(tmp_path / "test-only")
    with pytest.raises(DataError, match=r"saved: no field 'body'"):
        read(tmp_path / "data" / "saved", Fields(text="body"))
    next((tmp_path / "data" / "saved").glob("*.arrow")).write_bytes(b"no table")
    with pytest.raises(DataError, match="saved: the saved dataset cannot be loaded") as caught:
        read(tmp_path / "data" / "saved")
    assert "\n" not in str(caught.value)


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_what_is_skipped_is_counted_by_kind(tmp_path: Path) -> None:
    names = ("a.txt", "b.png", "sub/c.PNG", "d.tar.gz", "LICENSE", ".hidden", "sub/.git/e.txt", "alone.bin")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.txt")
    skipped: Counter[str] = Counter()
    assert [source.path for source in find_sources(tmp_path, skipped)] == [tmp_path / "a.txt"]
    assert skipped - Counter({"not a file": 1}) == Counter(
        {".png": 2, "hidden": 2, ".tar.gz": 1, "of no kind": 1, ".bin": 1}
    )
    (note,) = load_tokens(tmp_path, Bytes(), cache_dir=tmp_path / "cache").notes
    assert note.startswith("skipped ") and "2 .png" in note and "2 hidden" in note
    assert describe_skipped(Counter({f".{n}": 1 for n in range(12)})).endswith(".7, 4 more kinds")


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("x")
    with pytest.raises(
        DataError, match=r"nothing that can be read in this folder; it holds 3 files: 3 \.png; give"
    ):
        find_sources(tmp_path)
    assert json.dumps(describe_skipped(Counter({".png": 3}))) == '"3 files: 3 .png"'
    assert describe_skipped(Counter({".png": 1})) == "1 file: 1 .png"
    many = Counter({f".{n}": 10 - n for n in range(9)})
    assert describe_skipped(many).endswith("3 .7, 1 more kind")


def close(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As a folder of mode 0 is to who is not root: it is there, and nothing is told of what it holds."""
    stat, scandir = Path.stat, os.scandir

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    def stat_or_not(path: Path, **how: Any) -> Any:
        return refuse(path) if folder in path.parents else stat(path, **how)

    monkeypatch.setattr(Path, "stat", stat_or_not)
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if Path(path) == folder else scandir(path))


def test_closed_folders_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).write_text("text")
    close(monkeypatch, tmp_path / "closed")
    skipped: Counter[str] = Counter()
    (found,) = find_sources(tmp_path, skipped)
    assert found.path == tmp_path / "a.txt" and skipped == {"folders that cannot be read": 1}


@pytest.mark.parametrize("inner", ["", "b.txt", "*.txt"])
def test_what_is_named_and_closed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("text")
    close(monkeypatch, tmp_path / "closed")
    with pytest.raises(DataError, match=r"cannot be looked at: Permission denied|no file matches"):
        find_sources(tmp_path / "closed" / inner)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder of Linux")
def test_files_that_the_system_makes_up() -> None:
    with pytest.raises(DataError, match="/proc/self: nothing that can be read in this folder"):
        find_sources("/proc/self")
