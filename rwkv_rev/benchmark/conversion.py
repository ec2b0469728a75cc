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
from rwkv_rev.converters.conversion import convert
from rwkv_rev.converters.export import export
from rwkv_rev.converters.reading import check_finite, file_sha256
from rwkv_rev.errors import RwkvRevError


def conversion_rows(settings: BenchSettings, folder: Path | None = None) -> list[dict[str, Any]]:
    """One row: bytes per second of converting and of copying, medians of turns.

    Args:
        settings: ``shape`` (its checkpoint is made first), ``dtype`` that it is stored in, ``repeats``.
        folder: where to work, on the disk to be measured; the system's temporary folder when None.
    """
    with tempfile.TemporaryDirectory(prefix="rwkv-rev-bench-", dir=folder) as name:
        work = Path(name)
        source = checkpoint_file(settings, work)
        size = source.stat().st_size
        actions: dict[str, Callable[[], object]] = {
            "convert": lambda: convert(source, work / "model", tokenizer="none"),
            "copy": lambda: _copy(source, work / "copy"),
            "sha256": lambda: file_sha256(source),
            "finite": lambda: _check(source),
        }
        times: dict[str, list[float]] = {action: [] for action in actions}
        for turn in range(1 + settings.repeats):
            for action, call in actions.items():
                start = time.perf_counter()
                call()
                if turn:
                    times[action].append(time.perf_counter() - start)
                shutil.rmtree(
                    work / "model", ignore_errors=True
                )  # outside the time: neither replaces anything
                (work / "copy").unlink(missing_ok=True)
        rates = {action: size / statistics.median(seconds) for action, seconds in times.items()}
    return [
        {
            "setting": "convert",
            "bytes": size,
            "convert_bytes_per_second": rates["convert"],
            "copy_bytes_per_second": rates["copy"],
            "convert_to_copy": rates["convert"] / rates["copy"],
            "sha256_bytes_per_second": rates["sha256"],
            "check_bytes_per_second": rates["finite"],
        }
    ]


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


def _check(source: Path) -> None:
    for name, tensor in torch.load(source, map_location="cpu", weights_only=True, mmap=True).items():
        check_finite(name, tensor)
