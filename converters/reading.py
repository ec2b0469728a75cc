"""Read checkpoints tensor by tensor: PyTorch files, safetensors, and both in shards with an index.

Files are memory-mapped, so opening costs the pages of the header and each tensor the pages it covers, which
the system can drop again. PyTorch files are unpickled with ``weights_only=True``: tensors only, no code; what is
read of them is compared with the file's checksums (:mod:`rwkv_rev.converters.zip_records`).

Limit: the pickle layout of PyTorch before 1.6 cannot be mapped; such a file is held in memory whole, one
shard at a time (each is loaded once for its names, and once more when read in the order of
``Checkpoint.names``).
"""

import hashlib
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from rwkv_rev.converters.sniff import sniff
from rwkv_rev.converters.wrappers import plain_names
from rwkv_rev.converters.zip_records import ZipRecords, damaged
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.hub import LocalCheckpoint
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.folders.selection import some, weight_map
from rwkv_rev.printable import is_utf8, shortened

HASH_BLOCK = 1 << 22  # bytes read at a time; fewer make the threads wait for each other more often
FINITE_BLOCK = 1 << 22  # values checked at a time
MOST_NAME = 512  # characters of a tensor's name; no layout comes near

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _File(ABC):
    """One weight file of a checkpoint."""

    path: Path
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored."""

    @abstractmethod
    def release(self) -> None:
        """Forget what is held in memory and could be read again."""

    @abstractmethod
    def close(self) -> None:
        """Forget everything."""


class Checkpoint:
    """An open checkpoint: the names, shapes and dtypes of its tensors, and the tensors one at a time.

    Use as a context manager. Names are the file's own (foreign) names, in file order, without the prefixes that
    wrappers put before them.

    Attributes:
        files: the weight files, in the order of their index or name.
        config: the ``config.json`` beside the weights; empty where there is none. A hint only.
        wrappers: the prefixes that were taken from names, outermost first; empty where there were none.
    """

    def __init__(self, files: list[_File], config: dict[str, Any], *, unwrap: bool = True) -> None:
        self.files = tuple(file.path for file in files)
        self.config = config
        self._files = files
        self._home: dict[str, tuple[_File, str]] = {}  # by plain name: the file, and the name in it
        homes: dict[str, _File] = {}
        for file in files:
            for name in file.infos:
                if len(name) > MOST_NAME:
                    raise CheckpointError(
                        f"{file.path} has a tensor with an impossible name, {shortened(name)}"
                    )
                if name in homes:
                    where = f"{homes[name].path.name} and {file.path.name}"
                    raise CheckpointError(f"{name} is in two shards, {where}; download the checkpoint again")
                homes[name] = file
        plain, self.wrappers = plain_names(self.files[0], homes) if unwrap else ({n: n for n in homes}, ())
        for name, stored in plain.items():
            self._home[name] = (homes[stored], stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; tensors already handed out stay valid."""
        for file in self._files:
            file.close()

    @property
    def is_safetensors(self) -> bool:
        """Whether its files are safetensors, and not PyTorch's."""
        return isinstance(self._files[0], _SafetensorsFile)

    @property
    def metadata(self) -> dict[str, str]:
        """Texts that the first file holds beside tensors: safetensors' ``__metadata__``, ``_metadata`` of PyTorch's."""
        return self._files[0].metadata

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in file order: the order in which reading touches each file once."""
        return tuple(self._home)

    def stored_name(self, name: str) -> str:
        """The name in the file, with what wrappers put before it."""
        return self._home[name][1]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of ``name`` without reading it (KeyError if there is no such tensor)."""
        file, stored = self._home[name]
        return file.infos[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name`` as stored."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of ``name`` as stored."""
        return self.info(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the values of ``name``."""
        return self.info(name).nbytes

    def file_of(self, name: str) -> Path:
        """The file that holds ``name``."""
        return self._home[name][0].path

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, contiguous; mapped from the file where the format allows: only read it."""
        file, stored = self._home[name]
        for other in self._files:
            if other is not file:
                other.release()
        return file.tensor(stored).contiguous()

    def sha256(self, stop: threading.Event | None = None) -> dict[str, str]:
        """SHA-256 of each weight file, by file name; reads every file once. Setting ``stop`` ends it early."""
        return {path.name: file_sha256(path, stop) for path in self.files}


def open_checkpoint(local: LocalCheckpoint, *, unwrap: bool = True) -> Checkpoint:
    """Open a checkpoint that :func:`rwkv_rev.folders.hub.resolve` found.

    Args:
        local: its files.
        unwrap: take the prefixes of wrappers from the names.

    Raises:
        CheckpointError: if a file is damaged or of a foreign kind, holds anything but tensors, or the shards
            do not match their index; if its config.json is damaged; if two names are one without their prefixes.
    """
    config = {} if local.directory is None else read_object(local.directory / "config.json")
    files: list[_File] = []
    try:
        for path in local.files:
            files.append(_open_file(path))
            if len(local.files) > 1:
                files[-1].release()
        checkpoint = Checkpoint(files, config, unwrap=unwrap)
        if local.index is not None:
            _check_index(local.index, files)
        if not checkpoint.names():
            raise CheckpointError(f"{local.files[0]} holds no tensors")
    except BaseException:
        for file in files:
            file.close()
        raise
    return checkpoint


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor with NaN or infinite values.

    Works in pieces, so that no second tensor of its size exists.

    Raises:
        CheckpointError: naming the tensor, how many values are bad and the index of the first.
    """
    flat = tensor.reshape(-1)
    bad, first = 0, -1
    for start in range(0, flat.numel(), FINITE_BLOCK):
        piece = flat[start : start + FINITE_BLOCK]
        if is_finite(piece):
            continue
        finite = torch.isfinite(piece)
        if first < 0:
            first = start + int((~finite).nonzero()[0])
        bad += int((~finite).sum())
    if bad:
        at = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
        values = "value that is" if bad == 1 else "values that are"
        raise CheckpointError(
            f"{name} has {bad} {values} NaN or infinite (first {float(flat[first])} at {at}); "
            "use an undamaged copy of the checkpoint"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: NaN reaches both ends, 25 times faster than ``isfinite`` of all."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def file_sha256(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; meaningless once ``stop`` is set, when nobody waits for it."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK))  # one for all: new memory takes longer than to read it
    with path.open("rb", buffering=0) as file:
        while (size := file.readinto(block)) and not (stop is not None and stop.is_set()):
            digest.update(block[:size])
    return digest.hexdigest()


def _check_index(index: Path, files: list[_File]) -> None:
    entries = weight_map(index)
    holders = {name: file.path for file in files for name in file.infos}
    missing = [name for name in entries if name not in holders]
    if missing:
        raise CheckpointError(
            f"{shortened(entries[missing[0]])} lacks {some(missing)}, which {index.name} says it holds"
        )
    leftover = [name for name in holders if name not in entries]
    if leftover:
        raise CheckpointError(f"{holders[leftover[0]]} holds {some(leftover)}, not in {index.name}")


def _open_file(path: Path) -> _File:
    if not is_utf8(str(path)):
        raise CheckpointError(f"{path}: this name is no UTF-8, and what reads weights needs that; rename it")
    form = sniff(path)
    return _SafetensorsFile(path) if form == "safetensors" else _TorchFile(path, mapped=form == "torch-zip")


class _SafetensorsFile(_File):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = safe_open(path, framework="pt")
            self._handle.__enter__()
        except SafetensorError as error:
            raise damaged(path, error) from error
        self.infos, self.metadata = {}, dict(self._handle.metadata() or {})
        for name in self._handle.offset_keys():
            view = self._handle.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path}: {shortened(name)} has the unknown dtype {view.get_dtype()}")
            self.infos[name] = TensorInfo(tuple(view.get_shape()), dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return self._handle.get_tensor(name)

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._handle.__exit__(None, None, None)


class _TorchFile(_File):
    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.path = path
        self.mapped = mapped
        self._records = ZipRecords(path) if mapped else None
        loaded = _load(path, mapped)
        self._state: dict[str, torch.Tensor] | None = dict(loaded)
        self.metadata = _texts(getattr(loaded, "_metadata", None))
        if self._records is not None:
            self._records.find_storages()
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._state.items()}

    def tensor(self, name: str) -> torch.Tensor:
        if self._state is None:
            self._state = dict(_load(self.path, self.mapped))
        if self._records is not None:
            self._records.check(name)
        return self._state[name]

    def release(self) -> None:
        if not self.mapped:
            self._state = None

    def close(self) -> None:
        self._state = None


def _load(path: Path, mapped: bool) -> Mapping[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects beside tensors, which may run code; save its state_dict() alone"
            ) from error
        raise damaged(path, error) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(path, error) from error
    if isinstance(state, torch.Tensor):
        raise CheckpointError(f"{path} holds a single tensor, not a dictionary of named tensors")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of named tensors")
    _refuse_other_than_tensors(path, state)
    return state


def _texts(found: object) -> dict[str, str]:
    """The texts under texts of what a state_dict has as ``_metadata``; PyTorch's own are dictionaries."""
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, str)}


def _refuse_other_than_tensors(path: Path, state: Mapping[Any, Any]) -> None:
    rewritten = [str(key) for key in ("_strategy", "_version", "_rescale_layer") if key in state]
    if rewritten:
        raise CheckpointError(
            f"{path} was rewritten by the rwkv package ({some(rewritten)}); give the original .pth"
        )
    for key, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()):
            raise CheckpointError(
                f"{path} nests its tensors under {_quoted(key)}; save that dictionary alone"
            )
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has the key {_quoted(key)}, which is no tensor name")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: {shortened(key)} is a {type(value).__name__}, not a tensor; remove it"
            )
        if value.layout != torch.strided:
            raise CheckpointError(f"{path}: {shortened(key)} is a sparse tensor; save it dense")
        if value.device.type != "cpu":
            raise CheckpointError(f"{path}: {shortened(key)} has no values (device {value.device})")


def _quoted(key: object) -> str:
    """A key as Python writes it; of a container the type alone, which may hold itself many times over."""
    plain = isinstance(key, str | float | bytes | None) or (isinstance(key, int) and abs(key) < 1 << 64)
    return shortened(repr(key)) if plain else f"a {type(key).__name__}"
