"""RWKV-7 (Peng et al. 2025, "RWKV-7 Goose"): a matrix per head, edited under keys; ``v_first`` flows to all layers.

Told by ``r_k``. Published are the trainer's ``.pth`` (x070), in which layer 0 may hold a ``v0``, ``v1`` and ``v2`` that
nothing reads, and repositories in the layout of flash-linear-attention (https://github.com/fla-org), which have no
place for these; its low-rank maps lie there as linear layers hold them, transposed. Ranks are read from shapes.

Initialisation: the trainer's (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import initialization as init

from rwkv_rev.architectures import classic, rwkv7_scan, rwkv7_tape
from rwkv_rev.architectures.architecture import (
    Architecture,
    Cost,
    Layout,
    Part,
    Piece,
    Row,
    RwkvPackage,
    Stored,
)
from rwkv_rev.architectures.epsilons import GROUP_NORM, LAYER_NORM, number, understood
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.fla import FLA, SIZES
from rwkv_rev.cells.channel_mix_rwkv7 import ChannelMixRwkv7
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.time_mix_rwkv7 import Ranks, TimeMixRwkv7
from rwkv_rev.state import RwkvRevState
from rwkv_rev.wkv.chunked_wkv7 import SUB_CHUNK

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

_FUSED_SUB_CHUNK = 64  # of wkv/triton_wkv7.py, which cannot be imported without triton
_HEAD_SIZE = 64  # of all published models
_MOST_RANK = 1 << 20
PACKED = "fla-x_x"
"""flash-linear-attention's first version: its six mixes are one tensor, which later ones cut when they load it."""
_RANKS = (("decay", "w"), ("rate", "a"), ("residual", "v"), ("gate", "g"))
"""Low-rank maps, and the letter that the layouts have for them."""


def _rank(name: str, factor: float) -> Field:
    def usual(config: Any) -> int:
        return max(32, round(factor * math.sqrt(config.hidden_size) / 32) * 32)

    return Field(int, usual, f"rank of the map of the {name}", least=1, most=_MOST_RANK)


FIELDS = {
    "decay_rank": _rank("decay", 2.5),
    "rate_rank": _rank("in-context rate", 2.5),
    "residual_rank": _rank("value residual", 1.7),
    "gate_rank": _rank("gate", 5),
    "unused_residual": Field(bool, False, "whether layer 0 holds v0, v1, v2, which nothing reads"),
}


# --- cells ----------------------------------------------------------------------------------------------------------


def _cells(config: "RwkvRevConfig", layer: int) -> dict[str, ReversibleCell]:
    ranks = Ranks(
        config.decay_rank, config.rate_rank, config.gate_rank, config.residual_rank if layer else None
    )
    time_mix = TimeMixRwkv7(
        config.num_attention_heads, config.head_size, ranks, group_norm_epsilon=config.group_norm_epsilon
    )
    if config.unused_residual and not layer:  # no parameters: no gradient, no adapter and no decay of weights
        time_mix.register_buffer("unused_base", torch.zeros(config.hidden_size))
        time_mix.register_buffer("unused_down", torch.zeros(config.hidden_size, config.residual_rank))
        time_mix.register_buffer("unused_up", torch.zeros(config.residual_rank, config.hidden_size))
    return {
        "time_mix": time_mix,
        "channel_mix": ChannelMixRwkv7(config.hidden_size, config.intermediate_size),
    }


def _initialize_time_mix(cell: TimeMixRwkv7, config: "RwkvRevConfig") -> None:
    height, width, size = classic.height_of(cell.layer, config), config.hidden_size, config.head_size
    powers = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
    for share, power in zip(cell.shares_before(), powers, strict=True):
        classic.set_values(share, 1 - classic.ramp(config) ** (power * height))
    each = torch.arange(width, dtype=torch.float64)
    along, middle = each / max(1, width - 1), (size - 1) / 2
    centred = along - 0.5
    zigzag = (each % size - middle) / max(0.5, middle)
    zigzag = zigzag * zigzag.abs()
    slow_to_fast = -6 + 6 * along ** (1 + classic.depth_of(cell.layer, config) ** 0.3)
    classic.set_values(cell.decay_base, slow_to_fast + 0.5 + 2.5 * zigzag)
    classic.set_values(cell.rate_base, -0.19 + 0.3 * zigzag + 0.4 * centred)
    maps = [(cell.decay_down, cell.decay_up), (cell.rate_down, cell.rate_up), (cell.gate_down, cell.gate_up)]
    if not cell.makes_first:
        classic.set_values(cell.residual_base, 0.73 - 0.4 * centred)
        maps.append((cell.residual_down, cell.residual_up))
    for down, up in maps:
        init.zeros_(down.weight)
        init.orthogonal_(up.weight, gain=0.1 * math.sqrt(max(1, up.in_features / up.out_features)))
    classic.set_values(cell.removal_scale, 0.71 - 0.1 * centred)
    init.constant_(cell.rate_scale, 1.02)
    init.constant_(cell.bonus, -0.04)
    init.constant_(cell.ln_x.weight, ((1 + cell.layer) / config.num_hidden_layers) ** 0.7)
    init.zeros_(cell.ln_x.bias)
    init.orthogonal_(cell.receptance.weight)
    init.orthogonal_(cell.key.weight, gain=0.1)
    init.orthogonal_(cell.value.weight)
    init.zeros_(cell.output.weight)


