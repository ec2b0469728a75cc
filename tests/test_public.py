"""The commands as functions: names, and what they refuse in one line."""

import dataclasses
import errno
import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import environment
from processes import start_command

import rwkv_rev
from rwkv_rev.cli import COMMANDS, main
from rwkv_rev.errors import ConfigError, RwkvRevError
from rwkv_rev.training.config import FinetuneConfig

OTHER_NAMES = {
    "eval": ("evaluate",),
    "state": ("save_state", "load_state", "merge_states"),
    "adapter": ("save_adapter",),
}
FUNCTIONS = [function for name, _ in COMMANDS for function in OTHER_NAMES.get(name, (name,))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_command_is_a_function(name: str) -> None:
    """And its help explains every argument, as docs/python.md says: by name, with its default, and nothing that only
    this process knows."""
    function = getattr(rwkv_rev, name)
    assert callable(function)
    text = pydoc.plain(pydoc.render_doc(function))
    assert " at 0x" not in text and "**" not in text.split("\n")[2]
    explained = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b[^:\n]*: ", explained), parameter


def test_help_of_finetune_has_every_setting() -> None:
    parameters = inspect.signature(rwkv_rev.finetune).parameters
    for item in dataclasses.fields(FinetuneConfig):
        assert item.name in parameters
        if item.name not in ("model", "data", "output"):
            assert parameters[item.name].default == getattr(FinetuneConfig(), item.name)
    with pytest.raises(ConfigError, match="did you mean lr"):
        rwkv_rev.finetune("m", "d", "o", lerning_rate=1)  # type: ignore[call-arg]


def test_errors_are_public() -> None:
    for name in rwkv_rev._ERRORS:
        assert issubclass(getattr(rwkv_rev, name), RwkvRevError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, "temperature = -1 must be 0, or"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1e-320}, "must be 0, or a finite number of at least 0.01"),
        ({"top_p": 2}, "top_p = 2 must be from 0 to 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens = True"),
        ({"seed": 2**70}, "seed is a number of more than 63 bits"),
        ({"prompt": ["a", "b"]}, "prompt = .* must be a text"),
    ],
)
def test_generate_refuses(bundled: dict[str, Path], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rwkv_rev.generate(bundled["4"], **{"prompt": "a"} | given)


def test_generate_takes_whole_numbers(bundled: dict[str, Path]) -> None:
    """As a temperature, which transformers would have a float."""
    assert rwkv_rev.generate(bundled["4"], "a", temperature=2, max_new_tokens=1).startswith("a")


def test_no_text_can_be_made_on_meta(bundled: dict[str, Path]) -> None:
    with pytest.raises(RwkvRevError, match="device = 'meta' is not known; use auto, cpu"):
        rwkv_rev.generate(bundled["4"], "a", device="meta")


@pytest.mark.parametrize("given", [{"tokens": 0}, {"chunk": 0}, {"context": -1}, {"oracle": "foo"}])
def test_verify_refuses(bundled: dict[str, Path], given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        rwkv_rev.verify(bundled["4"], **given)


@pytest.mark.parametrize("eps", [float("nan"), -1.0, 0, "x", True])
def test_convert_refuses(tmp_path: Path, eps: Any) -> None:
    with pytest.raises(ConfigError, match=r"group_norm_eps = .* must be a number"):
        rwkv_rev.convert("bundled:rwkv-5.2", tmp_path / "out", group_norm_eps=eps)
    with pytest.raises(ConfigError, match="output = '' must name something"):
        rwkv_rev.convert("bundled:rwkv-5.2", "")


def test_evaluate_takes_one_file(bundled: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a text of some length " * 5)
    assert rwkv_rev.evaluate(bundled["4"], str(path), context_length=64).total.tokens > 50
    assert rwkv_rev.evaluate(bundled["4"], path).total.tokens > 50
    for length in ("16k", 64.0, float("nan"), 1):
        with pytest.raises(ConfigError, match="context_length = "):
            rwkv_rev.evaluate(bundled["4"], path, context_length=length)


def test_export_stays_out_of_the_model(bundled: dict[str, Path]) -> None:
    with pytest.raises(RwkvRevError, match="is inside the model's folder"):
        rwkv_rev.export(bundled["4"], bundled["4"] / "x.pth")


def test_a_full_disk_is_not_told_of_as_the_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in (
        (None, "a file cannot be written: No space left on device; make room on its disk"),
        ("plot.png", "plot.png cannot be written: No space left on device; make room on its disk"),
    ):

        def fails(*_: object, named: str | None = name, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)

        monkeypatch.setattr("rwkv_rev.converters.inspection.inspect_source", fails)
        with pytest.raises(SystemExit) as left:
            main(["inspect", "bundled:rwkv-4"])
        assert left.value.code == 1
        assert capsys.readouterr().err == f"error: {told}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full_or_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rwkv_rev.cli", "--version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write to the standard output: No space left on device\n"
    (tmp_path / "a.out").symlink_to("/dev/full")
    process = start_command(["inspect", "bundled:rwkv-4"], tmp_path / "a", environment())
    process.join()
    told = (tmp_path / "a.err").read_text("utf-8")
    assert (process.exitcode, told.count("\n")) == (1, 1)
    assert told.startswith("error: cannot write to the standard output: No space")
    closed = subprocess.run(command, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (0, b"")
