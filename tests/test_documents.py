"""Finding and reading documents."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_rev.errors import DataError
from rwkv_rev.training import documents
from rwkv_rev.training.documents import DataSource, Fields
from rwkv_rev.training.sources import find_sources


def read(path: Path, fields: Fields | None = None) -> list[documents.Piece]:
    (source,) = find_sources(path)
    return list(source.pieces(fields))


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_txt_is_one_document_untouched(tmp_path: Path) -> None:
    text = "one\r\ntwo\n\n  three, ünï 漢\n"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (piece,) = read(path)
    assert (piece.text, piece.prompt, piece.where) == (text, None, f"{path}:1")


@pytest.mark.parametrize(
    "text", ["line\n" * 40, "line\n  more\n" * 40, "漢字" * 60, "x" * 200, "a\n\n\n" * 60]
)
def test_long_txt_comes_in_pieces_that_join_to_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = read(path)
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    for before, piece in pairwise(pieces):
        assert piece.line == before.line + before.text.count("\n")
    if "  more" in text:
        assert all(piece.text.startswith("line") for piece in pieces)


def test_txt_that_is_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nfine\nbroken \xff here\n")
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8 text \(byte 0xff\)"):
        read(path)


def test_jsonl_fields(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"prompt": "two", "completion": "three"})
    assert [(piece.prompt, piece.text, piece.line) for piece in read(path)] == [
        (None, "one", 1),
        ("two", "three", 2),
    ]
    path = write_jsonl(tmp_path / "b.jsonl", {"body": "x", "q": "why", "a": "so"})
    assert read(path, Fields(text="body"))[0].text == "x"
    assert read(path, Fields(prompt="q", completion="a"))[0].prompt == "why"


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": "b"}', "utf-8")
    assert [piece.line for piece in read(path)] == [2, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("[1]", "a list, not an object"),
        ('{"body": "a"}', "no field 'text' .*found: body"),
        ('{"text": 3}', "field 'text' is a int, not a string"),
        ('{"text": null}', "field 'text' is null"),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "has both 'text' and"),
        ('{"text": "\xff"}', "not valid JSON"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_fields_refuse_halves() -> None:
    with pytest.raises(DataError, match="name both"):
        Fields(prompt="q")
    with pytest.raises(DataError, match="not both"):
        Fields(text="t", prompt="q", completion="a")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "number": [1, 2]}), path)
    assert [(piece.text, piece.where) for piece in read(path)] == [
        ("one", f"{path}: row 1"),
        ("two", f"{path}: row 2"),
    ]
    with pytest.raises(DataError, match=r"a\.parquet: no field 'body'; found: number, text"):
        read(path, Fields(text="body"))
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(DataError, match="row 2: field 'text' is null"):
        read(path)
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable \.parquet file"):
        read(path)


def test_directories_and_globs_are_sorted_and_skip_the_rest(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.txt",
        "sub/c.jsonl",
        ".hidden/d.txt",
        "notes.pdf",
        "model.bin",
        "p.bin",
        "p.idx",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [Path(source.name).relative_to(tmp_path).as_posix() for source in find_sources(tmp_path)]
    assert names == ["a.txt", "b.txt", "p.idx", "sub/c.jsonl"]
    found = find_sources([tmp_path / "*.txt", str(tmp_path / "**" / "*.jsonl")])
    assert [Path(source.name).name for source in found] == ["a.txt", "b.txt", "c.jsonl"]
    assert [source.kind for source in find_sources(tmp_path / "p")] == ["binidx"]
    assert find_sources(tmp_path / "p.bin") == find_sources(tmp_path / "p.idx")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("./some/thing", "no such file or folder"),
        ("no*.txt", "no file matches"),
        ("hf:a b", "not a dataset id"),
        ("notes.pdf", "cannot tell what '.pdf' holds"),
        ("alone.bin", "alone.idx: missing"),
        ("empty", "nothing that can be read in this folder; give .txt"),
        ([], "no data given"),
    ],
)
def test_what_cannot_be_found_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str | list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "alone.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=message) as caught:
        find_sources(data)
    assert "\n" not in str(caught.value)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Table(list):
        column_names = ("text",)
        _fingerprint = "f00d"

    def load_dataset(path: str, name: str | None, *, split: str) -> Table:
        calls.append((path, name, split))
        if path == "owner/broken":
            raise ConnectionError("no\nroute")
        return Table([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    names = [
        "hf:owner/name",
        "hf:owner/name/config:test",
        "hf:owner/name:train[:10%]",
        "hf:plain",
        "owner/name",
    ]
    sources = find_sources(names)
    assert [source.kind for source in sources] == ["hub"] * 5
    assert not calls, "finding must not download"
    pieces = [list(source.pieces()) for source in sources]
    assert [piece.where for piece in pieces[0]] == ["hf:owner/name: row 1", "hf:owner/name: row 2"]
    assert calls == [
        ("owner/name", None, "train"),
        ("owner/name", "config", "test"),
        ("owner/name", None, "train[:10%]"),
        ("plain", None, "train"),
        ("owner/name", None, "train"),
    ]
    assert sources[0].content_hash() == "hub:f00d"
    with pytest.raises(
        DataError, match=r"owner/broken: no such file or folder, and the dataset .*: no route"
    ):
        list(find_sources("owner/broken")[0].pieces())


def test_content_hash_ignores_names(tmp_path: Path) -> None:
    hashes = []
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(text)
        hashes.append(DataSource("text", name, tmp_path / name).content_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_two_columns_of_one_name_and_half_a_character_are_refused(tmp_path: Path) -> None:
    table, record = tmp_path / "a.csv", tmp_path / "b.jsonl"
    table.write_text("text,text\none,two\n")
    with pytest.raises(DataError, match=r"a\.csv:1: two fields of one record are called 'text'; rename"):
        list(DataSource("csv", "a.csv", table).pieces())
    record.write_text('{"text": "whole"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: field 'text' holds half a surrogate pair, no text"):
        list(DataSource("jsonl", "b.jsonl", record).pieces())


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "id": 1, "text": "b"}\n', "a.jsonl:2"),
        ("a.jsonl", '{"text": "a", "more": [{"text": 1, "text": 1}]}\n', "a.jsonl:1"),
        ("a.json", '[{"text": "a", "text": "b"}]', "a.json"),
        ("a.json", '{"text": "a"}\n{"text": "a", "text": "b"}\n', "a.json"),
        ("a.csv", "text,id,text\na,1,b\n", "a.csv:1"),
    ],
)
def test_two_values_of_one_name(tmp_path: Path, name: str, text: str, place: str) -> None:
    """Which one counts is not for a reader to choose."""
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{place}.*: two fields of one record are called 'text'; rename or"):
        read(tmp_path / name)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: two fields of one record are called 'text'; rename or remove"
    ):
        read(tmp_path / "a.parquet")
