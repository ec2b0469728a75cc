r"""What a training step takes: seconds and bytes, from rates and from the rules of :mod:`rwkv_rev.forecast`.

A *layout* of G cards is ``dp`` groups of ``cp`` ranks: a group shares every chunk of its rows, and the groups take rows
of their own. The weights are whole on every card, or spread over ``shards`` of them block by block (FSDP2). With M
weights in matrix products, P in all, L layers, T tokens of a row, C of a chunk, a card computes n = T / cp tokens in
ceil(T / C) chunks. Its seconds are

    matrix          8 M n / rate                      6 M where nothing is computed twice or weights are frozen
    recurrence      (forward + both) n D L
    elementwise     (4/3) 2 vectors n D L / bandwidth
    weights         chunks P (6 reads, 8 of the float32 sums) / bandwidth, and the optimizer's
    launches        chunks L gap, more where launches are not recorded; once what a step begins with
    exchange        chunks L (last tokens, pieces and their gradients between the ranks of a group), the tape's records
    shards          chunks L (three gathers of a block, one scatter of its gradient in float32)
    gradients       a reduction over all cards, once per step

one after another: nothing is said to be hidden behind anything else, where that was not measured. RWKV-7's memory goes
from rank to rank where ranks are few (:attr:`.ReversibleCell.relayed_ranks`): then each waits for the scan over
states of those before it. RWKV-4 to 6, and RWKV-7 between more ranks, exchange pieces.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from rwkv_rev.architectures.architecture import NUMBER
from rwkv_rev.benchmark.models import matrix_parameters, shape_config
from rwkv_rev.bptt.lasting import LEAST_FREE
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.forecast import RECORDED_SHARE, StrategyForecast, forecast_memory
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.simulation import rates
from rwkv_rev.simulation.exchange_seconds import Link, gather_seconds, reduce_seconds
from rwkv_rev.training.lora_targets import has_addition
from rwkv_rev.training.memory import kept_gradient_bytes, optimizer_bytes

_COLLECTIVES = 9
"""Of a layer's chunk in a group: last tokens of two cells and the pieces, in each sweep and in the gradients."""
_GATHERS_OF_A_BLOCK = 3


@dataclass(frozen=True)
class Sizes:
    """Of a model: numbers in its weights, in its blocks' and its head's matrices, and what LoRA's additions read.

    Attributes:
        added: numbers that the maps with low-rank additions take and give for a token. inputs: that they take.
        relayed: most ranks between which a memory goes from one to the next.
    """

    config: RwkvRevConfig
    parameters: int
    matrices: int
    head: int
    added: int
    inputs: int
    relayed: int


@cache
def sizes_of(shape: str) -> Sizes:
    """Of a published shape.

    Raises:
        RwkvRevError: if there is none of that name.
    """
    config = shape_config(shape)
    with torch.device("meta"):
        model = RwkvRevForCausalLM(config)
    targets = config.architecture.lora_targets
    maps = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and has_addition(name, targets)
    ]
    head = config.vocab_size * config.hidden_size
    return Sizes(
        config,
        sum(parameter.numel() for parameter in model.parameters()),
        matrix_parameters(model) - head,
        head,
        sum(one.in_features + one.out_features for one in maps),
        sum(one.in_features for one in maps),
        max(cell.relayed_ranks for cell in model.blocks[0].cells),
    )


