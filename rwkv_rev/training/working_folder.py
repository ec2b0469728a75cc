"""``OUTPUT.training``: what lies there while a run lasts, who may use it, and where a run goes on.

It holds the lock, the log and the checkpoints. A run that has ended leaves OUTPUT alone; one that was killed after
OUTPUT was whole, but before the working folder had gone, finds both when it is started again with ``--resume auto``:
then there is nothing left to train (:func:`finished_run`).
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rwkv_rev.errors import CheckpointError, OutputError
from rwkv_rev.folders.safe_output import check_output
from rwkv_rev.printable import shortened
from rwkv_rev.training.checkpoints import checkpoints, damage, discard
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.identity import differences
from rwkv_rev.training.remains import foreign, foreign_in
from rwkv_rev.training.saving import HISTORY, SUMMARY_NAME, public
from rwkv_rev.training.sources import find_sources

LOG_NAME = "log.jsonl"
LOCK_NAME = ".lock"
WRITING = ".writing"
"""Where a checkpoint is until it is whole."""
_OF_OUTPUT = ("save_dtype", "chat_template", "keep_best", "patience")
"""Settings that an identity does not hold, and OUTPUT depends on."""
_OF_THE_BEST = ("min_delta", "eval_data", "eval_tokens", "eval_every")
"""And with ``keep_best`` or ``patience`` these, too."""


def refuse_output(config: FinetuneConfig) -> None:
    """Raise OutputError for an output that exists, holds what is read, or belongs to an unfinished run."""
    output = Path(config.output).absolute()
    resumed = None if config.resume == "auto" else config.resume
    read = (
        [source.path for source in find_sources([*config.data, *config.eval_data])] if output.exists() else []
    )
    prompts = [
        text[1:] for text in config.sample_prompt if text.startswith("@") and not text.startswith("@@")
    ]
    inputs = [*read, *prompts, config.chat_template, resumed]
    check_output(output, force=config.force, directory=True, reads=Path(config.model), inputs=inputs)
    working = config.working_directory
    refuse_foreign(working)
    if config.resume is None and not config.force and checkpoints(working):
        raise OutputError(
            f"{working} holds an unfinished run ({checkpoints(working)[-1].name}): --resume auto goes on with it, "
            "--force throws it away"
        )


def refuse_foreign(working: Path) -> None:
    """Raise OutputError for what is no folder, a link, a folder closed to us, or one that holds what no run wrote."""
    if working.is_symlink() or not working.is_dir():
        check_output(working.absolute(), force=True, directory=True)
        return
    if not os.access(working, os.R_OK | os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {working}: no permission; choose another --output")
    try:
        found = foreign(working)
    except OSError as error:
        raise OutputError(f"{working} cannot be looked at: {error.strerror or error}") from error
    if found:
        raise OutputError(
            f"{working} holds {named(working, found)}: move it away, or choose another --output"
        )


def named(working: Path, found: list[Path]) -> str:
    """Foreign paths in a few words."""
    more = f" and {len(found) - 1:,} more" if found[1:] else ""
    return f"{shortened(found[0].relative_to(working))}{more}, which no run wrote"


def may_be_finished(config: FinetuneConfig) -> bool:
    """Whether :func:`finished_run` is worth asking: it needs the data, which takes time to read."""
    if config.force or config.resume not in (None, "auto") or (summary := _summary(config)) is None:
        return False
    there, mine = summary["plan"].get("settings"), public(config.to_dict())
    return config.resume == "auto" or (isinstance(there, dict) and there.get("data") == mine["data"])


def finished_run(config: FinetuneConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The outcome written in OUTPUT, where the run that ``config`` describes has made it; else None.

    What changes neither weights nor OUTPUT's own files may be set otherwise, as where a run goes on.

    Raises:
        OutputError: where another run has made it, naming every setting in which they differ.
    """
    summary = _summary(config)
    if summary is None:
        return None
    there, before = summary["plan"].get("settings"), summary["plan"].get("identity")
    if not (isinstance(there, dict) and isinstance(before, dict)):
        return None
    defaults, mine = public(FinetuneConfig().to_dict()), public(config.to_dict())
    there = defaults | there
    chosen = any(values[name] for values in (there, mine) for name in ("keep_best", "patience"))
    names = (*_OF_OUTPUT, *(_OF_THE_BEST if chosen else ()))
    differ = differences(before, json.loads(json.dumps(identity)))
    differ += [
        f"{name} was {there[name]} and is now {mine[name]}" for name in names if there[name] != mine[name]
    ]
    if differ:
        raise OutputError(
            f"{config.output} already exists; pass --force to replace it, or choose another --output (another run has "
            f"made it: {', '.join(differ)})"
        )
    result: dict[str, Any] = summary["result"]
    return result


