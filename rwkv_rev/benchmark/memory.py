"""Peak memory of one loss and its gradients against the context length, and where it runs out.

On a CUDA device: ``peak_bytes`` is ``max_memory_allocated`` (weights and gradients included) and ``reserved_bytes``
``max_memory_reserved``, what the allocator took from the device; the limit is the device's memory.

On the CPU every point runs in a process of its own, ``python -m rwkv_rev.benchmark.memory``: ``peak_bytes`` is the
most anonymous resident memory (RssAnon, sampled) beyond what the process held with the model loaded and warm. Pages
of files are not counted, so a tape on ``disk`` is not, one on ``host`` is. A limit is set on the process
(RLIMIT_DATA): an allocation above it fails as on a full machine, without harm to others. Linux only.
"""

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.benchmark.settings import DTYPES, BenchSettings
from rwkv_rev.benchmark.training import random_tokens, step
from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.modeling import RwkvRevForCausalLM

SAMPLE_SECONDS = 0.002
WARM_TOKENS = 64
OUT_OF_MEMORY = "out of memory"


def memory_rows(
    settings: BenchSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """One row per strategy and context length; longer contexts are left out once one ran out of memory.

    Args:
        settings: what to measure.
        on_row: called with each row as soon as it is there.
    """
    cuda = settings.device.type == "cuda"
    model = settings.model() if cuda else None
    limit = settings.memory_limit or (None if cuda else half_of_free_memory())
    rows = []
    for name, setting in settings.bptt().items():
        for length in settings.lengths:
            if model is not None:
                row = cuda_point(model, length, setting, settings.batch_size)
            else:
                row = _in_process(settings, length, setting, limit)
            row = {"setting": name, **setting, "tokens": length, **row}
            on_row(row)
            rows.append(row)
            if "error" in row:
                break
    return rows


def cuda_point(
    model: RwkvRevForCausalLM, length: int, setting: dict[str, Any], batch_size: int = 1
) -> dict[str, Any]:
    """Memory and seconds of one step on a CUDA device, after a short one that compiles what is to be compiled."""
    device = next(model.parameters()).device
    found: dict[str, Any] = {"limit_bytes": torch.cuda.get_device_properties(device).total_memory}
    ids = random_tokens(model, batch_size, length)
    chunk = setting.get("chunk_length", length)
    most = 4096 if setting["strategy"] == "full" else length if chunk == AUTO else 3 * chunk
    warm = ids[:, :most]
    try:
        with model.set_bptt(**setting):
            step(model, warm)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds, report = step(model, ids)
    except torch.cuda.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return found | {"error": OUT_OF_MEMORY}
    return found | {
        "seconds": seconds,
        "tokens_per_second": batch_size * length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "tape_bytes": report.get("tape_bytes", 0),
    }


def half_of_free_memory() -> int | None:
    """Half of the bytes that this machine has free now, where the system says."""
    from rwkv_rev.training.memory import free_memory

    free = free_memory(torch.device("cpu"))
    return None if free is None else free // 2


def _in_process(
    settings: BenchSettings, length: int, setting: dict[str, Any], limit: int | None
) -> dict[str, Any]:
    plain = asdict(settings) | {"device": "cpu", "dtype": str(settings.dtype).removeprefix("torch.")}
    job = {"settings": plain, "length": length, "bptt": setting, "limit": limit}
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_rev.benchmark.memory", str(torch.get_num_threads())],
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    extra = {} if limit is None else {"limit_bytes": limit}
    if done.returncode == -9:  # the system's own answer
        return extra | {"error": OUT_OF_MEMORY}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RwkvRevError(f"measuring {setting['strategy']} at {length} tokens failed: {said[-1]}")
    return extra | json.loads(done.stdout.splitlines()[-1])


class AnonymousPeak:
    """Context manager that watches this process's anonymous resident memory, in bytes."""

    def __enter__(self) -> "AnonymousPeak":
        self.before = self.peak = anonymous_memory()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """RssAnon of this process in bytes.

    Raises:
        RwkvRevError: where there is no /proc.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        raise RwkvRevError("memory on the CPU is measured on Linux only; use --device cuda")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def _limit_memory(more: int) -> None:
    """Let allocations fail that would take this process ``more`` bytes beyond what it has mapped now."""
    import resource

    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    total = int(fields["VmData"].split()[0]) * 1024 + more
    resource.setrlimit(resource.RLIMIT_DATA, (total, total))


def _measure_here(job: dict[str, Any]) -> dict[str, Any]:
    plain = job["settings"]
    plain |= {name: tuple(plain[name]) for name in ("lengths", "chunk_lengths", "strategies", "tapes")}
    plain |= {"device": torch.device(plain["device"]), "dtype": DTYPES[plain["dtype"]]}
    settings = BenchSettings(**plain)
    model = settings.model()
    ids = random_tokens(model, settings.batch_size, job["length"])
    with model.set_bptt(**job["bptt"]):
        step(model, ids[:, :WARM_TOKENS])
        gc.collect()
        if job["limit"] is not None:
            _limit_memory(job["limit"])
        try:
            with AnonymousPeak() as memory:
                start = time.perf_counter()
                seconds, report = step(model, ids)
        except (RuntimeError, MemoryError) as error:
            if (
                isinstance(error, RuntimeError)
                and "allocate" not in str(error)
                and "memory" not in str(error)
            ):
                raise
            return {"error": OUT_OF_MEMORY, "seconds_until": time.perf_counter() - start}
    return {
        "seconds": seconds,
        "tokens_per_second": settings.batch_size * job["length"] / seconds,
        "cpu_seconds": report["cpu_seconds"],
        "peak_bytes": memory.peak - memory.before,
        "tape_bytes": report.get("tape_bytes", 0),
    }


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    sys.stdout.write(json.dumps(_measure_here(json.load(sys.stdin))) + "\n")
