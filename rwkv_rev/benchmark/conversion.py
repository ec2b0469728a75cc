"""Speed of conversion against the disk's own copy speed, in turns within one run.

Both read the same ``.pth`` and end with the written bytes on the disk (fsync). A conversion writes every value and
also checks each for NaN and infinity and takes the SHA-256 of the source; the rates of these two alone are given too,
because on a fast disk they are what bounds it.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.benchmark.models import SHAPES
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.bundled import bundled_path
from rwkv_rev.conversion import convert
from rwkv_rev.converters.export import export
from rwkv_rev.converters.reading import check_finite, file_sha256
from rwkv_rev.errors import RwkvRevError


def conversion_rows(settings: BenchSettings, folder: Path | None = None) -> list[dict[str, Any]]:
    """Bytes per second of converting and of copying, medians of turns.

    One row with the source in the system's cache, and one where it has to come from the disk (on systems that can be
    told to forget a file's pages).

    Args:
        settings: ``shape`` (its checkpoint is made first), ``dtype`` that it is stored in, ``repeats``.
        folder: where to work, on the disk to be measured; the system's temporary folder when None.
    """
    with tempfile.TemporaryDirectory(prefix="rwkv-rev-bench-", dir=folder) as name:
        place = Path(name)
        source = checkpoint_file(settings, place)
        size = source.stat().st_size
        both: dict[str, Callable[[], object]] = {
            "convert": lambda: convert(source, place / "model", tokenizer="none"),
            "copy": lambda: _copy(source, place / "copy"),
        }
        alone = both | {"sha256": lambda: file_sha256(source), "check": lambda: _check(source)}
        cached = _rates(alone, size, place, settings.repeats, lambda: None)
        rows = [{"setting": "convert", "bytes": size} | cached]
        if hasattr(os, "posix_fadvise"):
            uncached = _rates(both, size, place, settings.repeats, lambda: _forget(source))
            rows.append({"setting": "convert, source not cached", "bytes": size} | uncached)
    return rows


def _rates(
    actions: dict[str, Callable[[], object]],
    size: int,
    place: Path,
    repeats: int,
    before: Callable[[], object],
) -> dict[str, Any]:
    """Bytes per second of every action, in turns; ``before`` each is called outside the time."""
    times: dict[str, list[float]] = {action: [] for action in actions}
    for turn in range(1 + repeats):
        for action, call in actions.items():
            before()
            start = time.perf_counter()
            call()
            if turn:
                times[action].append(time.perf_counter() - start)
            shutil.rmtree(place / "model", ignore_errors=True)  # outside the time: neither replaces anything
            (place / "copy").unlink(missing_ok=True)
    rates = {action: size / statistics.median(seconds) for action, seconds in times.items()}
    found: dict[str, Any] = {f"{action}_bytes_per_second": rate for action, rate in rates.items()}
    return found | {"convert_to_copy": rates["convert"] / rates["copy"]}


def checkpoint_file(settings: BenchSettings, folder: Path) -> Path:
    """A ``.pth`` of the settings' model in ``folder``, or the bundled one where it lies."""
    if settings.shape.startswith("bundled:"):
        return bundled_path(settings.shape.removeprefix("bundled:"))
    if settings.shape not in SHAPES:
        raise RwkvRevError(
            f"a checkpoint is made for a shape or bundled:NAME, not for {settings.shape!r}; "
            f"there are {', '.join(SHAPES)}"
        )
    model = settings.model().cpu()
    model.save_pretrained(folder / "made")
    del model
    path = folder / "source.pth"
    export(folder / "made", path)
    shutil.rmtree(folder / "made")
    return path


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _forget(path: Path) -> None:
    """Let the system drop the file's pages from its cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # pages that wait to be written cannot be dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _check(source: Path) -> None:
    for name, tensor in torch.load(source, map_location="cpu", weights_only=True, mmap=True).items():
        check_finite(name, tensor)
