"""A wrong path is told of before anything heavy is imported."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_rev.training.lora_targets import refuse_early

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


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("query", "no linear map is called 'query'; there are"),
        ("key,head", "its embedding (tie_word_embeddings)"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_wrong_targets_are_told_of_at_once(
    bundled: dict[str, Path], tmp_path: Path, targets: str, message: str, sharded: bool
) -> None:
    """By the headers of the files of weights."""
    model = tmp_path / "model"
    shutil.copytree(bundled["5.2"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": "head" in targets}))
    if sharded:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"head.weight": "model-00001-of-00001.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "x.txt").write_text("text")
    words = [
        "finetune",
        "model",
        "--data",
        "x.txt",
        "--output",
        "y",
        "--tune",
        "lora",
        "--lora-targets",
        targets,
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.splitlines()[1:] == ["HEAVY"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff" * 20, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}", b"\x04" + bytes(7) + b"{}}}"],
)
def test_damaged_weights_are_told_of_where_they_are_loaded(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    refuse_early(tmp_path, ["key"])
    (tmp_path / "model.safetensors").write_bytes(damage)
    refuse_early(tmp_path, ["key"])