def resume_from(config: FinetuneConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, None for the beginning, and a warning for each damaged one passed over.

    Raises:
        CheckpointError: for a named checkpoint that is not whole, and where all are damaged.
    """
    if config.resume is None:
        return None, []
    if config.resume != "auto":
        path = Path(config.resume)
        if path not in checkpoints(path.parent):
            raise CheckpointError(f"{path} is not a whole checkpoint of a fine-tuning run; use --resume auto")
        if (wrong := damage(path)) is not None:
            raise CheckpointError(
                f"{path} is damaged: {wrong}; --resume auto takes the newest one that is whole"
            )
        return path, []
    warnings: list[str] = []
    for path in reversed(checkpoints(config.working_directory)):
        if (wrong := damage(path)) is None:
            return path, warnings
        warnings.append(f"{path} is damaged and passed over: {wrong}")
    if warnings:
        raise CheckpointError(
            f"{config.working_directory} holds no checkpoint that is whole ({'; '.join(warnings)}): "
            "without --resume, --force begins anew"
        )
    return None, []


def what_is_kept(config: FinetuneConfig) -> str:
    """How to go on with a run that was stopped."""
    kept = checkpoints(config.working_directory)
    if kept:
        return f"{kept[-1]} is kept: the same command with --resume auto goes on from it"
    return "there is no checkpoint yet (--save-every): the same command begins anew"


def lock(working: Path) -> FileLock:
    """Take the working folder, which is made if it is not there.

    Raises:
        OutputError: while another run has it, and as :func:`refuse_foreign`.
    """
    refuse_foreign(working)
    taken = FileLock(working / LOCK_NAME)
    try:
        working.mkdir(parents=True, exist_ok=True)
        taken.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{working} is in use by another run; wait for it or choose another --output"
        ) from None
    except OSError as error:
        raise OutputError(
            f"cannot write {working}: {error.strerror or error}; choose another --output"
        ) from error
    return taken


def sweep(working: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for path in [working / WRITING, *working.glob(".*.deleted")]:
        shutil.rmtree(path, ignore_errors=True)


def empty(working: Path) -> list[Path]:
    """Remove what a run left there, but for the lock, which is ours now; gives what no run wrote, and stays."""
    stays: list[Path] = []
    for path in working.iterdir():
        if found := foreign_in(path):
            stays += found
        elif path.is_dir():
            discard(path)
        elif path.name != LOCK_NAME:
            path.unlink()
    return sorted(stays)


def remove(working: Path, taken: FileLock) -> list[Path]:
    """Remove the working folder and give up its lock, in an order that leaves another run's folder alone.

    Gives what was put there meanwhile by somebody else, and stays.
    """
    stays: list[Path] = []
    with suppress(OSError):
        stays = empty(working)
    with suppress(OSError):  # Windows: goes when it is released
        (working / LOCK_NAME).unlink(missing_ok=True)
    taken.release()
    with suppress(OSError):  # somebody else's by now
        working.rmdir()
    return stays


def _summary(config: FinetuneConfig) -> dict[str, Any] | None:
    try:
        values = json.loads((Path(config.output) / HISTORY / SUMMARY_NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(values, dict) and all(
        isinstance(values.get(name), dict) for name in ("plan", "result")
    )
    return values if known else None