def _initialize_channel_mix(cell: ChannelMixRwkv7, config: "RwkvRevConfig") -> None:
    classic.set_values(
        cell.mix_before_key, 1 - classic.ramp(config) ** classic.height_of(cell.layer, config) ** 4
    )
    init.orthogonal_(cell.key.weight)
    init.zeros_(cell.value.weight)


def _sizes(width: int) -> dict[str, Any]:
    size = math.gcd(width, _HEAD_SIZE)
    return {"num_attention_heads": width // size, "head_size": size, "intermediate_size": 4 * width}


# --- names ----------------------------------------------------------------------------------------------------------


def _vector(ours: str, blinkdl: str, fla: str, lowest: int = 0) -> Row:
    return Row(ours, "D", (blinkdl, fla), (classic.MIX, "D"), lowest=lowest)


def _low_rank(ours: str, letter: str, rank: str, lowest: int = 0) -> tuple[Row, Row]:
    """Both maps of a pair, [D, R] and [R, D] in the ``.pth``."""
    names = [(f"att.{letter}1", f"attn.{letter}_lora.lora.0.weight")]
    names += [(f"att.{letter}2", f"attn.{letter}_lora.lora.2.weight")]
    down, up = f"{rank} D", f"D {rank}"
    turned = (True, False)
    return (
        Row(f"time_mix.{ours}_down.weight", down, names[0], (up, down), transposed=turned, lowest=lowest),
        Row(f"time_mix.{ours}_up.weight", up, names[1], (down, up), transposed=turned, lowest=lowest),
    )


def _unused(ours: str, name: str, shape: str, foreign_shape: str | None = None) -> Row:
    return Row(
        f"time_mix.unused_{ours}",
        shape,
        (f"att.{name}", None),
        foreign_shape,
        only=("unused_residual", True),
        highest=0,
    )


_BLOCK = (
    classic.row("ln1.weight", "ln1.weight", "attn_norm.weight", "D"),
    classic.row("ln1.bias", "ln1.bias", "attn_norm.bias", "D"),
    classic.row("ln2.weight", "ln2.weight", "ffn_norm.weight", "D"),
    classic.row("ln2.bias", "ln2.bias", "ffn_norm.bias", "D"),
    classic.row("time_mix.mix_before_receptance", "att.x_r", "attn.x_r", "D", classic.MIX),
    classic.row("time_mix.mix_before_decay", "att.x_w", "attn.x_w", "D", classic.MIX),
    classic.row("time_mix.mix_before_key", "att.x_k", "attn.x_k", "D", classic.MIX),
    classic.row("time_mix.mix_before_value", "att.x_v", "attn.x_v", "D", classic.MIX),
    classic.row("time_mix.mix_before_rate", "att.x_a", "attn.x_a", "D", classic.MIX),
    classic.row("time_mix.mix_before_gate", "att.x_g", "attn.x_g", "D", classic.MIX),
    _vector("time_mix.decay_base", "att.w0", "attn.w_lora.lora.2.bias"),
    *_low_rank("decay", "w", "Rw"),
    _vector("time_mix.rate_base", "att.a0", "attn.a_lora.lora.2.bias"),
    *_low_rank("rate", "a", "Ra"),
    _vector("time_mix.residual_base", "att.v0", "attn.v_lora.lora.2.bias", lowest=1),
    *_low_rank("residual", "v", "Rv", lowest=1),
    _unused("base", "v0", "D", classic.MIX),
    _unused("down", "v1", "D Rv"),
    _unused("up", "v2", "Rv D"),
    *_low_rank("gate", "g", "Rg"),
    _vector("time_mix.removal_scale", "att.k_k", "attn.k_k"),
    _vector("time_mix.rate_scale", "att.k_a", "attn.k_a"),
    classic.row("time_mix.bonus", "att.r_k", "attn.r_k", "H N"),
    classic.row("time_mix.receptance.weight", "att.receptance.weight", "attn.r_proj.weight", "D D"),
    classic.row("time_mix.key.weight", "att.key.weight", "attn.k_proj.weight", "D D"),
    classic.row("time_mix.value.weight", "att.value.weight", "attn.v_proj.weight", "D D"),
    classic.row("time_mix.output.weight", "att.output.weight", "attn.o_proj.weight", "D D"),
    classic.row("time_mix.ln_x.weight", "att.ln_x.weight", "attn.g_norm.weight", "D"),
    classic.row("time_mix.ln_x.bias", "att.ln_x.bias", "attn.g_norm.bias", "D"),
    _vector("channel_mix.mix_before_key", "ffn.x_k", "ffn.x_k"),
    classic.row("channel_mix.key.weight", "ffn.key.weight", "ffn.key.weight", "F D"),
    classic.row("channel_mix.value.weight", "ffn.value.weight", "ffn.value.weight", "D F"),
)
_ORDER = "rwkvag"
"""Of the mixes in ``x_x``."""


def _packed(row: Row) -> Row:
    """With its place in :data:`PACKED`."""
    mix = re.fullmatch(r"att\.x_(.)", row.foreign[0] or "")
    shapes = row.foreign_shape if isinstance(row.foreign_shape, tuple) else (row.foreign_letters(0),) * 2
    turned = tuple(row.is_transposed(column) for column in range(2))
    if mix is None:
        return replace(
            row,
            foreign=(*row.foreign, row.foreign[1]),
            foreign_shape=(*shapes, shapes[1]),
            transposed=(*turned, turned[1]),
        )
    return replace(
        row,
        foreign=(*row.foreign, "attn.x_x"),
        foreign_shape=(*shapes, "6 D"),
        squeezable=True,
        pieces=(None, None, Piece(0, _ORDER.index(mix[1]), len(_ORDER))),
    )


_OUTSIDE = (
    classic.row("model.embeddings.weight", "emb.weight", "model.embeddings.weight", "V D"),
    classic.row("model.ln0.weight", "blocks.0.ln0.weight", "model.layers.0.pre_norm.weight", "D"),
    classic.row("model.ln0.bias", "blocks.0.ln0.bias", "model.layers.0.pre_norm.bias", "D"),
)
_AFTER = (
    classic.row("model.ln_out.weight", "ln_out.weight", "model.norm.weight", "D"),
    classic.row("model.ln_out.bias", "ln_out.bias", "model.norm.bias", "D"),
    classic.row("head.weight", "head.weight", "lm_head.weight", "V D"),
)


# --- files ----------------------------------------------------------------------------------------------------------


def _told_by(stored: Stored) -> dict[str, Any]:
    kinds, D = stored.shapes, stored.width
    bonus = kinds["att.r_k"]
    if len(bonus) != 2 or bonus[0] * bonus[1] != D:
        raise ValueError(
            f"r_k has the shape {list(bonus)}; RWKV-7 of width D = {D} needs [H, N] with H*N = D"
        )

    def rank(shape: tuple[int, ...]) -> int | None:
        """Of a map [D, R] or [R, D]; None where it is none such, and shapes will be complained of."""
        if len(shape) != 2 or D not in shape or 0 in shape:
            return None
        return shape[1] if shape[0] == D else shape[0]

    ranks = {
        f"{ours}_rank": stored.size((f"att.{letter}1", f"att.{letter}2"), rank) for ours, letter in _RANKS
    }
    return {name: found for name, found in ranks.items() if found is not None} | {
        "num_attention_heads": bonus[0],
        "head_size": bonus[1],
        "unused_residual": 0 in stored.tensors.get("att.v0", {}),
        "has_initial_state": "att.time_state" in kinds,
    }


def _epsilons(config: Mapping[str, Any], layout: str, head_size: int) -> tuple[float, float]:
    """flash-linear-attention's GroupNorm has N times the eps of its LayerNorms."""
    if layout not in (FLA, PACKED):
        return LAYER_NORM, GROUP_NORM
    understood(config, hidden_act="sqrelu", attn=None, norm_first=True, norm_bias=True)
    epsilon = number(config, "norm_eps", LAYER_NORM, least=0, most=1)
    return epsilon, head_size * epsilon


def _hub_config(config: "RwkvRevConfig", layout: str) -> dict[str, Any]:
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "attn": None,
        "attn_mode": "chunk",
        "fuse_norm": False,
        "head_dim": config.head_size,
        "num_heads": config.num_attention_heads,
        "hidden_act": "sqrelu",
        "hidden_ratio": config.intermediate_size / config.hidden_size,
        "norm_bias": True,
        "norm_eps": config.layer_norm_epsilon,
        "norm_first": True,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.rate_rank,
        "v_low_rank_dim": config.residual_rank,
        "gate_low_rank_dim": config.gate_rank,
        "value_dim": [config.hidden_size] * config.num_hidden_layers,
    }


