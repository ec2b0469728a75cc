"""What small language models of cells that are stepped token by token share (:mod:`rwkv_rev.cells.token_cell`).

Each is embeddings, blocks of such a cell and a feed-forward net behind LayerNorms, and a head. There is no checkpoint
of theirs to convert and no layout to export to: models are made fresh (``rwkv-rev init --architecture NAME``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from rwkv_rev.architectures.architecture import AdapterTargets, Architecture, Cost, Part
from rwkv_rev.architectures.feed_forward import FEED_FORWARD, initialize_feed_forward
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.scan import Scan, SubLayer
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.feed_forward import FeedForward
from rwkv_rev.cells.stateless import NoState
from rwkv_rev.cells.token_cell import MOST_MAGNITUDE, TokenCell, TokenState
from rwkv_rev.reversal.stepped import most_bits
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

INPUT_SCALE = 0.3
"""Of what gates read of the input at first, whose numbers are of order one: with more of it gates begin shut."""
LETTERS = {"M": "cell_size"}


@dataclass(frozen=True)
class TokenCellState(ModelState):
    """State after some tokens.

    Attributes:
        memory: float32 or wider, [L, B, P, M], P parts of the cell.
    """

    memory: Tensor

    cells = ((TokenState, ("memory",)), (NoState, ()))


def sizes(width: int) -> dict[str, Any]:
    """Of the configuration, for models of width D."""
    return {"num_attention_heads": 1, "head_size": width, "intermediate_size": 4 * width}


def fields(*, magnitude: int, wide: bool | None = None, forgets: bool = True) -> dict[str, Field]:
    """Arguments of a cell as fields of the configuration; ``wide`` None for a cell that leaves no choice."""
    found = {
        "cell_size": Field(
            int, lambda config: -(-config.hidden_size // 2), "M, numbers in each part of the state", least=1
        ),
        "magnitude": Field(
            int,
            magnitude,
            "numbers of the state stay below 2**magnitude",
            least=-MOST_MAGNITUDE,
            most=MOST_MAGNITUDE,
        ),
    }
    if wide is not None:
        found["wide"] = Field(bool, wide, "integers of 51 bits in the state, not of 32")
    if forgets:
        found["forget_limit"] = Field(
            float, 0.0, "bits that a number may forget in a token; 0 for any", least=0.0, most=32.0
        )
    return found


def arguments(config: "RwkvRevConfig") -> dict[str, Any]:
    """The :func:`fields` of a cell that forgets, as its arguments."""
    return {
        "size": config.cell_size,
        "magnitude": config.magnitude,
        "wide": config.wide or None,  # float64 is wide by itself
        "forget_limit": config.forget_limit or None,
    }


def cells(
    make: Callable[["RwkvRevConfig"], TokenCell], config: "RwkvRevConfig", layer: int
) -> dict[str, ReversibleCell]:
    """Of a block: the cell that ``make`` makes, and a feed-forward net."""
    return {
        "recurrence": make(config),
        "feed_forward": FeedForward(config.hidden_size, config.intermediate_size),
    }


def initialize_map(linear: nn.Module, scale: float = 1.0) -> None:
    """A linear map: ``scale / sqrt(inputs)`` at most, biases 0."""
    assert isinstance(linear, nn.Linear)
    bound = scale / math.sqrt(linear.in_features)
    init.uniform_(linear.weight, a=-bound, b=bound)
    if linear.bias is not None:
        init.zeros_(linear.bias)


def scan(compute: Callable[..., Tensor], config: "RwkvRevConfig") -> Scan:
    """``compute``: of :class:`SubLayer`, behind the configuration."""
    return Scan((SubLayer("recurrence", "ln1", "recurrence", partial(compute, config)), FEED_FORWARD))


def cost(
    parts: int, *, per_number: int, per_channel: int, wide: bool | None = None, forgetting: int = 0
) -> Cost:
    """Of training.

    Args:
        parts: P.
        per_number: numbers that the graph keeps of a token for each number of a half.
        per_channel: and for each channel of the block's input.
        wide: whether integers have more than 32 bits, where no field says so.
        forgetting: how many parts forget.
    """

    def states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
        return per_number * batch * length * config.cell_size

    def whole(config: "RwkvRevConfig", batch: int) -> list[int]:
        size = 8 if getattr(config, "wide", wide) else 4
        return [size * batch * parts * config.cell_size]

    def remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
        """No more than the limit allows, and no more than the state; a fingerprint, and the sizes of rows."""
        if not forgetting:
            return [8]
        limit = getattr(config, "forget_limit", 0.0)
        bits = most_bits(limit) if limit else math.inf
        forgotten = batch * config.cell_size * forgetting * length * bits / 8
        return [8, 4 * batch, math.ceil(min(*whole(config, batch), forgotten))]

    return Cost(
        vectors=per_channel,
        fused_vectors=per_channel,
        mixes=0,
        shifts=0,
        states=states,
        whole=whole,
        remnant=remnant,
    )


def plain_state(like: Tensor, tensors: Any, parts: int, size: int) -> list[Tensor]:
    """The parts [M] before the first token, for a plain loop."""
    start = tensors["initial"].to(like.dtype) if "initial" in tensors else like.new_zeros(parts, size)
    return list(torch.unbind(start))


def gated(
    version: str,
    title: str,
    kind: type[Any],
    initialize: Callable[[Any, "RwkvRevConfig"], None],
    compute: Callable[..., Tensor],
    *,
    parts: int,
    per_number: int,
    magnitude: int,
    wide: bool,
) -> Architecture:
    """The architecture of a gated cell, whose parts all forget.

    Args:
        kind: the cell's class; takes D and :func:`arguments`.
        initialize: what fills it.
        compute: as of :func:`scan`.
        parts, per_number: as of :func:`cost`.
        magnitude, wide: as of :func:`fields`.
    """
    return Architecture(
        version=version,
        title=title,
        state_kind=TokenCellState,
        state={"memory": Part(f"{parts} M", wide=True)},
        memory="memory",
        keys="M",
        lora_targets=("input", "output"),
        targets=AdapterTargets(
            square=("output",),
            scaled=("recurrence.input", "feed_forward.value"),
            scaled_inputs=("feed_forward.value",),
        ),
        sizes=sizes,
        fields=fields(magnitude=magnitude, wide=wide),
        letters=LETTERS,
        cells=partial(cells, lambda config: kind(config.hidden_size, **arguments(config))),
        initialization={kind: initialize, FeedForward: initialize_feed_forward},
        tunes_state=True,
        scan=partial(scan, compute),
        cost=cost(parts, per_number=per_number, per_channel=4, forgetting=parts),
    )
