"""Memory and disks that run out: one line, nothing half-written, and a run that can be gone on with."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings

from rwkv_rev.errors import OutputError
from rwkv_rev.training.checkpoints import checkpoints, damage
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.shortage import OutOfMemory, disk_is_full, memory_that_ran_out
from rwkv_rev.training.trainer import RwkvRevTrainer


@pytest.fixture
def config(shallow: dict[str, Path], tmp_path: Path) -> FinetuneConfig:
    data = counting_text(tmp_path / "data.txt", 100)
    values: dict[str, Any] = {"max_steps": 3, "save_every": 1, "context_length": 128, "batch_size": 1}
    return settings(shallow["4"], data, tmp_path / "out", **values)


def allocator_error() -> RuntimeError:
    """What torch's CPU allocator raises, by asking it for too much."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("kind", ["device", "host", "allocator"])
def test_out_of_memory(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    error = {
        "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB"),
        "host": MemoryError,
        "allocator": allocator_error,
    }[kind]()
    compute = RwkvRevTrainer.compute_loss

    def fail(self: RwkvRevTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise error
        return compute(self, *args, **kwargs)

    place = "device" if kind == "device" else "host"
    with monkeypatch.context() as patch:
        patch.setattr(RwkvRevTrainer, "compute_loss", fail)
        with pytest.raises(
            OutOfMemory, match=f"^out of memory on the {place} at step 3: use a shorter"
        ) as caught:
            finetune(config)
    text = str(caught.value)
    assert "\n" not in text and "checkpoint-2 is kept: the same command with resume=" in text
    for remedy in ("chunk_length than 64", "checkpoint_blocks=true", "tape='disk'"):
        assert remedy in text
    config.resume, config.chunk_length, config.checkpoint_blocks = "auto", 64, True
    finetune(config)
    assert len(losses(Path(config.output))) == 3


@contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """Files cannot grow beyond ``nbytes``: real writes, cut off in the middle as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the system")
@pytest.mark.parametrize("nbytes", [1 << 20, 3 << 20], ids=["weights", "optimizer"])
def test_a_full_disk_while_a_checkpoint_is_written(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    """The weights take 2 MB, the optimizer's state 4 MB."""
    save = RwkvRevTrainer._save_checkpoint

    def limited(self: RwkvRevTrainer, *args: Any) -> None:
        if self.state.global_step == 1:
            return save(self, *args)
        with small_files(nbytes):
            return save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RwkvRevTrainer, "_save_checkpoint", limited)
        with pytest.raises(
            OutputError, match=r"^no room left on the disk of .* after step 2: make room"
        ) as caught:
            finetune(config)
    assert "\n" not in str(caught.value) and "checkpoint-1 is kept" in str(caught.value)
    (kept,) = checkpoints(config.working_directory)
    assert damage(kept) is None
    assert {path.name for path in config.working_directory.iterdir()} == {
        ".lock",
        "log.jsonl",
        "checkpoint-1",
    }
    config.resume = "auto"
    finetune(config)
    assert len(losses(Path(config.output))) == 3 and not config.working_directory.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the system")
def test_a_full_disk_while_the_output_is_written(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rwkv_rev.training import finetune as module

    save = module.save_finetuned

    def limited(*args: Any) -> None:
        with small_files(1 << 20):
            save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_finetuned", limited)
        with pytest.raises(OutputError, match=r"no room left .* while .*out was written: make room"):
            finetune(config)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data.txt", "cache", "out.training"}
    config.resume = "auto"
    finetune(config)


def test_what_is_a_shortage() -> None:
    nested = RuntimeError("something")
    nested.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk_is_full(nested) and memory_that_ran_out(nested) is None
    assert not disk_is_full(OSError(errno.EACCES, "no")) and not disk_is_full(RuntimeError("shape mismatch"))
    assert memory_that_ran_out(allocator_error()) == "on the host"
    assert memory_that_ran_out(RuntimeError("shape mismatch")) is None
