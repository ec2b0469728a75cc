"""The benchmark of several processes, each of its runs in this process on the CPU."""

import contextlib
import io
import json
import subprocess
from typing import Any

import pytest

from rwkv_rev.benchmark.models import SHAPES
from rwkv_rev.benchmark.several_gpus import main
from rwkv_rev.cli import main as run_command


def test_a_row_for_each_number_of_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        place = command.index("rwkv_rev.cli")
        started.append(command[:place])
        words = [word for word in command[place + 1 :] if word != "--shard-optimizer"]
        with contextlib.redirect_stdout(io.StringIO()) as written, pytest.raises(SystemExit) as left:
            run_command(words)
        return subprocess.CompletedProcess(command, int(str(left.value)), written.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.setitem(SHAPES, "small", {"rwkv_version": "5.2", "layers": 2, "width": 64, "vocab": 256})
    words = "--shape small --processes 1,2 --context-length 32 --chunk-length 16 --steps 3 --tune lora --device cpu"
    main(words.split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["processes"], row["sharded_optimizer"]) for row in rows] == [
        (1, False),
        (2, False),
        (2, True),
    ]
    assert [command[-2] for command in started] == ["1", "2", "2"]
    assert all(row["tokens_per_second"] > 0 and row["last_loss"] > 0 for row in rows)
