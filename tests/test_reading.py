"""Reading every format: equal values, lazily, one shard at a time; and every damaged or foreign file by
name."""

import gc
import hashlib
import json
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict, hf_state_dict
from safetensors.torch import save_file

import rwkv_rev.converters.reading as reading
from rwkv_rev.converters.reading import Checkpoint, check_finite, open_checkpoint
from rwkv_rev.converters.sniff import sniff
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.hub import resolve
from rwkv_rev.folders.source import parse_source

State = dict[str, torch.Tensor]


def open_path(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(parse_source(str(path))))


def save(state: State, path: Path, form: str) -> None:
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")


def save_sharded(state: State, folder: Path, form: str, shards: int = 3) -> None:
    """As save_pretrained does: shards and an index. Consecutive tensors share a shard."""
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    entries: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        save({name: state[name] for name in part}, folder / file, form)
        entries |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": entries}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def assert_holds(checkpoint: Checkpoint, state: State) -> None:
    assert set(checkpoint.names()) == set(state)
    for name, tensor in state.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.nbytes(name) == tensor.numel() * tensor.element_size()
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert read.is_contiguous()


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 1
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("version", VERSIONS)
def test_single_file(tmp_path: Path, version: str, form: str, dtype: torch.dtype) -> None:
    state = blinkdl_state_dict(version, dtype=dtype)
    save(state, tmp_path / "model.pth", form)  # the suffix says nothing
    with open_path(tmp_path / "model.pth") as checkpoint:
        assert checkpoint.files == (tmp_path / "model.pth",)
        assert checkpoint.config == {}
        assert_holds(checkpoint, state)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_sharded(tmp_path: Path, form: str) -> None:
    state = hf_state_dict("5.2")
    save_sharded(state, tmp_path, form)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv5"}')
    with open_path(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 3
        assert checkpoint.config == {"model_type": "rwkv5"}
        assert_holds(checkpoint, state)
        homes = [checkpoint.file_of(name) for name in checkpoint.names()]
        assert len([1 for a, b in pairwise(homes) if a != b]) == 2  # file order
        hashes = checkpoint.sha256()
    assert hashes == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.files}


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_huge_files_are_mapped_not_read(tmp_path: Path, form: str) -> None:
    """Opening and listing 256 MB touches a small part of it."""
    state = {f"t{i}": torch.zeros(8 << 20) for i in range(8)}
    save(state, tmp_path / "model.pth", form)
    del state
    gc.collect()
    before = psutil.Process().memory_info().rss
    with open_path(tmp_path / "model.pth") as checkpoint:
        total = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        grown = psutil.Process().memory_info().rss - before
        assert total == 256 << 20
        assert grown < 32 << 20


def test_legacy_shards_are_held_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = hf_state_dict("4")
    save_sharded(state, tmp_path, "legacy")
    held: list[int] = []
    loads: list[str] = []
    original = reading._load

    def counting(path: Path, mapped: bool) -> State:
        loads.append(path.name)
        return original(path, mapped)

    monkeypatch.setattr(reading, "_load", counting)
    with open_path(tmp_path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.tensor(name)
            held.append(sum(getattr(file, "_state", None) is not None for file in checkpoint._files))
    assert set(held) == {1}
    assert len(loads) == 6  # each once for its names and once in file order


def test_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    torch.save({"a": base.T, "b": base[1:3, 2:], "c": base}, tmp_path / "m.pth")
    with open_path(tmp_path / "m.pth") as checkpoint:
        assert torch.equal(checkpoint.tensor("a"), base.T)
        assert checkpoint.tensor("a").is_contiguous()
        assert torch.equal(checkpoint.tensor("b"), base[1:3, 2:])
        assert checkpoint.nbytes("b") == 2 * 4 * 4


def test_parameters_and_ordered_dict(tmp_path: Path) -> None:
    torch.save(OrderedDict(a=torch.nn.Parameter(torch.ones(2))), tmp_path / "m.pth")
    with open_path(tmp_path / "m.pth") as checkpoint:
        assert checkpoint.tensor("a").sum() == 2


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    for form in ("zip", "legacy", "safetensors"):
        save({"a": torch.arange(5000.0)}, tmp_path / "m", form)
        with open_path(tmp_path / "m") as checkpoint:
            tensor = checkpoint.tensor("a")
        assert tensor.sum() == 4999 * 2500


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b'{"a":' * 10_000, b"[" * 10_000], ids=range(5))
def test_an_unreadable_config_is_refused(tmp_path: Path, text: bytes) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(text)
    assert "config.json is damaged" in refused(lambda: open_path(tmp_path))


