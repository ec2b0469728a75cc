"""A wrong path is told of before anything heavy is imported."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from rwkv_rev.training.lora_targets import refuse_early

IN_CHILDREN = """
import contextlib, io, json, os, sys, time
from rwkv_rev.cli import main
for arguments in json.loads(sys.argv[1]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    began, code = time.perf_counter(), None
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    heavy = sorted({"torch", "transformers", "datasets"} & sys.modules.keys())
    print(json.dumps([code, told.getvalue(), heavy, time.perf_counter() - began]), flush=True)
    os._exit(0)
"""


def told(folder: Path, cases: list[list[str]]) -> list[tuple[int, str, list[str], float]]:
    """Of each command line, in a process of its own: exit code, errors, what heavy it imported, seconds."""
    done = subprocess.run(
        [sys.executable, "-c", IN_CHILDREN, json.dumps(cases)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


WRONG_PATHS = [
    (["convert", "./absent.pth"], "absent.pth does not exist"),
    (["inspect", "./absent.pth"], "absent.pth does not exist"),
    (["verify", "absent"], "absent is not a folder"),
    (["generate", "absent", "--prompt", "x"], "absent is not a folder"),
    (["export", "absent", "--output", "x.pth"], "absent is not a folder"),
    (["eval", "absent", "--data", "x.txt"], "absent is not a folder"),
    (["eval", "model", "--data", "absent.txt"], "absent.txt: no such file or folder"),
    (["finetune", "absent", "--data", "x.txt", "--output", "y"], "absent is not a folder"),
    (["finetune", "model", "--data", "absent.txt", "--output", "y"], "absent.txt: no such file or folder"),
    (
        ["finetune", "model", "--data", "x.txt", "--output", "y", "--seed", "-1"],
        "seed = -1 must be at least 0",
    ),
    (["verify", "empty"], "empty is not a converted model"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one interpreter is forked for each command")
def test_wrong_paths_are_told_of_at_once(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "rwkv_rev"}')
    (tmp_path / "empty").mkdir()
    found = told(tmp_path, [arguments for arguments, _ in WRONG_PATHS])
    wrong = [
        (arguments, code, err, heavy, seconds)
        for (arguments, message), (code, err, heavy, seconds) in zip(WRONG_PATHS, found, strict=True)
        if code in (0, None) or heavy or err.count("\n") != 1 or seconds > 5
        or not (err.startswith("error: ") and message in err)
    ]  # fmt: skip
    assert wrong == [], "one line, nothing heavy, and half a second on an idle machine"


WRONG_TARGETS = [
    ("query", "no linear map is called 'query'; there are"),
    ("key,head", "its embedding (tie_word_embeddings)"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one interpreter is forked for each command")
def test_wrong_targets_are_told_of_at_once(bundled: dict[str, Path], tmp_path: Path) -> None:
    """By the headers of the files of weights."""
    (tmp_path / "x.txt").write_text("text")
    cases, expected = [], []
    for sharded, (targets, message) in product([False, True], WRONG_TARGETS):
        model = tmp_path / f"{targets}-{sharded}"
        shutil.copytree(bundled["5.2"], model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": "head" in targets}))
        if sharded:
            (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
            index = {"weight_map": {"head.weight": "model-00001-of-00001.safetensors"}}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
        more = ["--data", "x.txt", "--output", "y", "--tune", "lora", "--lora-targets", targets]
        cases.append(["finetune", model.name, *more])
        expected.append(message)
    for case, message, (code, err, heavy, _) in zip(cases, expected, told(tmp_path, cases), strict=True):
        assert (code, heavy, err.count("\n")) == (1, [], 1) and message in err, (case, err)


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff" * 20, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}", b"\x04" + bytes(7) + b"{}}}"],
)
def test_damaged_weights_are_told_of_where_they_are_loaded(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    refuse_early(tmp_path, ["key"])
    (tmp_path / "model.safetensors").write_bytes(damage)
    refuse_early(tmp_path, ["key"])
