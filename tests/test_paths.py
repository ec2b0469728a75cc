"""A wrong path is told of before anything heavy is imported."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys
from rwkv_rev.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "datasets"} & sys.modules.keys()
    print("HEAVY", *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "./absent.pth"], "absent.pth does not exist"),
        (["inspect", "./absent.pth"], "absent.pth does not exist"),
        (["verify", "absent"], "absent is not a folder"),
        (["generate", "absent", "--prompt", "x"], "absent is not a folder"),
        (["export", "absent", "--output", "x.pth"], "absent is not a folder"),
        (["eval", "absent", "--data", "x.txt"], "absent is not a folder"),
        (["eval", "model", "--data", "absent.txt"], "absent.txt: no such file or folder"),
        (["finetune", "absent", "--data", "x.txt", "--output", "y"], "absent is not a folder"),
        (
            ["finetune", "model", "--data", "absent.txt", "--output", "y"],
            "absent.txt: no such file or folder",
        ),
        (
            ["finetune", "model", "--data", "x.txt", "--output", "y", "--seed", "-1"],
            "seed = -1 must be at least 0",
        ),
        (["verify", "empty"], "empty is not a converted model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_paths_are_told_of_at_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "rwkv_rev"}')
    (tmp_path / "empty").mkdir()
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    lines = done.stderr.splitlines()
    assert done.returncode not in (0, None)
    assert lines[0].startswith("error: ") and message in lines[0], done.stderr
    assert lines[1:] == ["HEAVY"], "nothing heavy, and one line"
    assert seconds < 5, "half a second on an idle machine"
