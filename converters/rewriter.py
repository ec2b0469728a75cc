"""Write safetensors shards tensor by tensor.

A safetensors file is ``u64 header length | JSON header | data``; the header needs names, dtypes and shapes
only, which are known before any value is read. So each tensor is copied from the (memory-mapped) source
straight to its place, in pieces of :data:`PIECE` elements: what is held beyond the source is one piece, or
one tensor where its memory is not contiguous. Format: https://huggingface.co/docs/safetensors

Every value is checked on the way: NaN and infinity are refused, and so is a value too large for the target
dtype.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_rev.converters.reading import check_finite
from rwkv_rev.errors import CheckpointError, OutputError

PIECE = 1024 * 1024  # elements copied at once
INDEX_NAME = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its name in the output and in the source, its final shape and dtype."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Shard:
    """One safetensors file and what goes into it."""

    filename: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``"5GB"`` (powers of ten), ``"512MiB"`` (powers of two) or a plain number.

    Raises:
        OutputError: if it is not a positive size.
    """
    match = re.fullmatch(r"\s*((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)\s*([KMGT]I?)?B?\s*", str(text).upper())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0
    if size < 1:
        raise OutputError(f"{text!r} is not a size; write for example 5GB, 200MB or 512MiB")
    return int(size)


def shard_layout(entries: Iterable[Entry], max_shard_size: str | int) -> list[Shard]:
    """Distribute tensors over files of at most ``max_shard_size`` bytes each, in order.

    A tensor larger than that gets a file of its own. One file is called ``model.safetensors``, several
    ``model-00001-of-0000n.safetensors``.
    """
    limit = parse_size(max_shard_size)
    shards: list[Shard] = []
    room = 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append(Shard(""))
            room = limit
        shards[-1].entries.append(entry)
        room -= entry.nbytes
    for i, shard in enumerate(shards, 1):
        several = len(shards) > 1
        shard.filename = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
    return shards


def write_shards(
    shards: list[Shard],
    folder: Path,
    read: Callable[[Entry], torch.Tensor],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Write every shard into ``folder``, and the index if there are several.

    Args:
        shards: from :func:`shard_layout`.
        folder: existing folder.
        read: gives the tensor of an entry; called once per tensor.
        on_bytes: called with the number of bytes written, piece by piece.

    Raises:
        CheckpointError: for NaN or infinite values, and for values too large for the target dtype.
        OSError: if the system refuses to write (disk full, ...).
    """
    for shard in shards:
        write_shard(shard, folder, read, on_bytes)
    if len(shards) > 1:
        weight_map = {entry.name: shard.filename for shard in shards for entry in shard.entries}
        total = sum(shard.nbytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(
    shard: Shard,
    folder: Path,
    read: Callable[[Entry], torch.Tensor],
    on_bytes: Callable[[int], object] = lambda count: None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file; as :func:`write_shards`, with further texts in its header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in shard.entries:
        header[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of eight bytes
    with (folder / shard.filename).open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in shard.entries:
            tensor = read(entry)
            if tensor.numel() != math.prod(entry.shape):
                raise CheckpointError(
                    f"{entry.source} has shape {tuple(tensor.shape)}, which does not fit {entry.shape}"
                )
            check_finite(entry.source, tensor)
            for piece in tensor.reshape(-1).split(PIECE):
                converted = piece.to(entry.dtype)
                if converted is not piece and not converted.isfinite().all():
                    largest, dtype = piece.abs().max().item(), str(entry.dtype).removeprefix("torch.")
                    raise CheckpointError(
                        f"{entry.source} holds values as large as {largest:.3g}, too large for {dtype}; "
                        "use --dtype auto, bfloat16 or float32"
                    )
                on_bytes(file.write(converted.contiguous().view(torch.uint8).numpy().data))
        # now, while the source may still be hashed; the end finds it on the disk
        file.flush()
        os.fsync(file.fileno())
