"""What runs leave in ``OUTPUT.training``, told by names and kinds from what somebody else put there.

Only the first is ever removed. In a checkpoint that is what its checksums list, and, where these are damaged, files of
the names that checkpoints have. What file managers leave in every folder is nobody's.
"""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from rwkv_rev.training.checkpoints import CHECKSUMS, PREFIX, RUN_NAME, listed

_FILES = re.compile(r"\.lock|\.?(log|samples)\.jsonl")
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")
_CHECKPOINT = re.compile(rf"{PREFIX}-[0-9]{{1,18}}")
_IN_CHECKPOINT = re.compile(
    rf"{re.escape(CHECKSUMS)}|{re.escape(RUN_NAME)}|(carried_state_\d+|tuned_state)\.safetensors"  # ours
    r"|(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"
    r"|adapter_config\.json|adapter_model\.safetensors"  # peft's
)
_TENSORBOARD = re.compile(r"events\.out\.tfevents\..*")


def foreign(working: Path) -> list[Path]:
    """Files, links and empty folders in a working folder that no run wrote, sorted."""
    found = [inner for path in _children(working) for inner in foreign_in(path)]
    return sorted(path for path in found if os.path.lexists(path))  # another run may be removing it


def foreign_in(path: Path) -> list[Path]:
    """:func:`foreign` of one entry of a working folder: inside it, or the entry itself."""
    if not _is_folder(path):
        return [] if (_FILES.fullmatch(path.name) and _is_file(path)) or _is_litter(path) else [path]
    if re.fullmatch(rf"\.{_CHECKPOINT.pattern}\.deleted", path.name):
        return []
    if path.name == ".writing":
        return [
            inner
            for inner in _children(path)
            if not (_is_folder(inner) and _CHECKPOINT.fullmatch(inner.name)) and not _is_litter(inner)
        ]
    inside = _leaves(path)
    if _CHECKPOINT.fullmatch(path.name):
        names = {*listed(path)}
        return [inner for inner in inside if not _of_checkpoint(inner, path, names)]
    if path.name == "runs":
        return [inner for inner in inside if not (_is_file(inner) and _TENSORBOARD.fullmatch(inner.name))]
    return inside or [path]


def _of_checkpoint(path: Path, checkpoint: Path, names: set[str]) -> bool:
    name = path.relative_to(checkpoint).as_posix()
    return _is_litter(path) or (_is_file(path) and (name in names or bool(_IN_CHECKPOINT.fullmatch(name))))


def _leaves(folder: Path) -> list[Path]:
    """Everything below a folder that is no folder with something in it; links are not followed."""
    found: list[Path] = []
    for path in _children(folder):
        below = _leaves(path) if _is_folder(path) else []
        found += below or [path]
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_litter(path: Path) -> bool:
    """What file managers and network disks leave."""
    return bool(_LITTER.fullmatch(path.name)) and _is_file(path)


def _is_file(path: Path) -> bool:
    return _has_kind(path, stat.S_ISREG)


def _is_folder(path: Path) -> bool:
    return _has_kind(path, stat.S_ISDIR)


def _has_kind(path: Path, holds: Callable[[int], bool]) -> bool:
    """Of the thing itself, not of what a link points to; False for what has gone."""
    try:
        return holds(path.lstat().st_mode)
    except FileNotFoundError:
        return False
