"""Sizes, plans and the bytes of safetensors files."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwkv_rev.converters.rewriter import PIECE, Entry, parse_size, shard_layout, write_shards
from rwkv_rev.errors import OutputError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("512MiB", 2**29),
        ("1.5kb", 1500),
        (" 7 ", 7),
        (42, 42),
        ("2T", 2 * 10**12),
    ],
)
def test_parse_size(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five", "5XB", "1e9", "0.1B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(OutputError, match="is not a size"):
        parse_size(text)


def entries(*sizes: int) -> list[Entry]:
    return [Entry(f"t{i}", f"t{i}", (size,), torch.float16) for i, size in enumerate(sizes)]


def test_plan_keeps_order_and_limit() -> None:
    shards = shard_layout(entries(3, 2, 9, 1, 1, 1), 10)  # two bytes each
    assert [[e.name for e in s.entries] for s in shards] == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]
    assert [s.nbytes for s in shards] == [10, 18, 6]
    assert shards[0].filename == "model-00001-of-00003.safetensors"
    assert [s.filename for s in shard_layout(entries(1, 2), "1GB")] == ["model.safetensors"]


def test_a_tensor_longer_than_a_piece(tmp_path: Path) -> None:
    big = torch.randn(PIECE + 17)
    counted: list[int] = []
    write_shards(
        shard_layout([Entry("big", "x", (1, PIECE + 17), torch.bfloat16)], "5GB"),
        tmp_path,
        lambda entry: {"x": big}[entry.source],
        counted.append,
    )
    assert torch.equal(load_file(tmp_path / "model.safetensors")["big"], big.bfloat16()[None])
    assert sum(counted) == 2 * math.prod(big.shape)
    assert len(counted) == 2
