"""The tape: a stack of records, each the tensors of one chunk boundary by layer, kept off the accelerator.

Three places to keep it: ``host`` memory (pinned, copied on a stream of its own while the GPU computes), ``device``
memory, or a memory-mapped file on ``disk``. The file has no name in the file system (or is deleted when the last
handle closes, on Windows), so nothing stays behind when the process is killed; one piece of it is mapped at a time.
Records are popped last in, first out; the one below the top is fetched ahead.

Some 120 bytes of this process's memory say of a record of few tensors where it is, and what it is made of.
"""

import math
import mmap
import os
import tempfile
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.errors import StrategyError

ALIGNMENT = 16
_SMALLEST_SLAB = 2**22
_LARGEST_SLAB = 2**28
_LARGEST_PIECE = 2**22
"""Of a file, that is mapped at once."""


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
        self._shapes = _Shapes()
        self._records: list[bytes] = []
        self._places = array("q")  # of each record, and its size
        self._store: _Slabs | _Tensors = (
            _Tensors(device) if place == "device" else _Slabs(place, device, directory)
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and place != "device" else None
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
        layouts = self._shapes.unpacked(self._records.pop())
        size, place = self._places.pop(), self._places.pop()
        flat = self._store.take(place, size)
        self.nbytes -= size
        if self._stream is not None:
            fetched, event = self._ahead if self._ahead is not None else self._fetch(flat)
            torch.cuda.current_stream(self.device).wait_event(event)
            fetched.record_stream(torch.cuda.current_stream(self.device))
            self._ahead = self._fetch(self._store.at(*self._places[-2:])) if self._records else None
            flat = fetched
        return FlatRecord(flat, layouts)

    def close(self) -> None:
        """Forget every record and free what held them."""
        if self._stream is not None:
            self._stream.synchronize()
        self._records.clear()
        self._places = array("q")
        self._ahead = None
        self.nbytes = 0
        self._store.close()

    def _push(self, parts: list[tuple[int, Tensor]], size: int, layouts: list[list[_Layout]]) -> None:
        place, kept = self._store.allocate(size)
        self._fill(kept, parts)
        self._records.append(self._shapes.packed(layouts))
        self._places.extend((place, size))
        self._ahead = None
        self.nbytes += size
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def _fill(self, kept: Tensor, parts: list[tuple[int, Tensor]]) -> None:
        if self._stream is None:
            _joined(parts, kept)
            return
        flat = _joined(parts, torch.empty(kept.numel(), dtype=torch.uint8, device=self.device))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            kept.copy_(flat, non_blocking=True)
        flat.record_stream(self._stream)

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
            end += _aligned(data.nbytes)
    return layouts, parts, end


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _joined(parts: list[tuple[int, Tensor]], flat: Tensor) -> Tensor:
    """``flat`` with the parts copied to their offsets."""
    if parts:
        places = [flat[offset : offset + part.numel()] for offset, part in parts]
        torch._foreach_copy_(places, [part for _, part in parts])  # in a few launches
    return flat


class _Shapes:
    """Layouts as a few bytes each: which kind (types and numbers of dimensions, of few kinds), and the dimensions."""

    def __init__(self) -> None:
        self._kinds: list[tuple[tuple[tuple[torch.dtype, int], ...], ...]] = []
        self._last: tuple[list[list[_Layout]], bytes] = [], b""

    def packed(self, layouts: list[list[_Layout]]) -> bytes:
        """Those of a record; the same object as before where they are the same."""
        known, last = self._last
        if layouts == known and last:
            return last
        kind = tuple(tuple((one.dtype, len(one.shape)) for one in layer) for layer in layouts)
        if kind not in self._kinds:
            self._kinds.append(kind)
        sizes = [size for layer in layouts for one in layer for size in one.shape]
        self._last = layouts, array("q", [self._kinds.index(kind), *sizes]).tobytes()
        return self._last[1]

    def unpacked(self, packed: bytes) -> list[list[_Layout]]:
        """What was packed."""
        known, last = self._last
        if packed is last:
            return known
        kind, *rest = array("q", packed)
        sizes, end = iter(rest), 0
        layouts: list[list[_Layout]] = []
        for layer in self._kinds[kind]:
            layouts.append([])
            for dtype, dimensions in layer:
                shape = torch.Size([next(sizes) for _ in range(dimensions)])
                layouts[-1].append(_Layout(dtype, shape, end))
                end += _aligned(shape.numel() * dtype.itemsize)
        self._last = layouts, packed
        return layouts


class _Tensors:
    """A tensor of its own for each record, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

    def allocate(self, size: int) -> tuple[int, Tensor]:
        """The number of a place for the next record, and the place."""
        self._tensors.append(torch.empty(size, dtype=torch.uint8, device=self._device))
        return len(self._tensors) - 1, self._tensors[-1]

    def at(self, place: int, size: int) -> Tensor:
        """The record at a place."""
        return self._tensors[place]

    def take(self, place: int, size: int) -> Tensor:
        """The newest record, whose place is given back."""
        return self._tensors.pop()

    def close(self) -> None:
        self._tensors.clear()


class _Slabs:
    """Slabs of host memory or pieces of a file, each twice the last, that records are laid into.

    Of a file one piece is mapped, that of the newest record: mapped pages count as the process's memory.
    """

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
        self._starts: list[int] = []  # of slabs, in bytes of all
        self._sizes: list[int] = []
        self._slabs: list[Tensor | None] = []  # None where nothing is mapped
        self._used = 0
        self._end = 0

    def allocate(self, size: int) -> tuple[int, Tensor]:
        """A place for the next record, in bytes from the first slab's start, and what is there."""
        room = max(size, ALIGNMENT)  # a place of its own for one without bytes, too
        if not self._sizes or self._used + room > self._sizes[-1]:
            self._add(room)
        place = self._starts[-1] + self._used
        self._used += room
        return place, self.at(place, size)

    def at(self, place: int, size: int) -> Tensor:
        """The record at a place, in the last slab or the one before it."""
        number = len(self._starts) - 1
        while self._starts[number] > place:
            number -= 1
        slab = self._slabs[number]
        if slab is None:
            slab = self._slabs[number] = self._map(self._starts[number], self._sizes[number])
        return slab[place - self._starts[number] :][:size]

    def take(self, place: int, size: int) -> Tensor:
        """The newest record; its slab is let go with its oldest one. Its place is not used again: it may be read."""
        found = self.at(place, size)
        if place == self._starts[-1]:
            self._drop()
        return found

    def close(self) -> None:
        # Regions are unmapped with the last tensor that views them: closing them here would leave it dangling.
        self._slabs.clear()
        self._starts.clear()
        self._sizes.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop(self) -> None:
        for each in (self._starts, self._sizes, self._slabs):
            each.pop()
        self._used = self._sizes[-1] if self._sizes else 0

    def _add(self, least: int) -> None:
        largest = _LARGEST_SLAB if self._file is None else min(_LARGEST_SLAB, _LARGEST_PIECE)
        size = max(least, min(2 * self._sizes[-1], largest) if self._sizes else _SMALLEST_SLAB)
        if self._file is None:
            slab = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
        else:
            size = math.ceil(size / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            slab = self._map(self._end, size, grow=True)
            self._slabs = [None] * len(self._slabs)
        self._starts.append(self._end)
        self._sizes.append(size)
        self._slabs.append(slab)
        self._end += size
        self._used = 0

    def _map(self, start: int, size: int, *, grow: bool = False) -> Tensor:
        """A piece of the file, which must be there or is added at its end."""
        assert self._file is not None
        try:
            if grow:
                _grow(self._file, start, size)
            region = mmap.mmap(self._file.fileno(), size, offset=start)
        except OSError as error:
            raise StrategyError(
                f"the disk tape cannot grow by {size / 2**20:.0f} MiB ({error.strerror}); "
                "choose a folder with more room with tape_dir"
            ) from error
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
