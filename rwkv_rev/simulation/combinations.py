"""Which combinations of data parallel, context parallel, sharding and chunk length fit, and which are the fastest.

Of every layout the fastest chunk length counts whose forecast fits into :data:`.chunk_length.USABLE` of a card's
memory, and its tape into the hosts'. Whole weights may have AdamW's moments spread over the cards, where that is what
makes them fit. What ``finetune`` takes of this :func:`is_run` alone knows; the rest is for loops of one's own.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rwkv_rev.arguments import checked, named
from rwkv_rev.benchmark.models import SHAPES
from rwkv_rev.chunk_length import LENGTHS, USABLE
from rwkv_rev.converters.rewriter import parse_size
from rwkv_rev.counts import tokens as count_tokens
from rwkv_rev.errors import ConfigError, OutputError
from rwkv_rev.simulation.exchange_seconds import Link, scan_from
from rwkv_rev.simulation.rates import BETWEEN, LATENCY, card_of
from rwkv_rev.simulation.step import Layout, Simulated, Sizes, Step, piece_bytes, simulate, sizes_of

HOST_MEMORY = 1_000_000_000_000
"""Bytes of a host. An assumption."""
NEAR = 0.1
"""How far a shape's number of weights may be from the one that was asked for."""
BEST = 3
_MANY = 2**16
_SLOWEST = 1e-3
GUIDES = ("docs/finetuning.md#several-gpus-of-one-host", "docs/python.md#one-context-over-several-gpus")


def shape_for(parameters: str, generation: str) -> str:
    """The published shape of a generation that is called so (``7b``), or has about as many weights.

    Raises:
        ConfigError: if there is none within 10 %.
    """
    match = re.fullmatch(r"([1-9][0-9]*|[0-9]*\.[0-9]+)([bm])", parameters.strip().lower())
    if match is None or len(parameters) > 12:
        raise ConfigError(f"params = {parameters!r} is no number of weights such as 7b, 1.5b or 430m")
    known = [name for name in SHAPES if SHAPES[name]["rwkv_version"] == generation]
    if not known:
        there = ", ".join(dict.fromkeys(str(sizes["rwkv_version"]) for sizes in SHAPES.values()))
        raise ConfigError(f"generation = {generation}: no shape of it was published; there are {there}")
    if (named := f"{generation}-{match[1]}{match[2]}") in known:
        return named
    wanted = float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]]
    found = min(known, key=lambda name: abs(sizes_of(name).parameters - wanted))
    if abs(sizes_of(found).parameters / wanted - 1) > NEAR:
        there = ", ".join(name.removeprefix(f"{generation}-") for name in known)
        raise ConfigError(
            f"params = {parameters}: no published shape of RWKV-{generation} has about that many weights; there are "
            f"{there}"
        )
    return found


@dataclass(frozen=True)
class Combinations:
    """What fits, the fastest first, each with the chunk length that is the fastest there."""

    sizes: Sizes
    shape: str
    layout: Layout
    found: tuple[Simulated, ...]

    def best(self) -> list[Simulated]:
        """The fastest three, and the fastest that ``finetune`` runs, if that is none of them."""
        best = list(self.found[:BEST])
        if not any(map(is_run, best)):
            best += [one for one in self.found if is_run(one)][:1]
        return best

    def scan_from(self, where: str, rows: int = 1) -> int | None:
        """From how many ranks on a pipelined scan would take less than the gather, ``within`` or ``between`` hosts."""
        bandwidth = self.layout.card.within if where == "within" else self.layout.between
        return scan_from(piece_bytes(self.sizes, rows, _MANY), Link(LATENCY[where], bandwidth))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layout = self.layout
        return {
            "shape": self.shape,
            "parameters": self.sizes.parameters,
            "gpu": layout.card.title,
            "gpus": layout.cards,
            "gpus_per_host": layout.per_host,
            "memory_of_a_gpu": layout.card.memory,
            "assumptions": {
                "bytes_per_second_between_hosts": layout.between,
                "latency_within": LATENCY["within"],
                "latency_between": LATENCY["between"],
            },
            "scan_from": {where: self.scan_from(where) for where in LATENCY},
            "combinations": [
                one.to_dict() | {"finetune": is_run(one), "start": " ".join(start(one)), "loop": loop(one)}
                for one in self.found
            ],
        }


