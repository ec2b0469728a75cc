"""Out of memory, out of disk, out of processes: one line that says which, when, and what helps.

Memory runs out as ``torch.OutOfMemoryError`` (a GPU), ``MemoryError`` (Python, numpy) or a plain RuntimeError of
torch's CPU allocator; a disk as an OSError, or as an error of safetensors and of torch's zip writer, which name no
errno. What is none of these passes through.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rwkv_rev.distributed.context_group import GONE, is_of_connections
from rwkv_rev.errors import ContextParallelError, OutputError, RwkvRevError
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.working_folder import what_is_kept

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_ROOM_TEXTS = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *("PytorchStreamWriter failed writing", "iostream error", "unexpected pos"),  # torch.save
)
_HOST_TEXTS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


class OutOfMemory(RwkvRevError):
    """Memory of the device or of the host ran out."""


class Whereabouts(TrainerCallback):
    """Knows what a run is at: ``now`` is ``at step 3`` or ``after step 3``."""

    def __init__(self) -> None:
        self.now = "before the first step"

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now = f"at step {state.global_step + 1}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now = f"after step {state.global_step}"


@contextmanager
def told_in_one_line(config: FinetuneConfig, where: Whereabouts) -> Iterator[None]:
    """Context manager that turns a shortage inside it into one line.

    Raises:
        OutOfMemory: where memory ran out. OutputError: where the disk did. RwkvRevError: where a process is gone.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, RwkvRevError, SafetensorError) as error:
        place = memory_that_ran_out(error)
        if place is not None:
            raise OutOfMemory(
                f"out of memory {place} {where.now}: use {', '.join(_smaller(config))}; {what_is_kept(config)}"
            ) from error
        told = isinstance(error, RwkvRevError) and not isinstance(error, OutputError)  # the tape's own advice
        if disk_is_full(error) and not told:
            raise OutputError(
                f"no room left on the disk of {config.working_directory} or the quota is used up, {where.now}: "
                "make room (a checkpoint has the size of the model and, with tune = full, twice that); "
                f"{what_is_kept(config)}"
            ) from error
        found_gone = isinstance(error, ContextParallelError) and GONE in str(error)
        if found_gone or (not isinstance(error, RwkvRevError) and is_of_connections(error)):
            raise RwkvRevError(
                f"another process of this run {GONE}, {where.now}: {what_is_kept(config)}"
            ) from error
        raise


def memory_that_ran_out(error: BaseException) -> str | None:
    """``on the device`` or ``on the host`` where an exception says that memory ran out there; else None."""
    for cause in _chain(error):
        if isinstance(cause, torch.OutOfMemoryError):
            return "on the device"
        if isinstance(cause, MemoryError):
            return "on the host"
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _HOST_TEXTS):
            return "on the host"
    return None


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception says that a file could not grow."""
    return any(
        (isinstance(cause, OSError) and cause.errno in _NO_ROOM)
        or any(text in str(cause) for text in _NO_ROOM_TEXTS)
        for cause in _chain(error)
    )


def _smaller(config: FinetuneConfig) -> list[str]:
    """What takes less memory and does not forbid to go on from a checkpoint."""
    remedies = [f"a shorter --chunk-length than {config.chunk_length}"]
    if config.bptt == "full":
        remedies = ["--bptt reversible"]
    if not config.checkpoint_blocks:
        remedies.append("--set checkpoint_blocks=true")
    if config.tape != "disk":
        remedies.append("--tape disk")
    if not (config.shard_optimizer or config.shard_model):
        remedies.append("--shard-optimizer or --shard-model with several processes")
    return remedies


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
