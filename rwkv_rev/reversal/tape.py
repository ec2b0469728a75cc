"""The tape: a stack of records, each the tensors of one chunk boundary by layer, kept off the accelerator.

Three places to keep it: ``host`` memory (pinned, copied on a stream of its own while the GPU computes), ``device``
memory, or a memory-mapped file on ``disk``. The file has no name in the file system (or is deleted when the last
handle closes, on Windows), so nothing stays behind when the process is killed. Records are popped last in, first
out; the one below the top is fetched ahead.
"""

import math
import mmap
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.errors import StrategyError

ALIGNMENT = 16
_SMALLEST_SLAB = 2**22
_LARGEST_SLAB = 2**28


class _Layout(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    offset: int


class FlatRecord(NamedTuple):
    """A record as one uint8 tensor, and where in it the tensors of each layer lie."""

    data: Tensor
    layouts: list[list[_Layout]]

    @classmethod
    def of(cls, record: list[list[Tensor]], device: torch.device) -> "FlatRecord":
        """A copy of ``record`` on ``device``."""
        layouts, parts, size = _lay_out(record)
        return cls(_joined(parts, torch.empty(size, dtype=torch.uint8, device=device)), layouts)

    def tensors(self) -> list[list[Tensor]]:
        """The record, as views."""
        return [
            [
                self.data[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for dtype, shape, offset in layer
            ]
            for layer in self.layouts
        ]


class Tape:
    """A stack of records (lists of tensor lists, one per layer) for tensors on ``device``.

    Args:
        place: ``host``, ``device`` or ``disk``.
        device: where the tensors come from and go back to.
        directory: folder of the ``disk`` tape's file; the system's temporary folder when None.

    Attributes:
        nbytes: bytes on the tape now.
        peak_nbytes: most bytes that were on the tape at once.

    Raises:
        StrategyError: for a place that does not exist or a folder that cannot be written.
    """

    def __init__(self, place: str, device: torch.device, directory: str | Path | None = None) -> None:
        if place not in ("host", "device", "disk"):
            raise StrategyError(f"tape {place!r} does not exist; use 'host', 'device' or 'disk'")
        self.device = device
        self.nbytes = 0
        self.peak_nbytes = 0
        self._records: list[tuple[Tensor, list[list[_Layout]]]] = []
        self._store = None if place == "device" else _Store(place, device, directory)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._store else None
        self._ahead: tuple[Tensor, torch.cuda.Event] | None = None

    def __enter__(self) -> "Tape":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    def push(self, record: list[list[Tensor]]) -> None:
        """Put one record on the tape (values are copied)."""
        layouts, parts, size = _lay_out(record)
        self._push(parts, size, layouts)

    def push_flat(self, record: FlatRecord) -> None:
        """The same for a record that is flat already."""
        self._push([(0, record.data)], record.data.numel(), record.layouts)

    def pop(self) -> list[list[Tensor]]:
        """Take the newest record off the tape, on the tape's device."""
        return self.pop_flat().tensors()

    def pop_flat(self) -> FlatRecord:
        """The same as one tensor."""
        flat, layouts = self._records.pop()
        self.nbytes -= flat.numel()
        if self._stream is not None:
            fetched, event = self._ahead if self._ahead is not None else self._fetch(flat)
            torch.cuda.current_stream(self.device).wait_event(event)
            fetched.record_stream(torch.cuda.current_stream(self.device))
            self._ahead = self._fetch(self._records[-1][0]) if self._records else None
            flat = fetched
        return FlatRecord(flat, layouts)

    def close(self) -> None:
        """Forget every record and free what held them."""
        if self._stream is not None:
            self._stream.synchronize()
        self._records.clear()
        self._ahead = None
        self.nbytes = 0
        if self._store is not None:
            self._store.close()

    def _push(self, parts: list[tuple[int, Tensor]], size: int, layouts: list[list[_Layout]]) -> None:
        self._records.append((self._keep(parts, size), layouts))
        self._ahead = None
        self.nbytes += size
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def _keep(self, parts: list[tuple[int, Tensor]], size: int) -> Tensor:
        if self._stream is None and self._store is not None:
            flat = self._store.allocate(size)
        else:
            flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        _joined(parts, flat)
        if self._stream is None or self._store is None:
            return flat
        kept = self._store.allocate(size)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            kept.copy_(flat, non_blocking=True)
        flat.record_stream(self._stream)
        return kept

    def _fetch(self, kept: Tensor) -> tuple[Tensor, "torch.cuda.Event"]:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            fetched = kept.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return fetched, event


def _lay_out(record: list[list[Tensor]]) -> tuple[list[list[_Layout]], list[tuple[int, Tensor]], int]:
    """Where each tensor goes in a flat record, its bytes with their offset, and the bytes of all."""
    layouts: list[list[_Layout]] = []
    parts: list[tuple[int, Tensor]] = []
    end = 0
    for tensors in record:
        layouts.append([])
        for tensor in tensors:
            data = tensor.detach().contiguous()
            layouts[-1].append(_Layout(data.dtype, data.shape, end))
            parts.append((end, data.flatten().view(torch.uint8)))
            end += math.ceil(data.nbytes / ALIGNMENT) * ALIGNMENT
    return layouts, parts, end


def _joined(parts: list[tuple[int, Tensor]], flat: Tensor) -> Tensor:
    """``flat`` with the parts copied to their offsets."""
    if parts:
        places = [flat[offset : offset + part.numel()] for offset, part in parts]
        torch._foreach_copy_(places, [part for _, part in parts])  # in a few launches
    return flat


class _Store:
    """Slabs of host or disk memory, each twice the last, that records are laid into."""

    def __init__(self, place: str, device: torch.device, directory: str | Path | None) -> None:
        self._pinned = place == "host" and device.type == "cuda"
        self._file: IO[bytes] | None = None
        if place == "disk":
            try:
                self._file = tempfile.TemporaryFile(prefix="rwkv-rev-tape-", dir=directory)  # noqa: SIM115 (closed by close)
            except OSError as error:
                raise StrategyError(
                    f"no tape can be written in {str(directory)!r} ({error.strerror}); "
                    "name an existing, writable folder with tape_dir"
                ) from error
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._size = _SMALLEST_SLAB
        self._file_size = 0

    def allocate(self, size: int) -> Tensor:
        if self._used + size > self._slab.numel():
            self._size = min(2 * self._size, _LARGEST_SLAB)
            self._slab = self._new_slab(max(self._size, size))
            self._used = 0
        self._used += size
        return self._slab[self._used - size : self._used]

    def close(self) -> None:
        # Regions are unmapped with the last tensor that views them: closing them here would leave it dangling.
        self._slab = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _new_slab(self, size: int) -> Tensor:
        if self._file is None:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        size = math.ceil(size / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            _grow(self._file, self._file_size, size)
            region = mmap.mmap(self._file.fileno(), size, offset=self._file_size)
        except OSError as error:
            raise StrategyError(
                f"the disk tape cannot grow by {size / 2**20:.0f} MiB ({error.strerror}); "
                "choose a folder with more room with tape_dir"
            ) from error
        self._file_size += size
        return torch.frombuffer(region, dtype=torch.uint8)


def _grow(file: IO[bytes], start: int, size: int) -> None:
    """Add ``size`` bytes at ``start``, allocated now: a full disk is an OSError here, a killed process later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, size)
        return
    file.seek(start)
    zeros = bytes(min(size, _SMALLEST_SLAB))
    for written in range(0, size, len(zeros)):
        file.write(zeros[: size - written])
    file.flush()
