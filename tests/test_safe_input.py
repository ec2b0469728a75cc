"""Inputs that never end, never answer, or claim what cannot be: one line in seconds, and nothing written."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import blinkdl_state_dict, hf_config, hf_state_dict
from pairwise import every_two
from safetensors.torch import save_file
from tables import failing

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import CheckpointError, ConfigError, SourceError
from rwkv_rev.folders.safe_input import read_object, refuse_special
from rwkv_rev.training.config import build_config

Cli = Callable[..., tuple[int, str, str]]
COMMANDS = {  # of a model folder
    "inspect": ("inspect", "model"),
    "verify": ("verify", "model", "--tokens", "4"),
    "export": ("export", "model", "--output", "out.pth"),
    "generate": ("generate", "model", "--prompt", "a", "--max-new-tokens", "1"),
    "chat": ("chat", "model"),
    "eval": ("eval", "model", "--data", "text.txt", "--cache-dir", "cache"),
    "finetune": ("finetune", "model", "--data", "text.txt", "--output", "out", "--cache-dir", "cache"),
}


@pytest.fixture(autouse=True)
def in_ten_seconds() -> Iterator[None]:
    """A command that waits is let go, and the test fails."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10


@pytest.fixture
def folder(tmp_path: Path, bundled: dict[str, Path]) -> Path:
    """A converted model and a text, in the folder where commands run."""
    shutil.copytree(bundled["5.2"], tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text " * 20)
    return tmp_path


def refused(cli: Cli, folder: Path, *arguments: str) -> str:
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}
    code, out, err = cli(*arguments)
    assert (out, err.count("\n")) == ("", 1), err
    assert code in (1, 2)
    assert err.startswith("error: ") and "unexpected" not in err
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()} == before
    return err


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- what is no file ------------------------------------------------------------------------------------------------


