"""Memory of a run: what it will take, how much there is, and how much is used on the device that trains."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import StrategyError
from rwkv_rev.loss import LOGITS_AT_ONCE
from rwkv_rev.training.config import FinetuneConfig

GRAPH_NUMBERS = 30  # kept for the backward pass, per token, layer and channel; a round figure
REMNANT_SHARE = 0.57  # of whole states, at chunks of 256 tokens on a trained 5.2 model; more at longer chunks


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes a run will take on its device (weights, gradients, optimizer, graph) and on the tape.

    ``tokens_at_once``: length of what is in the graph, a chunk or for ``full`` the whole context.
    """

    weights: int
    optimizer: int
    graph: int
    tape: int
    tokens_at_once: int

    @property
    def device(self) -> int:
        return self.weights + self.optimizer + self.graph

    def to_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return dict(self.__dict__) | {"device": self.device}


def forecast_memory(
    model: RwkvRevConfig, config: FinetuneConfig, parameters: int, longest: int, dtype: str
) -> MemoryForecast:
    """Estimate, to within a factor of about two; ``longest`` is the longest row in tokens."""
    chunk = config.chunk_length or model.chunk_length
    strategy = config.bptt
    if strategy == "auto":
        strategy = "full" if longest <= chunk else "reversible"
    at_once = longest if strategy == "full" else min(chunk, longest)
    half = dtype != "float32"
    layers, width, batch = model.num_hidden_layers, model.hidden_size, config.batch_size
    if config.tune == "full":
        weights, trained = 4 * parameters, parameters
    else:
        rank = config.lora_rank
        state = layers * width * model.head_size
        trained = state if config.tune == "state" else 9 * layers * rank * 2 * width
        weights = (2 if half else 4) * parameters + 4 * trained
    number = 2 if half else 4
    graph = GRAPH_NUMBERS * layers * width * at_once * batch * number
    graph += 3 * 4 * min(LOGITS_AT_ONCE, at_once * batch * model.vocab_size)
    boundaries = max(0, -(-longest // chunk) - 2)
    state_bytes = 4 * width * (model.head_size if model.has_heads else 3)
    share = {"checkpoint": 1.0, "reversible": REMNANT_SHARE if model.has_heads else 1.0}.get(strategy, 0.0)
    tape = int(boundaries * layers * batch * (2 * width * number + share * state_bytes))
    if strategy in ("full", "truncated"):
        tape = 0
    return MemoryForecast(weights, 12 * trained, graph, tape, at_once)


def refuse_too_large(forecast: MemoryForecast, device: torch.device, config: FinetuneConfig) -> None:
    """Raise StrategyError when a run cannot fit even if it took half of what is forecast."""
    free = free_memory(device)
    place = config.tape or "host"
    if free is None:
        return
    if forecast.device / 2 > free:
        smaller = "a shorter --chunk-length" if config.bptt != "full" else "--bptt reversible"
        raise StrategyError(
            f"{forecast.tokens_at_once:,} tokens at once need about {forecast.device / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free: use {smaller}, a smaller --batch-size or --tune lora"
        )
    host = free_memory(torch.device("cpu"))
    if place == "host" and host is not None and forecast.tape / 2 > host:
        raise StrategyError(
            f"the tape needs about {forecast.tape / 1e9:.1f} GB of host memory, {host / 1e9:.1f} GB are free: "
            "use --tape disk or a longer --chunk-length"
        )


def used_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated tensors on a GPU, the process's resident memory on the CPU; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
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
        return int(torch.cuda.mem_get_info(device)[0])
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
