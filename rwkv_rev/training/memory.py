"""Memory of a run: what it will take, how much there is, and how much is used on the device that trains."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.architecture import NUMBER
from rwkv_rev.bptt import choose_strategy, cuda_graphs
from rwkv_rev.chunk_length import ChosenLength, choose, free_bytes
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import StrategyError
from rwkv_rev.forecast import RECORDED_SHARE, StrategyForecast, runs_fused
from rwkv_rev.forecast import forecast_memory as forecast_strategies
from rwkv_rev.foreign.quantised import bytes_of
from rwkv_rev.training.config import FinetuneConfig

LEAST_SHARE = 0.6
"""Of a forecast that a run takes at least: frozen weights let the graph drop inputs that are counted."""
_ADAM = 2 * NUMBER


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes a run will take on its device and on the tape.

    Attributes:
        gradient: of one loss and its gradient (:mod:`rwkv_rev.forecast`).
        optimizer: AdamW's two moments of the trained weights that this process keeps.
        kept_gradients: further copies of the gradients: accumulated ones, and the buckets of several processes.
        tokens_at_once: length of what is in the graph, a chunk or for ``full`` the whole context.
        tape_beside: the tape, where it lies in the memory of the device that trains; else 0.
    """

    gradient: StrategyForecast
    optimizer: int
    kept_gradients: int
    tokens_at_once: int
    tape_beside: int = 0

    @property
    def device(self) -> int:
        """The peak of all that lies in the memory of the device."""
        return self.gradient.device + self.optimizer + self.kept_gradients + self.tape_beside

    @property
    def reserved(self) -> int:
        """What the device must have, with recordings of launches if they last."""
        return self.gradient.reserved + self.optimizer + self.kept_gradients

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "strategy": self.gradient.strategy,
            "tokens_at_once": self.tokens_at_once,
            "weights": self.gradient.parameters,
            "gradients": self.gradient.gradients + self.kept_gradients,
            "optimizer": self.optimizer,
            "graph": self.gradient.graph,
            "device": self.device,
            "recordings": self.gradient.recordings,
            "reserved": self.reserved,
            "tape": self.gradient.tape,
            "tape_is_estimate": self.gradient.lifted and self.gradient.strategy == "reversible",
        }


