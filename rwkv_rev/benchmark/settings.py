"""What to measure: the options of ``rwkv-rev bench`` as one object, and the settings a model runs under."""

import tempfile
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.arguments import check_kinds, named_fields
from rwkv_rev.benchmark.models import SHAPES, benchmark_model
from rwkv_rev.bptt_settings import AUTO, BPTT_STRATEGIES, TAPES
from rwkv_rev.errors import ConfigError, RwkvRevError, SourceError
from rwkv_rev.foreign.quantised import KINDS, refuse_unusable
from rwkv_rev.loading import load_model
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.printable import shortened

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")
TAPED = ("checkpoint", "reversible", "reversible-lossy")


@named_fields
@dataclass(frozen=True)
class BenchSettings:
    """One run of a benchmark; lengths in tokens, memory in bytes.

    Attributes:
        shape: a name of :data:`rwkv_rev.benchmark.models.SHAPES`, ``bundled:NAME`` or a converted folder.
        device: what computes.
        dtype: of weights and activations.
        lengths: context lengths T, rising.
        chunk_lengths: C or ``auto``, for every strategy but ``full``.
        strategies: gradient strategies.
        tapes: places of the tape, for the strategies that have one.
        repeats: timed runs of each point; the median is reported.
        batch_size: rows at once.
        lora_rank: train low-rank additions of this rank instead of all weights; 0 for all weights.
        quantise: kind of the frozen maps in 4 or 8 bits (:mod:`rwkv_rev.foreign.quantised`), for low-rank additions to
            shapes.
        memory_limit: bytes that one point may take beyond the loaded model (CPU only); None for half of what is free.
        command: what a user types to measure it again.
    """

    shape: str = "5.2-15m"
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (1024, 4096)
    chunk_lengths: tuple[int | str, ...] = (512,)
    strategies: tuple[str, ...] = ("full", "reversible")
    tapes: tuple[str, ...] = ("host",)
    repeats: int = 3
    batch_size: int = 1
    lora_rank: int = 0
    quantise: str | None = None
    memory_limit: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_kinds({item.name: item.type for item in fields(self)}, vars(self))
        for name, least in (("repeats", 1), ("batch_size", 1), ("lora_rank", 0), ("memory_limit", 1)):
            if (number := getattr(self, name)) is not None and number < least:
                raise ConfigError(f"{name} = {number} must be at least {least}")
        if self.quantise is not None:
            if self.quantise not in KINDS:
                raise ConfigError(f"quantise = {self.quantise!r} must be one of {', '.join(KINDS)}")
            if not self.lora_rank or self.shape not in SHAPES:
                raise ConfigError(
                    "quantise is for low-rank additions to a shape with random weights: give --lora-rank N and --shape "
                    f"{', '.join(SHAPES)}"
                )
        unknown = [name for name in self.strategies if name not in BPTT_STRATEGIES or name == "auto"]
        if unknown:
            known = ", ".join(name for name in BPTT_STRATEGIES if name != "auto")
            raise RwkvRevError(f"no gradient strategy is called {unknown[0]!r}; there are {known}")
        if any(tape not in TAPES for tape in self.tapes):
            raise RwkvRevError(f"no tape is called {self.tapes!r}; there are {', '.join(TAPES)}")
        chunks = [1 if length == AUTO else length for length in self.chunk_lengths]
        if wrong := [length for length in chunks if isinstance(length, str)]:
            raise ConfigError(
                f"chunk_lengths: {shortened(repr(wrong[0]))} is neither a whole number nor auto"
            )
        if not self.lengths or min(self.lengths) < 2 or min(map(int, chunks), default=0) < 1:
            raise RwkvRevError("contexts need at least 2 tokens and chunks at least 1")

    def bptt(self) -> dict[str, dict[str, Any]]:
        """Arguments of ``set_bptt``, by a name for people."""
        found: dict[str, dict[str, Any]] = {}
        for strategy, chunk, tape in product(self.strategies, self.chunk_lengths, self.tapes):
            setting: dict[str, Any] = {"strategy": strategy}
            name = strategy
            if strategy != "full":
                setting["chunk_length"] = chunk
                name += f" C={chunk}"
            if strategy in TAPED:
                setting["tape"] = tape
                name += f" tape={tape}" if len(self.tapes) > 1 else ""
            found[name] = setting
        return found

    def model(self) -> RwkvRevForCausalLM:
        """The model to measure.

        Raises:
            SourceError: if there is no such shape, bundled model or folder.
        """
        if self.quantise is not None:
            refuse_unusable(self.quantise, self.device)
            model = benchmark_model(self.shape, self.device, self.dtype, quantised=self.quantise)
        else:
            model = measured_model(self.shape, self.device, self.dtype)
        if self.lora_rank:
            from rwkv_rev.training.config import FinetuneConfig
            from rwkv_rev.training.tuning import apply_tuning

            apply_tuning(
                model, FinetuneConfig(tune="lora", lora_rank=self.lora_rank)
            )  # changes model in place
        return model


def measured_model(shape: str, device: torch.device, dtype: torch.dtype) -> RwkvRevForCausalLM:
    """A published shape with random weights, a bundled model, or a converted folder, in training mode."""
    if shape in SHAPES:
        return benchmark_model(shape, device, dtype)
    if shape.startswith("bundled:"):
        from rwkv_rev.conversion import convert

        with tempfile.TemporaryDirectory(prefix="rwkv-rev-bench-") as folder:
            convert(shape, Path(folder, "model"))
            return load_model(Path(folder, "model"), device, dtype).train()
    if not Path(shape, "config.json").is_file():
        raise SourceError(f"{shape!r} is neither a shape ({', '.join(SHAPES)}), bundled:NAME nor a folder")
    model: RwkvRevForCausalLM = load_model(shape, device, dtype).train()
    return model