def _lost(config: "RwkvRevConfig", layout: str) -> str | None:
    eps = config.group_norm_epsilon
    if layout not in (FLA, PACKED):
        return classic.lost(config, layout)
    if not math.isclose(eps, config.head_size * config.layer_norm_epsilon):
        return (
            f"this model needs GroupNorm eps {eps:g}, and flash-linear-attention will use N times that of the "
            f"LayerNorms, {config.head_size * config.layer_norm_epsilon:g}, and compute something else"
        )
    if config.unused_residual:
        return "v0, v1 and v2 of layer 0, which nothing reads, have no place in this layout and are left out"
    return None


_SAYS = SIZES | {
    "head_dim": ("N", "time_mix.bonus"),
    "num_heads": ("H", "time_mix.bonus"),
    "decay_low_rank_dim": ("Rw", "time_mix.decay_down.weight"),
    "a_low_rank_dim": ("Ra", "time_mix.rate_down.weight"),
    "v_low_rank_dim": ("Rv", "time_mix.residual_down.weight"),
    "gate_low_rank_dim": ("Rg", "time_mix.gate_down.weight"),
}


# --- what training takes --------------------------------------------------------------------------------------------


def _states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
    if fused:
        # per sub-chunk its state, its transition and the inverse of its triangle; the five factors of whole sub-chunks
        pieces = math.ceil(length / _FUSED_SUB_CHUNK)
        matrices = 2 * (pieces + 1) * config.hidden_size * config.head_size
        inverses = pieces * config.num_attention_heads * _FUSED_SUB_CHUNK**2
        return batch * (matrices + inverses + 5 * pieces * _FUSED_SUB_CHUNK * config.hidden_size)
    # a matrix per sub-chunk and two, and what each token removes, a vector that whole sub-chunks have
    pieces = math.ceil(length / SUB_CHUNK)
    missing = pieces * SUB_CHUNK - length
    return batch * config.hidden_size * ((pieces + 2) * config.head_size + missing)