@pytest.fixture
def fifo() -> Iterator[Callable[[Path], None]]:
    """Makes FIFOs; at the end somebody writes to each, so that whoever waits there goes on."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    made: list[Path] = []

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        made.append(path)

    timer = threading.Timer(8, lambda: [os.close(os.open(path, os.O_RDWR)) for path in made])
    timer.start()
    yield make
    timer.cancel()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_fifo_in_a_model_folder(
    cli: Cli, folder: Path, fifo: Callable[[Path], None], name: str, command: str
) -> None:
    fifo(folder / "model" / name)
    assert f"{name} is a FIFO, not a regular file" in refused(cli, folder, *COMMANDS[command])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "m.pth", "generation_config.json"])
def test_a_fifo_in_a_source(cli: Cli, tmp_path: Path, fifo: Callable[[Path], None], name: str) -> None:
    (tmp_path / "source").mkdir()
    torch.save(hf_state_dict("4"), tmp_path / "source" / "pytorch_model.bin")
    fifo(tmp_path / "source" / name)
    for arguments in (("convert", "source", "--output", "out"), ("inspect", "source")):
        assert f"{name} is a FIFO" in refused(cli, tmp_path, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "pipe", "--output", "out"),
        ("inspect", "pipe"),
        ("verify", "model", "--original", "pipe"),
        ("verify", "model", "--text", "pipe"),
        ("eval", "model", "--data", "pipe"),
        ("finetune", "model", "--data", "pipe", "--output", "out"),
        ("finetune", "model", "--data", "text.txt", "--eval-data", "pipe", "--output", "out"),
        ("finetune", "--config", "pipe"),
        ("convert", "bundled:rwkv-4", "--tokenizer", "pipe", "--output", "out"),
        ("bench", "memory", "--rows", "pipe"),
    ],
    ids=" ".join,
)
def test_a_fifo_as_an_argument(
    cli: Cli, folder: Path, fifo: Callable[[Path], None], arguments: tuple[str, ...]
) -> None:
    fifo(folder / "pipe")
    assert "pipe is a FIFO, not a regular file" in refused(cli, folder, *arguments)


def test_devices_sockets_and_links_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.json")
        with pytest.raises(SourceError, match=r"socket\.json is a socket"):
            read_object(Path("socket.json"))
    with pytest.raises(SourceError, match=r"endless\.json is a device"):
        read_object(Path("endless.json"))
    refuse_special(tmp_path)
    refuse_special(tmp_path / "absent")
    assert read_object(tmp_path / "absent") == {}


# --- what no model is ------------------------------------------------------------------------------------------------

IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**12},
    "no layers": {"num_hidden_layers": 0},
    "layers, fewer tensors": {"num_hidden_layers": 9000},
    "labels": {"num_labels": 10**12},
    "vocabulary": {"vocab_size": 0},
    "vocabulary, huge": {"vocab_size": 10**300},
    "nan": {"layer_norm_epsilon": float("nan")},
    "infinite": {"group_norm_epsilon": float("inf")},
    "negative": {"group_norm_epsilon": -1.0},
    "text": {"layer_norm_epsilon": "1e-5"},
    "dtype": {"dtype": "load"},
    "no dtype": {"dtype": "none of these"},
    "version": {"rwkv_version": "9"},
    "property": {"architecture": "\x1b[2J"},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_configurations(cli: Cli, folder: Path, what: str) -> None:
    change(folder / "model" / "config.json", **IMPOSSIBLE[what])

    def check(command: str) -> None:
        line = refused(cli, folder, *COMMANDS[command])
        assert "model" in line and "\x1b" not in line

    assert failing(check, ((command,) for command in COMMANDS)) == {}


@pytest.mark.parametrize(
    "what", ["layers", "no layers", "labels", "vocabulary", "vocabulary, huge", "nan", "infinite", "negative"]
)
def test_impossible_configurations_in_python(what: str) -> None:
    (name,) = IMPOSSIBLE[what]
    with pytest.raises(ValueError, match=f"{name} = .* must be"):
        RwkvRevConfig(**IMPOSSIBLE[what])


NO_OBJECTS = ('{"a":' * 10_000, "[1, 2]", "", "\xff", '{"a": 1' + "0" * 5000 + "}")
FILES = ("config.json", "conversion.json", "model.safetensors.index.json")


@pytest.mark.parametrize(("command", "text", "name"), every_two(COMMANDS, NO_OBJECTS, FILES))
def test_json_that_is_none(cli: Cli, folder: Path, name: str, text: str, command: str) -> None:
    if "index" in name:
        (folder / "model" / "model.safetensors").rename(folder / "model" / "model-00001-of-00001.safetensors")
    (folder / "model" / name).write_bytes(text.encode("latin-1"))
    assert name in refused(cli, folder, *COMMANDS[command])


def test_json_without_end(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(CheckpointError, match=r"is no configuration: 3,221 MB"):
        read_object(tmp_path / "config.json")


@pytest.mark.parametrize("key", ["source", "file", "unusual_shapes", "finetuned", "group_norm_eps"])
def test_a_damaged_record(cli: Cli, folder: Path, key: str) -> None:
    change(
        folder / "model" / "conversion.json",
        **{key: True if key == "source" else "x" if key != "file" else 3},
    )
    for command in ("verify", "export"):
        assert f"conversion.json is damaged: {key} = " in refused(cli, folder, *COMMANDS[command])


@pytest.mark.parametrize("shape", [[-1, -64], "D", [1e3], [2**70]])
def test_damaged_shapes_in_a_record(cli: Cli, folder: Path, shape: object) -> None:
    change(folder / "model" / "conversion.json", unusual_shapes={"blocks.0.att.time_mix_k": shape})
    assert "conversion.json is damaged: unusual_shapes" in refused(cli, folder, *COMMANDS["export"])


@pytest.mark.parametrize(
    "config",
    [
        {"layer_norm_epsilon": float("nan")},
        {"layer_norm_epsilon": float("inf")},
        {"head_size_divisor": 1e200},
        {"num_hidden_layers": 10**12},
    ],
    ids=str,
)
def test_impossible_configurations_of_sources(cli: Cli, tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "source").mkdir()
    save_file(hf_state_dict("5.2", vocab=256), tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(hf_config("5.2", vocab=256) | config))
    for arguments in (("convert", "source", "--output", "out"), ("inspect", "source")):
        assert next(iter(config)) in refused(cli, tmp_path, *arguments)


def test_vocabularies_without_rows(cli: Cli, tmp_path: Path) -> None:
    state = blinkdl_state_dict("5.2")
    state |= {"emb.weight": torch.zeros(0, 32), "head.weight": torch.zeros(0, 32)}
    torch.save(state, tmp_path / "none.pth")
    for arguments in (("convert", "none.pth", "--output", "out"), ("inspect", "none.pth")):
        assert "emb.weight has no rows" in refused(cli, tmp_path, *arguments)


# --- names of places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    ["hf:../../etc", "hf:..", "hf:a/../b", "hf:./a", "hf:a/b/..", "a/../b", "hf:.hidden/x", "hf:a/b:../c"],
)
def test_paths_are_no_dataset_ids(cli: Cli, folder: Path, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        ("finetune", "model", "--data", item, "--output", "out"),
        ("finetune", "model", "--data", item, "--output", "out", "--dry-run"),
        ("eval", "model", "--data", item),
    ):
        assert item in refused(cli, folder, *arguments)


def test_paths_are_no_sources(cli: Cli, tmp_path: Path) -> None:
    for arguments in (("convert", "hf:../../etc", "--output", "out"), ("inspect", "hf:../../etc")):
        assert "hf:../../etc does not exist" in refused(cli, tmp_path, *arguments)


def test_names_that_are_too_long(cli: Cli, folder: Path) -> None:
    name = "x" * 10_000
    for arguments in (
        ("inspect", name),
        ("convert", f"{name}.pth", "--output", "out"),
        ("generate", name, "--prompt", "a"),
        ("eval", "model", "--data", name),
        ("convert", "bundled:rwkv-4", "--tokenizer", name, "--output", "out"),
        ("verify", "model", "--text", name),
    ):
        assert "too long" in refused(cli, folder, *arguments)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10_000, "nested too deep"),
        ("{a: " * 10_000, "nested too deep"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]", "no aliases"),
        ("seed: 0x" + "f" * 6000, "more than 63 bits"),
        ("seed: 1" + "0" * 6000, "not valid YAML"),
        ("lr: 1" + "0" * 400, "more than 63 bits"),
        ("seed: 2020-99-99", "not valid YAML"),
        ("? " + "x" * 300_000 + "\n: 1", "(300,000 characters)"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        ("1: 2", "1 is not a setting"),
        ('tape_dir: "\\uD800"', "holds half a character"),
        ('data: [a, "b\\uDBFF"]', "holds half a character"),
        ("seed: " + "x" * 300_000, "must be a whole number"),
        ("seed: " + "[1, " * 100 + "1" + "]" * 100, "must be a whole number"),
        ("a: \x00", "not valid YAML"),
        ("x: y\n" * 300_000, "holds no settings"),
    ],
    ids=lambda text: text[:12],
)
def test_settings(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        build_config(file=tmp_path / "run.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600
