"""The benchmark of sharded models, over two processes on the CPU."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from processes import in_ranks

from rwkv_rev.benchmark.model_sharding import main
from rwkv_rev.benchmark.models import SHAPES

pytestmark = pytest.mark.dist

WORDS = "--context-length 16 --chunk-length 16,8 --steps 1 --device cpu --compute float32 --weights float32"


def work(rank: int) -> list[dict[str, Any]]:
    SHAPES["5.2-15m"] |= {"layers": 2, "width": 128}  # in this process
    with contextlib.redirect_stdout(io.StringIO()) as written:
        main(["--shape", "5.2-15m", *WORDS.split()])
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_row_for_each_chunk_length(tmp_path: Path) -> None:
    rows, others = in_ranks(work, 2, tmp_path)
    assert others == []
    assert [row["chunk_length"] for row in rows] == [16, 8]
    assert all(row["processes"] == 2 and row["tokens_per_second"] > 0 for row in rows)
    assert all(4 < loss < 8 for row in rows for loss in row["losses"])  # ln 256 = 5.5