@dataclass(frozen=True)
class Layout:
    """Who computes what.

    Attributes:
        card: of :data:`.rates.CARDS`.
        dp: groups, each with rows of its own. cp: ranks that share them.
        shards: cards over which weights, gradients and moments are spread; 1 where each has all.
        per_host: cards of a host. between: bytes per second and card between hosts.
        shard_optimizer: whether whole weights have their moments spread over all cards (ZeRO stage 1).
    """

    card: rates.Card
    dp: int = 1
    cp: int = 1
    shards: int = 1
    per_host: int = 8
    between: float = rates.BETWEEN
    shard_optimizer: bool = False

    @property
    def cards(self) -> int:
        """All of them."""
        return self.dp * self.cp

    @property
    def hosts(self) -> int:
        """That many machines."""
        return -(-self.cards // self.per_host)

    def link(self, ranks: int) -> Link:
        """Between so many cards that follow one another: the slowest of them."""
        if ranks <= self.per_host:
            return Link(rates.LATENCY["within"], self.card.within)
        return Link(rates.LATENCY["between"], self.between)


@dataclass(frozen=True)
class Step:
    """What is computed.

    Attributes:
        shape: of :data:`.benchmark.models.SHAPES`.
        tokens: T of a row. chunk: C, of all ranks together; T for one chunk, which is ``full``.
        rows: of each group.
        lora_rank: of low-rank additions that are trained in the place of all weights; 0 for all.
        narrow: whether trained weights, gradients and moments are in 16 bits; else float32 under autocast.
        optimizer: whether AdamW follows.
        recorded: whether launches are recorded; where there is room for it when None.
    """

    shape: str
    tokens: int
    chunk: int
    rows: int = 1
    lora_rank: int = 0
    narrow: bool = False
    optimizer: bool = True
    recorded: bool | None = None

    @property
    def chunks(self) -> int:
        """Of a row."""
        return -(-self.tokens // self.chunk)


@dataclass(frozen=True)
class Simulated:
    """A step over a layout.

    Attributes:
        seconds: by what they go for.
        peak: bytes of a card that tensors take. reserved: that it must have.
        tape: bytes of host memory for each card.
        recorded: whether launches are.
    """

    step: Step
    layout: Layout
    seconds: dict[str, float]
    peak: int
    reserved: int
    tape: int
    recorded: bool

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all cards."""
        return self.step.tokens * self.step.rows * self.layout.dp / self.total

    @property
    def communication(self) -> float:
        """Share of the step that goes for what cards exchange."""
        return sum(self.seconds[name] for name in ("exchange", "shards", "gradients")) / self.total

    @property
    def tape_of_a_host(self) -> int:
        """Bytes."""
        return self.tape * min(self.layout.per_host, self.layout.cards)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layout = self.layout
        return {
            "dp": layout.dp,
            "cp": layout.cp,
            "shards": layout.shards,
            "shard_optimizer": layout.shard_optimizer,
            "chunk_length": self.step.chunk,
            "tokens_per_second": round(self.tokens_per_second),
            "seconds_per_step": round(self.total, 3),
            "tokens_per_step": self.step.tokens * self.step.rows * layout.dp,
            "communication": round(self.communication, 4),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "peak_bytes": self.peak,
            "reserved_bytes": self.reserved,
            "recorded": self.recorded,
            "tape_bytes": self.tape,
            "tape_bytes_per_host": self.tape_of_a_host,
            "tape_bytes_in_all": self.tape * layout.cards,
        }


def simulate(step: Step, layout: Layout) -> Simulated:
    """Seconds and bytes of a step."""
    possible = step.chunks > 1 and layout.shards == 1 and step.recorded is not False
    peak, reserved, tape = memory(step, layout, possible)
    recorded = possible and (step.recorded is True or reserved <= (1 - LEAST_FREE) * layout.card.memory)
    if recorded != possible:
        peak, reserved, tape = memory(step, layout, recorded)
    return Simulated(step, layout, _seconds(step, layout, recorded, tape), peak, reserved, tape, recorded)


def trained_by(step: Step, sizes: Sizes) -> int:
    """Number of weights that are trained."""
    return step.lora_rank * sizes.added if step.lora_rank else sizes.parameters


def memory(step: Step, layout: Layout, recorded: bool) -> tuple[int, int, int]:
    """Bytes of a card: the peak, and what it must have; bytes of its tape, where states are kept whole: the most."""
    sizes = sizes_of(step.shape)
    trained = trained_by(step, sizes)
    narrow, tokens, chunk = step.narrow, -(-step.tokens // layout.cp), -(-step.chunk // layout.cp)

    def forecast(strategy: str, context: int) -> StrategyForecast:
        (found,) = forecast_memory(
            sizes.config,
            [torch.empty(0)] * sizes.config.num_hidden_layers,  # not looked at: a tape of two chunks is empty
            sizes.parameters,
            context_length=context,
            batch_size=step.rows,
            chunk_length=chunk,
            trained=trained,
            half=not narrow,
            narrow=narrow,
            weight_bytes=2 if narrow or step.lora_rank else NUMBER,
            fused=True,
            recorded=recorded,
            ranks=layout.cp,
            shards=layout.shards,
            strategies=(strategy,),
        )
        return found

    gradient = forecast("full", tokens) if step.chunks == 1 else forecast("reversible", 2 * chunk)
    tape = 0 if step.chunks == 1 else forecast("checkpoint", tokens).tape
    beside = 0
    if step.optimizer:
        moments = optimizer_bytes(trained, layout.cards if layout.shard_optimizer else layout.shards)
        beside += moments // 2 if narrow and not step.lora_rank else moments
        if layout.shards == 1:
            beside += kept_gradient_bytes(trained, layout.cards)
    if step.lora_rank:
        # inputs in float32 for the additions, in the place of those in 16 bits that frozen maps do not need
        beside += round(RECORDED_SHARE * (NUMBER - 2) * step.rows * min(chunk, tokens) * sizes.inputs)
    return gradient.device + beside, gradient.reserved + beside, tape


def _seconds(step: Step, layout: Layout, recorded: bool, tape: int) -> dict[str, float]:
    sizes, card, cp = sizes_of(step.shape), layout.card, layout.cp
    config, parameters = sizes.config, sizes.parameters
    known = rates.GENERATIONS[config.rwkv_version[0]]
    tokens, chunks, layers = step.rows * step.tokens / cp, step.chunks, config.num_hidden_layers
    width, twice, frozen = config.hidden_size, chunks > 1, step.lora_rank > 0
    channels = tokens * layers * width
    pieces = layers * chunks
    products = (4 if frozen else 6) + (2 if twice else 0)
    matrix = products * sizes.matrices + (4 if frozen else 6) * sizes.head
    elementwise = 2 * known.vectors * channels * (4 / 3 if twice else 1)
    wide = not step.narrow and not frozen
    if wide:  # LayerNorms and residual are float32
        elementwise *= config.architecture.cost.half / config.architecture.cost.narrow
    elementwise += rates.ADAPTER * sizes.added * tokens if frozen else 0
    moved = chunks * parameters * (6 + (8 if twice and not frozen else 0) / layout.shards)
    if wide:
        moved += chunks * 12 * parameters  # float32 read, 16 bits written, in each sweep
    if step.optimizer:
        moved += (14 if step.narrow else 28) * trained_by(step, sizes) / layout.shards
    launches = rates.STEP + (known.gap * pieces if twice else 0.0)
    if twice and not recorded:
        launches += known.unrecorded * pieces
    both = known.both + (known.forward if twice else 0.0)
    return {
        "matrix": matrix * tokens / card.matrix,
        "recurrence": both * channels,
        "elementwise": elementwise / card.bandwidth,
        "weights": moved / card.bandwidth,
        "launches": launches,
        "exchange": _exchange(sizes, step, layout, tape) if cp > 1 else 0.0,
        "shards": _shards(sizes, step, layout) if layout.shards > 1 else 0.0,
        "gradients": _gradients(sizes, step, layout) if layout.cards > 1 else 0.0,
    }


def piece_bytes(sizes: Sizes, rows: int, ranks: int) -> int:
    """What a rank tells the others of its tokens, in a layer."""
    config = sizes.config
    memory = NUMBER * rows * math.prod(config.architecture.memory_shape(config))
    if ranks <= sizes.relayed:
        return memory
    known = rates.GENERATIONS[config.rwkv_version[0]]
    return known.matrices * memory + known.factors * NUMBER * rows * config.hidden_size


def _exchange(sizes: Sizes, step: Step, layout: Layout, tape: int) -> float:
    """Between the ranks of a group."""
    cp, link, known = layout.cp, layout.link(layout.cp), rates.GENERATIONS[sizes.config.rwkv_version[0]]
    last = NUMBER * step.rows * sizes.config.hidden_size
    piece = piece_bytes(sizes, step.rows, cp)
    relays = cp <= sizes.relayed
    rounds = 3 * (cp if relays else 1)  # of pieces: in each sweep, and in the gradients
    sent = rounds * gather_seconds(piece, cp, link) + (_COLLECTIVES - 3) * gather_seconds(last, cp, link)
    own = step.rows * step.chunk / cp * sizes.config.hidden_size
    if relays:
        computed = (cp - 1) * rates.SCAN * (known.forward + known.both) * own
    else:
        computed = known.piece * (known.forward + known.both) * own if known.piece > 1 else 0.0
    each = sent + computed + rates.PIECES + (cp - 2) * rates.FURTHER_PIECE
    taken_back = gather_seconds(tape, cp, link)  # of every chunk what the others keep
    return step.chunks * sizes.config.num_hidden_layers * each + taken_back


def _shards(sizes: Sizes, step: Step, layout: Layout) -> float:
    """Blocks whole, and parts of their gradients, over the cards that share them."""
    blocks = sizes.parameters - 2 * sizes.head
    link, ranks = layout.link(layout.shards), layout.shards
    layers = sizes.config.num_hidden_layers
    size = 2 * blocks / layers / ranks  # of a card's part
    sent = _GATHERS_OF_A_BLOCK * gather_seconds(size, ranks, link)
    sent += 0 if step.lora_rank else gather_seconds(2 * size, ranks, link)
    if (replicas := layout.cards // ranks) > 1 and not step.lora_rank:
        sent += reduce_seconds(2 * size, replicas, layout.link(layout.cards))
    copied = rates.SHARD_COPIES * blocks / layers / layout.card.bandwidth
    return step.chunks * layers * (sent + copied + rates.SHARDED)


def _gradients(sizes: Sizes, step: Step, layout: Layout) -> float:
    """Their mean over all cards, once per step; of what is sharded, embedding and head alone."""
    trained = trained_by(step, sizes)
    if layout.shards > 1 and not step.lora_rank:
        trained = 2 * sizes.head
    size = (2 if step.narrow else NUMBER) * trained
    return reduce_seconds(size, layout.cards, layout.link(layout.cards))
