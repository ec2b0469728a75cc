"""Checksums of PyTorch files: a flipped bit anywhere is told of, by tensor, without ``--verify``."""

import random
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import blinkdl_state_dict

from rwkv_rev import convert
from rwkv_rev.converters.reading import Checkpoint, open_checkpoint
from rwkv_rev.converters.zip_records import ZipRecords
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.hub import resolve
from rwkv_rev.folders.source import parse_source

Cli = Callable[..., tuple[int, str, str]]


def open_path(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(parse_source(str(path))))


def place(path: Path, record: str) -> tuple[int, int]:
    """Where the bytes of a record begin and how many there are."""
    with zipfile.ZipFile(path) as archive:
        (info,) = (info for info in archive.infolist() if info.filename.endswith(record))
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name + extra, info.file_size


def flip(path: Path, offset: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def test_ten_of_ten_flipped_bits(cli: Cli, tmp_path: Path) -> None:
    """In tensors, by name; nothing is left behind."""
    state = blinkdl_state_dict("5.2", vocab=256)
    rng = random.Random(0)
    for key, name in rng.sample(list(enumerate(state)), 10):
        path = tmp_path / "model.pth"
        torch.save(state, path)
        start, size = place(path, f"/data/{key}")
        flip(path, start + rng.randrange(size), rng.randrange(8))
        code, out, err = cli("convert", "model.pth", "--output", "model", "--no-verify")
        assert (code, out) == (1, "")
        assert err.startswith(f"error: model.pth is damaged: {name} does not match its checksum")
        assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_inspection_reads_no_damaged_decay(cli: Cli, tmp_path: Path) -> None:
    state = blinkdl_state_dict("5.2", vocab=256)
    torch.save(state, tmp_path / "model.pth")
    start, _ = place(tmp_path / "model.pth", f"/data/{list(state).index('blocks.1.att.time_decay')}")
    flip(tmp_path / "model.pth", start + 3)
    code, _, err = cli("inspect", "model.pth")
    assert code == 1 and "blocks.1.att.time_decay does not match its checksum" in err


@pytest.mark.parametrize("record", ["/data.pkl", "/byteorder", "/version"])
def test_the_small_records_are_checked_when_the_file_is_opened(tmp_path: Path, record: str) -> None:
    """A flip in the pickle can rename or reshape a tensor."""
    state = blinkdl_state_dict("4")
    torch.save(state, tmp_path / "intact.pth")
    start, size = place(tmp_path / "intact.pth", record)
    for offset in {0, size // 3, size // 2, size - 1}:
        path = tmp_path / "flipped.pth"
        path.write_bytes((tmp_path / "intact.pth").read_bytes())
        flip(path, start + offset, 0)
        with pytest.raises(CheckpointError, match=rf"{re.escape(record)} does not match its checksum"):
            open_path(path)


def test_which_storage_a_tensor_is_in(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(a=base.T, b=torch.nn.Parameter(torch.ones(3)), c=base[1:3], d=torch.zeros(0))
    state._metadata = {"": {"version": 1}}  # as state_dict() has it
    torch.save(state, tmp_path / "m.pth")
    records = ZipRecords(tmp_path / "m.pth")
    records.find_storages()
    assert records.storages == {"a": "0", "b": "1", "c": "0", "d": "2"}
    start, _ = place(tmp_path / "m.pth", "/data/0")
    flip(tmp_path / "m.pth", start)
    with open_path(tmp_path / "m.pth") as checkpoint:
        assert checkpoint.tensor("b").sum() == 3
        for name in ("a", "c"):
            with pytest.raises(CheckpointError, match=f"{name} does not match"):
                checkpoint.tensor(name)


def test_each_storage_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(5), "b": torch.ones(5)}, tmp_path / "m.pth")
    with open_path(tmp_path / "m.pth") as checkpoint:
        opened: list[str] = []
        original = ZipRecords._check

        def check(self: ZipRecords, record: str, what: str) -> None:
            opened.append(what)
            original(self, record, what)

        monkeypatch.setattr(ZipRecords, "_check", check)
        for name in ("a", "a", "b", "a"):
            checkpoint.tensor(name)
    assert opened == ["a", "b"]


def test_files_without_checksums(tmp_path: Path) -> None:
    """``set_crc32_options(False)`` writes zeros: such a file converts, as nothing can be told of it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(blinkdl_state_dict("4", vocab=256), tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert not ZipRecords(tmp_path / "m.pth").has_checksums
    assert convert(tmp_path / "m.pth", tmp_path / "model").written


def rezip(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            change(archive, name, content)


def test_a_pickle_of_gigabytes_in_a_small_zip(cli: Cli, tmp_path: Path) -> None:
    """3 GB of zeros are 3 MB when they are compressed; they are refused before they are unpacked."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("bomb/version", b"3\n", zipfile.ZIP_STORED)
        archive.writestr("bomb/data.pkl", b"")
    # the central directory alone says how much there is
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    for arguments in (("inspect", "bomb.pth"), ("convert", "bomb.pth", "--output", "m")):
        code, out, err = cli(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "is a compressed zip (bomb/data.pkl), which torch.save does not write" in err
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pth"]


def test_compressed_by_another_tool(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("4"), tmp_path / "m.pth")
    rezip(tmp_path / "m.pth", lambda z, name, content: z.writestr(name, content, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="compressed zip"):
        open_path(tmp_path / "m.pth")


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"is a zip, but not one that torch\.save wrote"):
        open_path(tmp_path / "m.pth")


def test_names_that_occur_twice(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m/data/0", b"\0" * 12)
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        open_path(tmp_path / "m.pth")


def test_the_checksum_is_the_zip_s_own(tmp_path: Path) -> None:
    """Guards the test above all: what torch writes is a CRC-32 of the storage."""
    torch.save({"a": torch.arange(7.0)}, tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert zlib.crc32(torch.arange(7.0).numpy().tobytes()) == archive.getinfo("m/data/0").CRC
