"""The records of a PyTorch file (a zip of one pickle and one record per storage) and their CRC-32 checksums.

``torch.load`` does not look at the checksums that ``torch.save`` writes (its zip reader is built without them), so that
a flipped bit becomes a weight. Here the small records are checked when a file is opened, and a storage when a tensor
in it is first read: its pages are read then in any case. What a zip could hide is refused too: compressed records (a
pickle of gigabytes in a file of kilobytes; ``torch.save`` compresses nothing) and names that occur twice.

Source: the zip format, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, as ``torch/serialization.py``
uses it: ``NAME/data.pkl``, ``NAME/byteorder``, ``NAME/version``, and ``NAME/data/KEY`` for the storage ``KEY``.

Limits: ``torch.serialization.set_crc32_options(False)`` writes zeros instead of checksums; PyTorch before 1.6 wrote
no zip, and safetensors has no checksums: nothing can be told of those.
"""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from rwkv_rev.errors import CheckpointError
from rwkv_rev.printable import shortened

MOST_PICKLE_BYTES = 64 << 20  # a tensor takes some 200
READ_BLOCK = 1 << 20  # bytes at a time


def damaged(path: Path, error: Exception) -> CheckpointError:
    """What to raise for a file of which a reader says ``error``."""
    return CheckpointError(f"{path} is truncated or damaged ({shortened(error)}); download or copy it again")


class ZipRecords:
    """The records of a PyTorch zip file.

    Attributes:
        storages: key of its storage by name of the tensor; empty where the file has no checksums.

    Raises:
        CheckpointError: if the zip is damaged, compressed, or no PyTorch file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked: set[str] = set()
        try:
            with zipfile.ZipFile(path) as archive:
                self._index(archive)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged zip may raise anything
            raise damaged(path, error) from error

    def _index(self, archive: zipfile.ZipFile) -> None:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise CheckpointError(f"{self._path} is a zip, but not one that torch.save wrote")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CheckpointError(
                    f"{self._path} is a compressed zip ({shortened(info.filename)}), which torch.save does not write; "
                    "load it with torch and save it again"
                )
        pickled = archive.getinfo(pickles[0])
        if pickled.file_size > MOST_PICKLE_BYTES:
            raise CheckpointError(
                f"{self._path} holds a pickle of {pickled.file_size / 1e6:,.0f} MB beside its tensors; "
                "save its state_dict() alone"
            )
        self._data = pickles[0].removesuffix(".pkl") + "/"
        self._infos = {info.filename: info for info in infos}
        self._has_checksums = any(info.CRC for info in infos)
        if not self._has_checksums:
            return
        for name in names:
            if not name.startswith(self._data):
                self._check(name, f"its record {shortened(name)}")
        self._pickle = archive.read(pickled)

    @property
    def has_checksums(self) -> bool:
        """Whether the file was written with checksums."""
        return self._has_checksums

    def find_storages(self) -> None:
        """Learn which storage each tensor is in. Call it once ``torch.load`` has taken the pickle: it trusts that.

        Raises:
            CheckpointError: if the pickle is no dictionary of tensors.
        """
        self.storages: Mapping[str, str] = {}
        if self._has_checksums:
            try:
                self.storages = _storages(self._pickle)
            except Exception as error:
                raise damaged(self._path, error) from error

    def check(self, name: str) -> None:
        """Compare the storage of a tensor with its checksum, once.

        Raises:
            CheckpointError: naming the tensor.
        """
        if not self._has_checksums:
            return
        try:
            record = self._data + self.storages[name]
            if record in self._checked:
                return
            self._check(record, name)
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self._path} cannot be read: {shortened(error)}") from error
        self._checked.add(record)

    def _check(self, record: str, what: str) -> None:
        info = self._infos[record]
        block = memoryview(
            bytearray(min(READ_BLOCK, info.file_size))
        )  # one for all: new memory costs more than reading
        found, left = 0, info.file_size
        with self._path.open("rb", buffering=0) as file:
            file.seek(
                info.header_offset + 26
            )  # of the record's own header: here the lengths of its name and extra field
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(info.header_offset + 30 + name + extra)
            while left and (size := file.readinto(block[: min(len(block), left)])):
                found, left = zlib.crc32(block[:size], found), left - size
        if left or found != info.CRC:
            raise CheckpointError(
                f"{self._path} is damaged: {what} does not match its checksum; download or copy the file again"
            )


def _storages(pickled: bytes) -> dict[str, str]:
    state = _Unpickler(BytesIO(pickled), encoding="utf-8").load()
    return {name: str(key) for name, tensor in state.items() if (key := _first_key(tensor)) is not None}


class _Key(str):
    """The key of a storage."""


class _Call(tuple[Any, ...]):
    """The arguments of a call that was not made."""

    def __setstate__(self, state: Any) -> None:
        """Attributes of a tensor are not kept."""


class _Stub:
    """Stands for every class and function that a pickle names: nothing of it is called."""

    def __new__(cls, *arguments: Any) -> Any:
        return object.__new__(_Stub)

    def __call__(self, *arguments: Any) -> Any:
        return _Call(arguments)

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""


class _Unpickler(pickle._Unpickler):
    """Python's own, written in Python: that in C takes memory for whatever place a memo claims to have."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Stub()

    def persistent_load(self, identity: Any) -> _Key:
        return _Key(identity[2])  # ("storage", its class, key, device, elements)


def _first_key(value: Any) -> _Key | None:
    """The storage that a tensor was rebuilt from: the first key among the arguments, at any depth."""
    if isinstance(value, _Key):
        return value
    found = (_first_key(item) for item in value) if isinstance(value, tuple) else ()
    return next((key for key in found if key is not None), None)