@named
@checked
def combine(
    params: str | None = None,
    *,
    context: int | str,
    gpus: int,
    gpu: str = "h100",
    generation: str = "7",
    shape: str | None = None,
    tune: str = "full",
    lora_rank: int = 16,
    batch_size: int = 1,
    most_rows: int | None = None,
    per_host: int = 8,
    between: float = BETWEEN / 1e9,
    host_memory: int | str = HOST_MEMORY,
) -> Combinations:
    """Memory, speed and tape of a training run over many GPUs, of each combination that fits; needs none.

    Args:
        params: size of a published model, such as 7b.
        context: T, tokens of a row; 4m is 4,194,304.
        gpus: how many there are.
        gpu: of which kind, of :data:`.rates.CARDS`.
        generation: of params, which RWKV.
        shape: a shape of :data:`.benchmark.models.SHAPES`, in the place of params and generation.
        tune: full or lora.
        lora_rank: of low-rank additions.
        batch_size: rows at once of each group of GPUs.
        most_rows: rows of a step at most, over all groups; any number when None.
        per_host: GPUs of a machine.
        between: GB/s per GPU between machines.
        host_memory: bytes of a machine, for the tapes of its GPUs; or a size such as 500GB.

    Raises:
        ConfigError: for a model or GPU that is not known, GPUs that do not fill their machines, and where nothing fits.
    """
    if tune not in ("full", "lora"):
        raise ConfigError(f"tune = {tune!r} does not exist here; use full or lora")
    least_of = {"gpus": gpus, "lora_rank": lora_rank, "batch_size": batch_size, "per_host": per_host}
    for name, value in least_of.items():
        if not 1 <= value <= _MANY:
            raise ConfigError(f"{name} = {value} must be from 1 to {_MANY}")
    if not _SLOWEST <= between < math.inf:
        raise ConfigError(f"between = {between} must be a finite number of at least {_SLOWEST}")
    try:
        tokens = count_tokens(context)
    except ValueError as error:
        raise ConfigError(f"context = {error}") from None
    if shape is None:
        if params is None:
            raise ConfigError("params = None: name a size, such as 7b, or a shape")
        shape = shape_for(params, generation)
    rank = lora_rank if tune == "lora" else 0
    try:
        memory = parse_size(host_memory)
    except OutputError as error:
        raise ConfigError(f"host_memory = {error}") from None
    whole = Layout(card_of(gpu), dp=gpus, per_host=per_host, between=between * 1e9)
    if gpus > per_host and gpus % per_host:
        raise ConfigError(
            f"gpus = {gpus}: machines of {per_host} would not be full; use a multiple of {per_host}"
        )
    if most_rows is not None and most_rows < batch_size:
        raise ConfigError(
            f"most_rows = {most_rows} is less than batch_size = {batch_size}, the rows of one group"
        )
    sizes, found, least = sizes_of(shape), list[Simulated](), None
    for layout in _layouts(whole, tokens, None if most_rows is None else most_rows // batch_size):
        fastest = None
        for length in LENGTHS:
            one = simulate(Step(shape, tokens, min(length * layout.cp, tokens), batch_size, rank), layout)
            if least is None or one.reserved < least.reserved:
                least = one
            fits = one.reserved <= USABLE * layout.card.memory and one.tape_of_a_host <= memory
            if fits and (fastest is None or one.tokens_per_second > fastest.tokens_per_second):
                fastest = one
            if one.step.chunk == tokens:
                break
        if fastest is not None:
            found.append(fastest)
    if not found:
        raise ConfigError(_nothing(least, tokens, gpus, memory, rank))
    found.sort(key=lambda one: -one.tokens_per_second)
    return Combinations(sizes, shape, whole, tuple(_without_needless(found)))


def _layouts(whole: Layout, tokens: int, most_groups: int | None) -> Iterator[Layout]:
    """Of all cards: groups that fill hosts or parts of one; weights whole, over a host's cards, or over all."""
    cards, per_host = whole.cards, whole.per_host
    for cp in (ranks for ranks in range(1, cards + 1) if cards % ranks == 0):
        fits = per_host % cp == 0 or cp % per_host == 0 or cards <= per_host
        if not fits or tokens < cp * LENGTHS[0] or (most_groups is not None and cards // cp > most_groups):
            continue
        for shards in sorted({1, min(per_host, cards), cards}):
            for spread in (False, True) if shards == 1 and cards > 1 else (False,):
                yield Layout(whole.card, cards // cp, cp, shards, per_host, whole.between, spread)


def _without_needless(found: list[Simulated]) -> Iterator[Simulated]:
    """Whole weights once for each division of the cards: the faster one, which comes first."""
    seen = set()
    for one in found:
        kind = (one.layout.cp, one.layout.shards)
        if kind not in seen:
            seen.add(kind)
            yield one


def _nothing(least: Simulated | None, tokens: int, cards: int, host_memory: int, lora_rank: int) -> str:
    if tokens < LENGTHS[0]:
        return f"context = {tokens}: at least {LENGTHS[0]:,} tokens are needed, the shortest chunk looked at"
    if least is None:
        return f"gpus = {cards}: no division of them has rows of {tokens:,} tokens; allow more rows, or longer ones"
    room = USABLE * least.layout.card.memory
    if least.reserved > room:
        instead = "more cards" if lora_rank else "more cards, or tune = lora"
        return (
            f"nothing fits: a card needs at least {least.reserved / 1e9:.1f} GB, and {room / 1e9:.1f} GB of an "
            f"{least.layout.card.title} count; use {instead}"
        )
    return (
        f"nothing fits: the tape of a machine takes {least.tape_of_a_host / 1e9:,.0f} GB and more, and host_memory is "
        f"{host_memory / 1e9:,.0f} GB; use more cards for a context, or a tape on disk"
    )


def is_run(one: Simulated) -> bool:
    """Whether ``rwkv-rev finetune`` runs it: whole weights, or weights spread over all cards."""
    return one.layout.shards in (1, one.layout.cards)


def start(one: Simulated) -> list[str]:
    """The command that starts it, option by option; of what ``finetune`` does not run, that of a loop of one's own."""
    layout, step = one.layout, one.step
    on_host = f"--nproc-per-node {min(layout.cards, layout.per_host)}"
    words = ["torchrun"]
    if layout.hosts == 1:
        words += ["--standalone", on_host]
    else:  # on each of them
        words += [f"--nnodes {layout.hosts}", on_host, "--rdzv-backend c10d", "--rdzv-endpoint HOST:29400"]
    if not is_run(one):
        return [*words, "your_loop.py"]
    words += ["-m rwkv_rev.cli finetune my-model", "--data corpus/", "--output tuned"]
    words += [f"--context-length {step.tokens}", f"--chunk-length {step.chunk}"]
    words += [f"--batch-size {step.rows}"] if step.rows > 1 else []
    words += [f"--context-parallel {layout.cp}"] if layout.cp > 1 else []
    words += [f"--tune lora --lora-rank {step.lora_rank}"] if step.lora_rank else []
    words += ["--shard-model"] if layout.shards > 1 else []
    return words + (["--shard-optimizer"] if layout.shard_optimizer else [])


def loop(one: Simulated) -> str:
    """What a loop of one's own calls, and where that is described; empty where ``finetune`` runs it."""
    if is_run(one):
        return ""
    layout = one.layout
    calls = [f"fully_shard over {layout.shards} GPUs"]
    calls += [f"set_context_parallel over {layout.cp}"] if layout.cp > 1 else []
    calls += [f'set_bptt("reversible", chunk_length={one.step.chunk})']
    return f"{', '.join(calls)}: {', '.join(GUIDES[: 1 + (layout.cp > 1)])}"
