"""The checkpoints of a run: which there are, and whether they still are what was written.

A checkpoint is written into a hidden folder and renamed, so that a kill leaves no half of one under its name. What
happens to it later (a file deleted, a copy cut short, a flipped bit) is told by ``checksums.json``, written before
the rename: size and CRC-32 of every other file. CRC-32 finds any one flipped bit and any damage within 32 bits, other
damage but for one case in 2^32; it does not protect against somebody who forges files. Each file is read once more
after it was written and once before it is resumed from, at 1 to 1.7 GB/s on one core (SHA-256: 0.4 to 0.6).
"""

import json
import re
import shutil
import zlib
from pathlib import Path

from rwkv_rev.folders.safe_output import sync_tree

PREFIX = "checkpoint"
"""What transformers calls them: ``checkpoint-STEP``."""
RUN_NAME = "rwkv_rev_run.json"
CHECKSUMS = "checksums.json"
_BLOCK = 1 << 20


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run wrote into its working folder, damaged ones too, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}-*") if _step(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps trained before it was written."""
    step = _step(checkpoint)
    assert step is not None
    return step


def seal(folder: Path) -> None:
    """Write the checksums of a finished checkpoint, and flush all of it to the disk."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / CHECKSUMS).write_text(json.dumps(files, indent=1), "utf-8")
    sync_tree(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as it was written."""
    if (wrong := _no_file(folder, CHECKSUMS)) is not None:
        return wrong
    expected = listed(folder)
    for name, (nbytes, crc) in expected.items():
        path = folder / name
        try:
            if (wrong := _no_file(folder, name)) is not None:
                return wrong
            if path.stat().st_size != nbytes:
                return f"{name} has {path.stat().st_size:,} bytes instead of {nbytes:,}"
            if checksum(path) != crc:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    if not expected:
        return f"{CHECKSUMS} cannot be read"
    return None if RUN_NAME in expected else f"{CHECKSUMS} is of something else"


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and CRC-32 of every file by the checksums of a checkpoint; empty where they cannot be read."""
    if _no_file(folder, CHECKSUMS) is not None:
        return {}
    try:
        files = json.loads((folder / CHECKSUMS).read_text("utf-8"))
        return {str(name): (int(values["bytes"]), str(values["crc32"])) for name, values in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}


def _no_file(folder: Path, name: str) -> str | None:
    """Why a file of a checkpoint is not to be opened: a pipe that nobody writes to would never answer."""
    path = folder / name
    if path.is_file():
        return None
    return f"{name} is no regular file" if path.exists() else f"{name} is missing"


def checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def discard(folder: Path) -> None:
    """Delete a folder; a process killed meanwhile leaves no half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _step(path: Path) -> int | None:
    found = re.fullmatch(rf"{PREFIX}-([0-9]{{1,18}})", path.name)
    return None if found is None else int(found[1])
