"""Which chunk length ``auto`` is.

Longer chunks are faster and take more memory. On a CUDA device ``auto`` is the longest of :data:`LENGTHS` whose
forecast (:mod:`rwkv_rev.forecast`) fits into :data:`USABLE` of the memory that is free: what the driver says, and what
the allocator keeps and does not use. Counted are the gradient with recordings that last, AdamW's moments and a further
copy of the gradients, whether or not there will be any: a shorter chunk costs less than a run that ends. On a CPU it is
:data:`ON_CPU`, which measured within 6 % of the fastest at half the memory (docs/benchmarks.md).

What adapters of peft keep is forecast too (:mod:`rwkv_rev.adapter_memory`).

It is :data:`~rwkv_rev.bptt_settings.CHUNK_LENGTH` where nothing can be forecast (code of others, which a warning names,
and other devices), for ``full``, which cuts nothing, and for ``truncated`` and ``reversible-lossy``, whose gradient
itself depends on it and must not depend on the machine.

A model chooses once, in the first loss over more than ``LENGTHS[0]`` tokens that has a gradient, and then keeps to it:
another length rounds otherwise. It chooses anew, and says so if that changes the length, for a batch of more rows, more
trained weights, adapters that came or went, another device, and when ``auto`` is set again. Several processes choose
together, in the first loss of all whatever its length, take the shortest, and choose anew only when ``auto`` is set
again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging

from rwkv_rev.adapter_memory import kept_numbers
from rwkv_rev.architectures.architecture import NUMBER
from rwkv_rev.bptt import cuda_graphs
from rwkv_rev.bptt_settings import CHUNK_LENGTH, BpttSettings
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.forecast import RECORDED_SHARE, StrategyForecast, forecast_memory, runs_fused
from rwkv_rev.foreign.search import strangers

LENGTHS = tuple(2**power for power in range(8, 15))
"""From 256 to 16,384 tokens."""
ON_CPU = 2048
USABLE = 0.85
FORECAST_ON = ("cuda",)
"""Kinds of devices whose memory decides."""
_WITHOUT_CHOICE = {
    "full": "full cuts nothing",
    "truncated": "the gradient of truncated depends on it, so it is the same everywhere",
    "reversible-lossy": "the gradient of reversible-lossy depends on it, so it is the same everywhere",
}
_BESIDE = 3
"""Copies of the trained weights: AdamW's two moments, and gradients that are added up over batches."""
_HIDDEN_COPIES = 3
"""Of hidden states that are handed out on the device: the chunks', all of them, and the gradient by them."""

logger = logging.get_logger("rwkv_rev.modeling")


@dataclass(frozen=True)
class ChosenLength:
    """C, tokens per chunk, and why it is that, for people."""

    tokens: int
    why: str


