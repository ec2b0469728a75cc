"""A small language model of plain linear attention (:mod:`rwkv_rev.cells.linear_attention`) and feed-forward nets.

No other tool has models of this kind: there is no checkpoint to convert and no layout to export to. Models are made
fresh (``rwkv-rev init --architecture linear-attention``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures.architecture import AdapterTargets, Architecture, Cost, Part
from rwkv_rev.architectures.feed_forward import FEED_FORWARD, initialize_feed_forward
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.scan import Scan, SubLayer, standardised
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.feed_forward import FeedForward
from rwkv_rev.cells.linear_attention import LinearAttention, Sums
from rwkv_rev.cells.stateless import NoState
from rwkv_rev.reversal.additive import FORMATS, check_exponent
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

_HEAD_SIZE = 32
EXPONENTS = {"int16": -6, "int32": -16, "int64": -40, "float32": -10, "float64": -32}
"""Of the grid, by the format of the memory, where nobody says otherwise."""


@dataclass(frozen=True)
class LinearAttentionState(ModelState):
    """State after some tokens.

    Attributes:
        memory: float32 or wider, [L, B, H, N, N], key index first.
    """

    memory: Tensor

    cells = ((Sums, ("memory",)), (NoState, ()))


def _sizes(width: int) -> dict[str, Any]:
    size = math.gcd(width, _HEAD_SIZE)
    return {"num_attention_heads": width // size, "head_size": size, "intermediate_size": 4 * width}


def _format(config: "RwkvRevConfig") -> str:
    """Of :data:`~rwkv_rev.reversal.additive.FORMATS`."""
    return f"{'int' if config.memory_numbers == 'integer' else 'float'}{config.memory_bits}"


def _check(config: "RwkvRevConfig") -> None:
    if _format(config) not in FORMATS:
        raise ValueError(
            f"memory_numbers = {config.memory_numbers!r} needs memory_bits = 32 or 64, not {config.memory_bits}"
        )
    check_exponent(_format(config), config.memory_exponent, "memory_exponent")


def _exponent(config: "RwkvRevConfig") -> int:
    """Room for numbers up to some 2^9 in 16 bits, 2^14 in 32 and 2^22 in 64."""
    return EXPONENTS.get(_format(config), 0)


def _cells(config: "RwkvRevConfig", layer: int) -> dict[str, ReversibleCell]:
    attention = LinearAttention(
        config.num_attention_heads,
        config.head_size,
        format=_format(config),
        exponent=config.memory_exponent,
        group_norm_epsilon=config.group_norm_epsilon,
    )
    return {
        "attention": attention,
        "feed_forward": FeedForward(config.hidden_size, config.intermediate_size),
    }


def _initialize_attention(cell: LinearAttention, config: "RwkvRevConfig") -> None:
    """Queries and keys so small that a product of them is of order one; every block the identity at first."""
    for linear in (cell.query, cell.key, cell.value):
        init.orthogonal_(linear.weight)
    init.zeros_(cell.output.weight)
    init.ones_(cell.ln_x.weight)
    init.zeros_(cell.ln_x.bias)


# --- the same as a plain loop ---------------------------------------------------------------------------------------


def _scan_attention(
    heads: int, x: Tensor, tensors: Mapping[str, Tensor], epsilon: float, _: dict[str, Any]
) -> Tensor:
    q, k, v = (x @ tensors[f"{name}.weight"].to(x.dtype).T for name in ("query", "key", "value"))
    q, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in (q, k, v))  # [T, H, N]
    state = x.new_zeros(heads, k.shape[-1], k.shape[-1])
    if "initial" in tensors:
        state = tensors["initial"].to(x.dtype)
    y = torch.empty_like(v)
    for t in range(len(x)):
        state = state + k[t, :, :, None] * v[t, :, None, :]
        y[t] = (q[t, :, None, :] @ state).squeeze(1)
    y = standardised(y, epsilon).flatten(1)
    y = y * tensors["ln_x.weight"].to(x.dtype) + tensors["ln_x.bias"].to(x.dtype)
    return y @ tensors["output.weight"].to(x.dtype).T


def _scan(config: "RwkvRevConfig") -> Scan:
    attention = partial(_scan_attention, config.num_attention_heads)
    return Scan(
        (
            SubLayer("attention", "ln1", "attention", attention),
            FEED_FORWARD,
        )
    )


# --- what training takes --------------------------------------------------------------------------------------------


def _states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
    """The memory before the chunk and after it: what is between is made again."""
    return 2 * batch * config.hidden_size * config.head_size


def _whole(config: "RwkvRevConfig", batch: int) -> list[int]:
    return [config.memory_bits // 8 * batch * config.hidden_size * config.head_size]


def _remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
    return [8]  # a fingerprint


LINEAR_ATTENTION = Architecture(
    version="linear-attention",
    title="linear attention",
    has_heads=True,
    has_group_norm=True,
    state_kind=LinearAttentionState,
    state={"memory": Part("H N N", wide=True)},
    memory="memory",
    keys="H N",
    lora_targets=("query", "key", "value", "output"),
    targets=AdapterTargets(
        square=("query", "output"),
        scaled=("attention.key", "attention.value", "feed_forward.value"),
        scaled_inputs=("feed_forward.value",),
    ),
    sizes=_sizes,
    fields={
        "memory_bits": Field(int, 64, "bits of a number of the memory", among=(16, 32, 64)),
        "memory_numbers": Field(
            str, "integer", "integers, or floats of a restricted mantissa", among=("integer", "float")
        ),
        "memory_exponent": Field(int, _exponent, "e of the memory's grid 2^e"),
    },
    check=_check,
    cells=_cells,
    initialization={LinearAttention: _initialize_attention, FeedForward: initialize_feed_forward},
    log_decay=lambda read: torch.zeros(len(read("attention.key.weight"))),
    tunes_state=True,
    scan=_scan,
    cost=Cost(
        vectors=10, fused_vectors=10, mixes=0, shifts=0, states=_states, whole=_whole, remnant=_remnant
    ),
)