RWKV7 = Architecture(
    version="7",
    has_heads=True,
    has_group_norm=True,
    state_kind=RwkvRevState,
    state=classic.SHIFTS | {"wkv": Part("H N N", wide=True)},
    memory="wkv",
    keys="H N",
    lora_targets=(
        *("receptance", "key", "value", "output"),
        *(f"{ours}_{part}" for ours, _ in _RANKS for part in ("down", "up")),
    ),
    targets=classic.TARGETS,
    float32=("decay_base",),
    sizes=_sizes,
    fields=FIELDS,
    letters={"Rw": "decay_rank", "Ra": "rate_rank", "Rv": "residual_rank", "Rg": "gate_rank"},
    cells=_cells,
    initialization={TimeMixRwkv7: _initialize_time_mix, ChannelMixRwkv7: _initialize_channel_mix},
    tunes_state=True,
    layouts=(
        Layout("blinkdl", "", "blocks."),
        Layout(FLA, "model.layers.", "model.layers.", says=_SAYS),
        Layout(PACKED, "model.layers.", "model.layers.", sign="attn.x_x", says=_SAYS, family=FLA),
    ),
    outside=tuple(map(_packed, _OUTSIDE)),
    block=tuple(map(_packed, _BLOCK)),
    after=tuple(map(_packed, _AFTER)),
    # value index first there, key index first here
    initial_state=Row("model.initial_wkv.", "H N N", ("att.time_state", None, None), transposed=True),
    sign="time_mix.bonus",
    told_by=_told_by,
    epsilons=_epsilons,
    hub_config=_hub_config,
    lost=_lost,
    scan=lambda config: rwkv7_scan.SCAN,
    rwkv_package=RwkvPackage({"RWKV_V7_ON": "1"}, inexact="e^(-1/2) of RWKV-7 as 0.606531"),
    # most of what the recurrence reads is in float32 whatever the model's precision
    # on a CUDA device the norm keeps one of its two vectors and a token shift its input alone; what a token removes is
    # among the factors there (_states)
    cost=Cost(
        vectors=33,
        fused_vectors=29,
        mixes=7,
        states=_states,
        whole=rwkv7_tape.whole,
        remnant=rwkv7_tape.remnant,
        lifted=rwkv7_tape.lifted,
        half=0.8,
        narrow=0.72,
    ),
)