def choose(strategy: str, device: torch.device, need: Callable[[int], int] | None) -> ChosenLength:
    """What ``auto`` is.

    Args:
        strategy: as set, so it may be ``auto``.
        device: that trains.
        need: bytes that chunks of so many tokens take beside what is on the device now; None if that is not known.
    """
    if strategy in _WITHOUT_CHOICE:
        return ChosenLength(CHUNK_LENGTH, _WITHOUT_CHOICE[strategy])
    if device.type not in FORECAST_ON:
        if device.type == "cpu":
            return ChosenLength(ON_CPU, "chosen as within 6 % of the fastest in our measurements on a CPU")
        return ChosenLength(CHUNK_LENGTH, f"the memory of {device.type} devices is not forecast")
    if need is None:
        return ChosenLength(CHUNK_LENGTH, "what code of others keeps is not forecast")
    free = free_bytes(device)
    for tokens in reversed(LENGTHS):
        if (most := need(tokens)) <= USABLE * free:
            return ChosenLength(
                tokens,
                f"the longest, up to {LENGTHS[-1]:,}, whose forecast of {most / 1e9:.1f} GB is within "
                f"{100 * USABLE:.0f} % of the {free / 1e9:.1f} GB that are free",
            )
    return ChosenLength(
        tokens, f"the shortest; its forecast of {most / 1e9:.1f} GB may not fit into {free / 1e9:.1f} GB"
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a CUDA device: from the driver, and from what the allocator keeps unused."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + idle


def several_processes() -> bool:
    """Whether this is one of several processes that can talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def shortest_of_all(tokens: int, device: torch.device) -> int:
    """The shortest length of all processes, each of which must call this; its own where there is one process."""
    if not several_processes():
        return tokens
    shared = torch.tensor(tokens, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


class Model(Protocol):
    """What a choice needs of a model."""

    config: RwkvRevConfig
    bptt: BpttSettings

    @property
    def checkpoints_blocks(self) -> bool: ...
    def parameters(self) -> Iterable[Tensor]: ...
    def get_input_embeddings(self) -> torch.nn.Module: ...


class AutoLength:
    """A model's own choice; see the module's docstring for when it is made."""

    def __init__(self) -> None:
        self._chosen: ChosenLength | None = None
        self._for: tuple[torch.device, int, int, int] | None = None

    @torch.compiler.disable
    def of(
        self,
        model: Model,
        rows: int,
        length: int,
        device: torch.device,
        ranks: int = 1,
        *,
        handed_out: bool = False,
    ) -> int:
        """C for a batch [rows, length] on ``device``; each rank's part of it, of ``ranks`` that share the rows.

        ``handed_out``: whether hidden states go to a loss of somebody else's.
        """
        length = -(-length // ranks)
        if model.bptt.strategy in _WITHOUT_CHOICE:
            return CHUNK_LENGTH
        parameters = list(model.parameters())
        tensors, trained = len(parameters), sum(one.numel() for one in parameters if one.requires_grad)
        together, before = several_processes(), self._chosen
        if before is not None and self._for is not None:
            there, most_rows, most_trained, known = self._for
            same = device == there and tensors == known
            if together or (same and rows <= most_rows and trained <= most_trained):
                return before.tokens
            if same:
                rows, trained = max(rows, most_rows), max(trained, most_trained)
        elif length <= LENGTHS[0] and not together:
            return LENGTHS[0]
        need, unknown = None, ""
        if device.type in FORECAST_ON:
            found = strangers(model)  # type: ignore[arg-type]
            kept = kept_numbers(found.adapters)
            unknown = next(iter([*found.declared, *(where for where, _ in found.unknown)]), "")
            if kept is None:
                unknown = "one of its adapters"
            if not unknown and kept is not None:
                need = _need(model, rows, length, device, ranks, handed_out, kept)
        chosen = choose(model.bptt.strategy, device, need)
        if device.type in FORECAST_ON:
            chosen = ChosenLength(shortest_of_all(chosen.tokens, device), chosen.why)
        self._chosen, self._for = chosen, (device, rows, trained, tensors)
        if unknown and need is None and model.bptt.strategy not in _WITHOUT_CHOICE:
            logger.warning(
                f"chunk_length='auto' is {chosen.tokens:,} tokens, since what {unknown} keeps is not forecast; where "
                "memory allows, a longer one is faster: set a number (set_bptt(..., chunk_length=4096))"
            )
        elif before is None:
            logger.info(f"chunk_length='auto' is {chosen.tokens:,} tokens: {chosen.why}")
        elif before.tokens != chosen.tokens:
            logger.warning(
                f"chunk_length='auto' was {before.tokens:,} tokens and is {chosen.tokens:,} from now on, for {rows} "
                f"rows and {trained:,} trained weights on {device}: {chosen.why}. Set a number to keep to it"
            )
        return chosen.tokens


def _need(
    model: Model,
    rows: int,
    length: int,
    device: torch.device,
    ranks: int,
    handed_out: bool,
    kept: tuple[int, int],
) -> Callable[[int], int]:
    """Bytes by chunk length, beside the weights, which are there.

    ``kept``: numbers that adapters keep, per token and once.
    """
    config, bptt = model.config, model.bptt
    own = list(model.parameters())
    trained = [parameter for parameter in own if parameter.requires_grad]
    size = max((parameter.element_size() for parameter in own if parameter.dim() > 1), default=4)
    # the head belongs to a model around this one; whether it is trained is told by the embedding, its counterpart
    head = config.vocab_size * config.hidden_size
    trains_head = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    count = sum(parameter.numel() for parameter in trained) + (head if trains_head else 0)
    half = torch.is_autocast_enabled(device.type)
    beside = _BESIDE * size * count
    if handed_out and bptt.hidden_states == "device":
        beside += _HIDDEN_COPIES * size * rows * length * config.hidden_size

    def forecast(strategy: str, context: int, chunk: int) -> StrategyForecast:
        (found,) = forecast_memory(
            config,
            [torch.empty(0, device="cpu")]
            * config.num_hidden_layers,  # not looked at: a tape of two chunks is empty
            sum(parameter.numel() for parameter in own if parameter.is_floating_point()) + head,
            context_length=context,
            batch_size=rows,
            chunk_length=chunk,
            trained=count,
            half=half,
            weight_bytes=size,
            checkpoint_blocks=model.checkpoints_blocks,
            fused=runs_fused(config, device),
            narrow=size == 2 and not half,
            recorded=cuda_graphs.possible(device),
            ranks=ranks,
            strategies=(strategy,),
        )
        return found

    def need(chunk: int) -> int:
        # ``auto`` stores the graph of a context of one chunk
        each = (forecast("full", chunk, chunk), forecast("reversible", 2 * chunk, chunk))
        most = max(one.reserved - one.parameters for one in each)
        # whole states are the most that a tape holds
        tape = forecast("checkpoint", max(length, chunk), chunk).tape if bptt.tape == "device" else 0
        adapters = RECORDED_SHARE * NUMBER * (rows * chunk * kept[0] + kept[1])
        return most + tape + beside + round(adapters)

    return need