class TestCheckFinite:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_names_tensor_count_and_place(self, dtype: torch.dtype, value: float) -> None:
        tensor = torch.ones(3, 4, 5, dtype=dtype)
        check_finite("x", tensor)
        tensor[1, 2, 3] = value
        assert f"head.weight has 1 value that is NaN or infinite (first {value} at [1, 2, 3])" in refused(
            lambda: check_finite("head.weight", tensor)
        )
        tensor[2] = value
        assert "has 21 values" in refused(lambda: check_finite("x", tensor))

    def test_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reading, "FINITE_BLOCK", 7)
        tensor = torch.full((100,), 6e4, dtype=torch.float16)  # whose sum overflows
        check_finite("x", tensor)
        tensor[[50, 99]] = float("nan")
        assert "has 2 values" in refused(lambda: check_finite("x", tensor))
        assert "at [50]" in refused(lambda: check_finite("x", tensor))

    def test_empty_and_scalar(self) -> None:
        check_finite("x", torch.empty(0))
        check_finite("x", torch.tensor(1.0))
        assert "at []" in refused(lambda: check_finite("x", torch.tensor(float("nan"))))


PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 169342981\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (PAGE, "web page"),
        (b"\xef\xbb\xbf\n  <HTML lang='en'>", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (POINTER, "Git-LFS pointer"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"Access denied.", "text file"),
        (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
        (b"fmgg" + bytes(50), "rwkv.cpp"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (pickle.dumps({"a": [1.0]}), "plain Python pickle"),
        (bytes(1000), "neither a PyTorch"),
        (b"\x93\xab\x00\xff" * 9, "neither a PyTorch"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        ((1 << 20).to_bytes(8, "little") + b'{"a":', "truncated"),
    ],
)
def test_first_bytes(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "RWKV-4.pth"
    path.write_bytes(data)
    found = refused(lambda: open_path(path))
    assert message in found
    assert str(path) in found


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5, 0.1, 40, 9, 1])
def test_truncated(tmp_path: Path, form: str, keep: float) -> None:
    path = tmp_path / "model.pth"
    save(blinkdl_state_dict("5.2"), path, form)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    found = refused(lambda: open_path(path))
    assert keep == 1 or "truncated" in found or "neither" in found or "plain Python pickle" in found
    if keep < 1:
        assert f"{path} is truncated" in found


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_anywhere(tmp_path: Path, form: str) -> None:
    """Whatever bytes are overwritten, a file opens or is refused in one line; nothing else is raised."""
    path = tmp_path / "model.pth"
    save(blinkdl_state_dict("5.2", layers=1, D=16, head_size=4, vocab=8), path, form)
    data = path.read_bytes()
    rng = random.Random(form)
    refusals = 0
    for _ in range(80):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 5, 25])):
            damaged[rng.randrange(rng.choice([64, 2000, len(data)]))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            with open_path(path) as checkpoint:
                for name in checkpoint.names():
                    checkpoint.tensor(name)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 10


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_truncated_shard(tmp_path: Path, form: str) -> None:
    save_sharded(hf_state_dict("4"), tmp_path, form)
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in refused(lambda: open_path(tmp_path))


class Dangerous:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_code_is_not_run(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.pth"
    torch.save({"a": torch.ones(1), "b": Dangerous()}, path, _use_new_zipfile_serialization=form == "zip")
    assert "Python objects beside tensors" in refused(lambda: open_path(path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_strategy": "cpu fp32", "_version": 4}, "rewritten by the rwkv package (_strategy, _version)"),
        ({"_version": 5.2}, "rewritten by the rwkv package"),
        ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "nests its tensors under 'state_dict'"),
        ({"a": torch.ones(1), "epoch": 3}, "epoch is a int, not a tensor"),
        ({1: torch.ones(1)}, "the key 1"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "single tensor"),
        ({}, "holds no tensors"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
    ],
)
def test_other_contents(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "m.pth")
    assert message in refused(lambda: open_path(tmp_path / "m.pth"))


class TestIndex:
    def edit(self, folder: Path, change: Callable[[dict[str, str]], None]) -> None:
        (path,) = folder.glob("*.index.json")
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    @pytest.mark.parametrize("form", ["zip", "safetensors"])
    def test_shard_lacks_a_tensor(self, tmp_path: Path, form: str) -> None:
        save_sharded(hf_state_dict("4"), tmp_path, form)
        self.edit(tmp_path, lambda entries: entries.update(ghost=entries["head.weight"]))
        assert "lacks ghost" in refused(lambda: open_path(tmp_path))

    def test_index_lacks_a_tensor(self, tmp_path: Path) -> None:
        save_sharded(hf_state_dict("4"), tmp_path, "safetensors")
        self.edit(tmp_path, lambda entries: entries.__delitem__("head.weight"))
        assert "holds head.weight, not in model.safetensors.index.json" in refused(
            lambda: open_path(tmp_path)
        )

    def test_tensor_in_two_shards(self, tmp_path: Path) -> None:
        save_sharded(hf_state_dict("4"), tmp_path, "safetensors", shards=2)
        first, second = sorted(tmp_path.glob("*-of-*"))
        second.write_bytes(first.read_bytes())
        assert "in two shards" in refused(lambda: open_path(tmp_path))


def test_sniff_tells_formats(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for form, found in (("zip", "torch-zip"), ("legacy", "torch-pickle"), ("safetensors", "safetensors")):
        save({"a": torch.ones(1)}, path, form)
        assert sniff(path) == found
    assert "cannot be read" in refused(lambda: sniff(tmp_path / "absent"))
