"""Temporary folders that a killed process does not leave for good.

Each holds a lock file that its process keeps locked; the system releases the lock with the process. Who makes the next
folder removes those of this user whose lock is free. Where a file system has no locks, nothing is removed.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"
_OURS = re.compile(r"rwkv-rev-(tokens|verify)-[a-z0-9_]{8}")
_JUST_MADE = 3600.0  # seconds after which nobody is about to put a lock into an empty folder


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """``tempfile.TemporaryDirectory`` as above; ``purpose`` is ``tokens`` or ``verify``."""
    folder, remove = make_temporary_folder(purpose)
    try:
        yield folder
    finally:
        remove()


def make_temporary_folder(purpose: str) -> tuple[Path, Callable[[], None]]:
    """A new folder, and what removes it."""
    root = Path(tempfile.gettempdir())
    _remove_abandoned(root)
    folder = Path(tempfile.mkdtemp(prefix=f"rwkv-rev-{purpose}-", dir=root))
    lock = FileLock(folder / LOCK_NAME)
    with suppress(OSError, NotImplementedError):  # no locks here
        lock.acquire(timeout=0)

    def remove() -> None:
        lock.release()  # Windows removes no file that is open
        shutil.rmtree(folder, ignore_errors=True)

    return folder, remove


def _remove_abandoned(root: Path) -> None:
    with suppress(OSError):
        for folder in root.iterdir():
            if _OURS.fullmatch(folder.name) and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        status = folder.lstat()
        if folder.is_symlink() or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
            return False
        if not (folder / LOCK_NAME).is_file():
            return not any(folder.iterdir()) and time.time() - status.st_mtime > _JUST_MADE
        lock = FileLock(folder / LOCK_NAME)
        lock.acquire(timeout=0)
        lock.release()
        return True
    except (OSError, NotImplementedError, Timeout):
        return False
