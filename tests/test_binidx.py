"""RWKV's binidx pairs, written here byte by byte from the description of the format."""

import struct
from pathlib import Path

import numpy as np
import pytest

from rwkv_rev.errors import DataError
from rwkv_rev.training.binidx import DTYPES, read_index
from rwkv_rev.training.token_cache import load_tokens


def write_pair(
    path: Path,
    sequences: list[list[int]],
    document_index: list[int] | None = None,
    code: int = 8,
    **change: object,
) -> Path:
    """Write ``path``.bin and .idx; ``change`` replaces a part of the index by other bytes or values."""
    dtype = np.dtype(DTYPES.get(code, "<f4"))
    lengths = [len(sequence) for sequence in sequences]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": struct.pack("<Q", 1),
        "code": struct.pack("<B", code),
        "lengths": np.array(lengths, "<i4").tobytes(),
        "pointers": np.array(borders[:-1] * dtype.itemsize, "<i8").tobytes(),
        "documents": np.array(
            list(range(len(sequences) + 1)) if document_index is None else document_index, "<i8"
        ).tobytes(),
        **change,
    }
    entries = len(parts["documents"]) // 8
    counts = struct.pack("<QQ", len(sequences), entries)
    header = parts["magic"] + parts["version"] + parts["code"] + counts
    path.with_suffix(".idx").write_bytes(header + parts["lengths"] + parts["pointers"] + parts["documents"])
    path.with_suffix(".bin").write_bytes(np.array([i for s in sequences for i in s], dtype).tobytes())
    return path.with_suffix(".idx")


@pytest.mark.parametrize("code", DTYPES)
def test_reads_every_integer_type(tmp_path: Path, code: int) -> None:
    sequences = [[1, 2, 3], [100], [4, 0]]
    write_pair(tmp_path / "data", sequences, code=code)
    store = load_tokens(tmp_path / "data")
    assert [store.tokens(i).tolist() for i in range(len(store))] == sequences
    assert store.tokens(0, 1, 9).tolist() == [2, 3]
    assert store.place(1) == f"{tmp_path / 'data.idx'}: document 2"
    assert store.prompt_lengths().tolist() == [0, 0, 0]
    assert store.cache is None


def test_documents_of_several_sequences_and_without_index(tmp_path: Path) -> None:
    sequences = [[1, 2], [3], [4, 5, 6]]
    store = load_tokens(write_pair(tmp_path / "a", sequences, [0, 2, 3]))
    assert [store.tokens(i).tolist() for i in range(2)] == [[1, 2, 3], [4, 5, 6]]
    store = load_tokens(write_pair(tmp_path / "b", sequences, []))
    assert store.lengths().tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"MMIDIDX\x00\x01"}, "not a binidx index"),
        ({"version": struct.pack("<Q", 2)}, "version 2"),
        ({"code": 6}, "code 6 is not an integer"),
        ({"lengths": b""}, "truncated"),
        ({"pointers": np.array([0, 8], "<i8").tobytes()}, "do not lie one after another"),
        ({"document_index": [0, 1]}, "does not cover its 2 sequences"),
    ],
)
def test_damage_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_index(write_pair(tmp_path / "data", [[1, 2], [3, 4]], **change))


def test_short_bin_and_empty_pair(tmp_path: Path) -> None:
    path = write_pair(tmp_path / "data", [[1, 2], [3, 4]])
    path.with_suffix(".bin").write_bytes(b"\0" * 6)
    with pytest.raises(DataError, match=r"data\.bin: 6 bytes, but its index announces 8"):
        read_index(path)
    with pytest.raises(DataError, match="holds no sequences"):
        read_index(write_pair(tmp_path / "empty", []))