def forecast_memory(
    model: RwkvRevConfig,
    log_decays: Sequence[Tensor],
    config: FinetuneConfig,
    *,
    parameters: int,
    quantised: Sequence[tuple[int, int]] = (),
    trained: int,
    longest: int,
    device: str,
    dtype: str,
    world_size: int = 1,
    pieces: Callable[[int], int] | None = None,
    lifted: bool = False,
) -> MemoryForecast:
    """What a run will take whose chunk length is a number.

    Args:
        model: of the model. log_decays: per layer log w.
        config: of the run.
        parameters, trained: number of weights, and of those with a gradient.
        quantised: shapes [out, in] of the linear maps in 4 or 8 bits.
        longest: tokens of the longest row.
        device, dtype: of the arithmetic.
        world_size: number of processes; of those that share a context, chunk length and longest row are each one's own.
        pieces: of packed rows, the most pieces of documents that so many tokens of one have.
        lifted: whether remnants are.
    """
    assert not isinstance(config.chunk_length, str)
    chunk, place = config.chunk_length, torch.device(device)
    shards = world_size if config.shard_model else 1
    name = choose_strategy(config.bptt, longest, chunk_length=chunk).name
    # what int8 gives is as wide as what it takes, and norms give float32
    half = dtype != "float32" and config.quantise != "int8"
    forecasts = forecast_strategies(
        model,
        log_decays,
        parameters - sum(outputs * inputs for outputs, inputs in quantised),
        context_length=longest,
        batch_size=config.batch_size,
        chunk_length=chunk,
        trained=trained,
        half=half,
        weight_bytes=NUMBER if config.tune == "full" or dtype == "float32" else 2,
        quantised_bytes=bytes_of(config.quantise, quantised) if config.quantise is not None else 0,
        checkpoint_blocks=config.checkpoint_blocks,
        fused=runs_fused(model, place),
        recorded=dtype != "float16" and cuda_graphs.possible(place) and not config.shard_model,
        pieces=pieces,
        lifted=lifted,
        ranks=config.context_parallel,
        shards=shards,
    )
    # reversible-lossy takes a little less tape than reversible, and the same device memory
    like = "reversible" if name == "reversible-lossy" else name
    (gradient,) = (forecast for forecast in forecasts if forecast.strategy == like)
    return MemoryForecast(
        gradient,
        optimizer=optimizer_bytes(trained, world_size if config.shard_optimizer else shards),
        kept_gradients=kept_gradient_bytes(trained, world_size // shards, config.grad_accum) // shards,
        tokens_at_once=longest if name == "full" else min(chunk, longest),
        tape_beside=gradient.tape
        if config.tape == "device" or (config.tape, device) == ("host", "cpu")
        else 0,
    )


def optimizer_bytes(trained: int, shares: int = 1) -> int:
    """AdamW's two moments in float32, spread over so many processes."""
    return _ADAM * trained // shares


def kept_gradient_bytes(trained: int, world_size: int, grad_accum: int = 1) -> int:
    """Further copies of the gradients: accumulated ones, and the buckets of several processes."""
    return ((grad_accum > 1) + (world_size > 1)) * NUMBER * trained


def choose_length(
    config: FinetuneConfig,
    device: torch.device,
    forecast: Callable[[int, int], MemoryForecast],
    longest: int,
    trained: int,
) -> ChosenLength:
    """What ``chunk_length = auto`` is for a run.

    Args:
        forecast: of chunks and a longest row of so many tokens, before the model is on the device.
        longest: tokens of the longest row.
        trained: number of weights with a gradient.
    """
    # an addition to a map [out, in] has rank * (in + out) weights, and keeps in + out numbers per token
    kept = trained // config.lora_rank if config.tune == "lora" else 0

    def need(chunk: int) -> int:
        # rows of one chunk are stored whole under ``auto``
        each = [forecast(chunk, min(longest, chunk)), forecast(chunk, max(longest, 2 * chunk))]
        tape = each[1].gradient.tape if config.tape == "device" else 0
        additions = round(RECORDED_SHARE * NUMBER * config.batch_size * min(chunk, longest) * kept)
        return max(one.reserved for one in each) + tape + additions

    return choose(config.bptt, device, need)


def refuse_too_large(forecast: MemoryForecast, device: torch.device, config: FinetuneConfig) -> list[str]:
    """Raise StrategyError when a run cannot fit; returns warnings where it may not.

    The processes that a launcher starts on one host (``LOCAL_WORLD_SIZE``) share the host's memory.
    """
    warnings = []
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, host = free_memory(device), free_memory(torch.device("cpu"))
    smaller = "--bptt reversible" if config.bptt == "full" else "a shorter --chunk-length"
    on_device = forecast.device * (processes if device.type == "cpu" else 1)
    tape = forecast.gradient.tape * processes if config.tape == "host" else 0
    disk = "--tape disk, " if forecast.tape_beside else ""
    needs = [
        (tape, host, "for the tape on the host", "--tape disk or a longer --chunk-length"),
        (on_device, free, "on the device", f"{disk}{smaller}, a smaller --batch-size or --tune lora"),
    ]
    for need, there, place, remedy in needs:
        if there is None or need <= there:
            continue
        text = (
            f"{forecast.tokens_at_once:,} tokens at once need about {need / 1e9:.1f} GB {place}, "
            f"{there / 1e9:.1f} GB are free: use {remedy}"
        )
        if LEAST_SHARE * need > there:
            raise StrategyError(text)
        warnings.append(text)
    return warnings


class MemoryInUse:
    """Memory of a run beyond the loaded program: what a forecast counts.

    On a GPU that is the most that tensors took (``max_memory_allocated``). On the CPU the most resident memory since
    this was made, less what was resident then: make it when the program and the data are loaded and the model is not.
    There it holds a little more than tensors: code that is paged in meanwhile, and what the allocator keeps.
    Where the system tells its peak only since the process began (macOS), an earlier peak is taken for the beginning.

    Attributes:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        self._before = _resident_peak()

    @property
    def peak(self) -> int:
        """Bytes, the most so far; 0 where the system does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _resident_peak() - self._before)

    @property
    def process(self) -> int:
        """Bytes of host memory that this process had at most since then, the program itself included."""
        return _resident_peak()


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``; None if the system does not say."""
    if device.type == "cuda":
        return free_bytes(device)
    limits = [value for value in (_host_available(), _cgroup_available()) if value is not None]
    return min(limits) if limits else None


def _host_available() -> int | None:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_available() -> int | None:
    """What a container may still take (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        current = int((folder / "memory.current").read_text())
        inactive = 0
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                inactive = int(line.split()[1])  # cached files give way
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - current + inactive)
