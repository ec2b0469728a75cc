"""RWKV-6 (Peng et al. 2024, "Eagle and Finch"): RWKV-5.2 whose mixes and decays depend on the data.

Told by ``time_maa_x``. Published are the trainer's ``.pth`` (x060), repositories with remote code
(``RWKV/v6-Finch-1B6-HF``), whose names extend those of RWKV-5's, and repositories in the layout of
flash-linear-attention (https://github.com/fla-org). The low-rank maps of the five mixes lie in one tensor there, and in
flash-linear-attention's the mixes themselves, too, each in an order of its own (w, k, v, r, g; r, w, k, v, g); here
every one is a tensor. Ranks are read from shapes.

flash-linear-attention computes its GroupNorm with the eps of the LayerNorms, 1e-5, whatever the model was trained with
(64e-5, elsewhere). Such a folder is taken at its word, unless its ``config.json`` has the ``head_size_divisor`` of the
other layouts, which our exports write there.

Initialisation: the trainer's (BlinkDL/RWKV-LM, RWKV-v5/src/model.py).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures import classic, rwkv6_scan
from rwkv_rev.architectures.architecture import (
    NUMBER,
    Architecture,
    Cost,
    Layout,
    Part,
    Piece,
    Row,
    RwkvPackage,
    Stored,
)
from rwkv_rev.architectures.epsilons import by_divisor, divisor_of, number, understood
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.fla import FLA, SIZES
from rwkv_rev.cells.channel_mix_rwkv6 import ChannelMixRwkv6
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.time_mix_rwkv6 import MIXED, Ranks, TimeMixRwkv6
from rwkv_rev.state import RwkvRevState
from rwkv_rev.wkv.chunked_wkv6 import SUB_CHUNK

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

REMOTE_CODE = "RWKV/v6-Finch-1B6-HF"
"""A published repository whose code ``config.json`` of an export refers to."""
_HEAD_SIZE = 64  # of all published models
_MOST_RANK = 1 << 20
_FUSED_SUB_CHUNK = 64  # of wkv/triton_wkv6.py, which cannot be imported without triton
_WIDE = 4096  # from here on published models have twice the ranks
_FLA_ORDER = ("receptance", "decay", "key", "value", "gate")


def _rank(name: str, usual: int) -> Field:
    def default(config: Any) -> int:
        return usual if config.hidden_size < _WIDE else 2 * usual

    return Field(int, default, f"rank of the map of {name}", least=1, most=_MOST_RANK)


# --- cells ----------------------------------------------------------------------------------------------------------


def _cells(config: "RwkvRevConfig", layer: int) -> dict[str, ReversibleCell]:
    time_mix = TimeMixRwkv6(
        config.num_attention_heads,
        config.head_size,
        Ranks(config.mix_rank, config.decay_rank),
        group_norm_epsilon=config.group_norm_epsilon,
    )
    return {
        "time_mix": time_mix,
        "channel_mix": ChannelMixRwkv6(config.hidden_size, config.intermediate_size),
    }


def _initialize_time_mix(cell: TimeMixRwkv6, config: "RwkvRevConfig") -> None:
    """Linear maps as in RWKV-5; a zero map of each low-rank pair, so that nothing depends on the data at first."""
    height, depth = classic.height_of(cell.layer, config), classic.depth_of(cell.layer, config)
    ramp = classic.ramp(config)
    classic.set_values(cell.mix_before_input, 1 - ramp**height)
    for name in MIXED:
        power = height / 2 if name in ("receptance", "gate") else height
        share = 1 - ramp**power - (0.3 * depth if name == "value" else 0)
        classic.set_values(getattr(cell, f"mix_before_{name}"), share)
    for pair in (*(f"{name}_mix" for name in MIXED), "decay"):
        init.zeros_(getattr(cell, f"{pair}_down").weight)
        init.uniform_(getattr(cell, f"{pair}_up").weight, -0.01, 0.01)
    classic.initialize_decay_and_bonus(cell.decay_base, cell.bonus, depth)
    classic.initialize_maps_and_norm(cell, config)


def _initialize_channel_mix(cell: ChannelMixRwkv6, config: "RwkvRevConfig") -> None:
    for share in cell.plan_sources():
        classic.set_values(share, 1 - classic.ramp(config) ** classic.height_of(cell.layer, config))
    classic.initialize_channel_maps(cell, config)


def _sizes(width: int) -> dict[str, Any]:
    size = math.gcd(width, _HEAD_SIZE)
    return {
        "num_attention_heads": width // size,
        "head_size": size,
        "intermediate_size": max(1, int(3.5 * width) // 32 * 32),
    }


# --- names ----------------------------------------------------------------------------------------------------------


def _row(ours: str, blinkdl: str, hub: str, fla: str, shape: str) -> Row:
    return Row(ours, shape, (blinkdl, hub, fla))


def _vector(ours: str, blinkdl: str, hub: str, fla: str) -> Row:
    return Row(ours, "D", (blinkdl, hub, fla), (classic.MIX, classic.MIX, "D"))


def _mix(name: str) -> tuple[Row, Row, Row]:
    """The share of a mix, and its pair of low-rank maps."""
    place, fla = MIXED.index(name), _FLA_ORDER.index(name)
    letter = "w" if name == "decay" else name[0]
    names = (f"att.time_maa_{letter}", f"attention.time_maa_{letter}", "attn.x_bias")
    shapes = (classic.MIX, classic.MIX, "5 D")
    share = Row(f"time_mix.mix_before_{name}", "D", names, shapes, pieces=(None, None, Piece(0, fla, 5)))
    down = Row(
        f"time_mix.{name}_mix_down.weight",
        "Rm D",
        ("att.time_maa_w1", "attention.time_maa_w1", "attn.x_proj.0.linear.weight"),
        ("D 5*Rm", "D 5*Rm", "5*Rm D"),
        transposed=(True, True, False),
        pieces=(Piece(1, place, 5), Piece(1, place, 5), Piece(0, fla, 5)),
    )
    up = Row(
        f"time_mix.{name}_mix_up.weight",
        "D Rm",
        ("att.time_maa_w2", "attention.time_maa_w2", "attn.x_proj.2.weight"),
        ("5 Rm D", "5 Rm D", "D 5*Rm"),
        transposed=(True, True, False),
        pieces=(Piece(0, place, 5), Piece(0, place, 5), Piece(1, fla, 5)),
    )
    return share, down, up


def _decay_map(ours: str, name: str, fla: str, shape: str, foreign: str) -> Row:
    names = (f"att.{name}", f"attention.{name}", f"attn.w_proj.linear.lora.{fla}.weight")
    return Row(
        f"time_mix.{ours}.weight", shape, names, (foreign, foreign, shape), transposed=(True, True, False)
    )


def _map(name: str) -> Row:
    fla = "attn.o_proj.weight" if name == "output" else f"attn.{name[0]}_proj.linear.weight"
    return _row(f"time_mix.{name}.weight", f"att.{name}.weight", f"attention.{name}.weight", fla, "D D")


_MIXES = [_mix(name) for name in MIXED]
_BLOCK = (
    _row("ln1.weight", "ln1.weight", "ln1.weight", "attn_norm.weight", "D"),
    _row("ln1.bias", "ln1.bias", "ln1.bias", "attn_norm.bias", "D"),
    _row("ln2.weight", "ln2.weight", "ln2.weight", "ffn_norm.weight", "D"),
    _row("ln2.bias", "ln2.bias", "ln2.bias", "ffn_norm.bias", "D"),
    _vector("time_mix.mix_before_input", "att.time_maa_x", "attention.time_maa_x", "attn.x_proj.0.mu"),
    *(share for share, _, _ in _MIXES),
    *(down for _, down, _ in _MIXES),
    *(up for _, _, up in _MIXES),
    _vector(
        "time_mix.decay_base", "att.time_decay", "attention.time_decay", "attn.w_proj.linear.lora.2.bias"
    ),
    _decay_map("decay_down", "time_decay_w1", "0", "Rw D", "D Rw"),
    _decay_map("decay_up", "time_decay_w2", "2", "D Rw", "Rw D"),
    _row("time_mix.bonus", "att.time_faaaa", "attention.time_faaaa", "attn.bonus", "H N"),
    *(_map(name) for name in ("receptance", "key", "value", "output", "gate")),
    _row("time_mix.ln_x.weight", "att.ln_x.weight", "attention.ln_x.weight", "attn.g_norm.weight", "D"),
    _row("time_mix.ln_x.bias", "att.ln_x.bias", "attention.ln_x.bias", "attn.g_norm.bias", "D"),
    _vector("channel_mix.mix_before_key", "ffn.time_maa_k", "feed_forward.time_maa_k", "ffn.key.mu"),
    _vector(
        "channel_mix.mix_before_receptance", "ffn.time_maa_r", "feed_forward.time_maa_r", "ffn.receptance.mu"
    ),
    _row(
        "channel_mix.key.weight", "ffn.key.weight", "feed_forward.key.weight", "ffn.key.linear.weight", "F D"
    ),
    _row(
        "channel_mix.receptance.weight",
        "ffn.receptance.weight",
        "feed_forward.receptance.weight",
        "ffn.receptance.linear.weight",
        "D D",
    ),
    _row(
        "channel_mix.value.weight", "ffn.value.weight", "feed_forward.value.weight", "ffn.value.weight", "D F"
    ),
)


def _with_fla(row: Row, fla: str) -> Row:
    return Row(row.ours, row.shape, (*row.foreign, fla))


_OUTSIDE = tuple(
    _with_fla(row, fla)
    for row, fla in zip(
        classic.OUTSIDE,
        ("model.embeddings.weight", "model.layers.0.pre_norm.weight", "model.layers.0.pre_norm.bias"),
        strict=True,
    )
)
_AFTER = tuple(
    _with_fla(row, fla)
    for row, fla in zip(
        classic.AFTER, ("model.norm.weight", "model.norm.bias", "lm_head.weight"), strict=True
    )
)


# --- files ----------------------------------------------------------------------------------------------------------


def _told_by(stored: Stored) -> dict[str, Any] | None:
    kinds, D = stored.shapes, stored.width
    if "att.time_maa_x" not in kinds:
        return None
    bonus = kinds.get("att.time_faaaa", (1, D))
    if len(bonus) != 2 or bonus[0] * bonus[1] != D:
        raise ValueError(
            f"time_faaaa has the shape {list(bonus)}; RWKV-6 of width D = {D} needs [H, N] with H*N = D"
        )

    def rank(letters: str, of: int = 1) -> int | None:
        """Of ``of`` maps [D, R] in one tensor; None where there is none such, and shapes will be complained of."""

        def told(shape: tuple[int, ...]) -> int | None:
            numbers = math.prod(shape)
            return numbers // (of * D) if numbers >= of * D > 0 else None

        return stored.size((f"att.{letters}_w1", f"att.{letters}_w2"), told)

    ranks = {"mix_rank": rank("time_maa", 5), "decay_rank": rank("time_decay")}
    return {name: found for name, found in ranks.items() if found is not None} | {
        "num_attention_heads": bonus[0],
        "head_size": bonus[1],
        "has_initial_state": "att.time_state" in kinds,
    }


def _epsilons(config: Mapping[str, Any], layout: str, head_size: int) -> tuple[float, float]:
    if layout != FLA:
        return by_divisor(config, layout, head_size)
    understood(config, hidden_act="sqrelu", attn=None, norm_first=True, norm_bias=True)
    epsilon = number(config, "norm_eps", 1e-5, least=0, most=1)
    if config.get("head_size_divisor") is None:
        return epsilon, epsilon
    return epsilon, by_divisor(config, layout, head_size)[1]


def _hub_config(config: "RwkvRevConfig", layout: str) -> dict[str, Any]:
    common = {"model_type": "rwkv6", "head_size_divisor": divisor_of(config.group_norm_epsilon)}
    if layout == FLA:
        return common | {
            "architectures": ["RWKV6ForCausalLM"],
            "attn": None,
            "attn_mode": "chunk",
            "expand_k": 1.0,
            "expand_v": 1.0,
            "fuse_norm": False,
            "num_heads": config.num_attention_heads,
            "hidden_act": "sqrelu",
            "hidden_ratio": config.intermediate_size / config.hidden_size,
            "norm_bias": True,
            "norm_eps": config.layer_norm_epsilon,
            "norm_first": True,
            "proj_low_rank_dim": config.mix_rank,
            "gate_low_rank_dim": config.decay_rank,
        }
    return common | {
        "architectures": ["Rwkv6ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}--configuration_rwkv6.Rwkv6Config",
            "AutoModelForCausalLM": f"{REMOTE_CODE}--modeling_rwkv6.Rwkv6ForCausalLM",
        },
        "head_size": config.head_size,
        "num_attention_heads": config.head_size,  # published configs call the head size so
    }


def _lost(config: "RwkvRevConfig", layout: str) -> str | None:
    eps, norms = config.group_norm_epsilon, config.layer_norm_epsilon
    if layout == FLA:
        if math.isclose(eps, norms):
            return None
        return (
            f"this model needs GroupNorm eps {eps:g}, and flash-linear-attention will use that of the LayerNorms, "
            f"{norms:g}, and compute something else"
        )
    usual = (32, 64) if config.hidden_size != _WIDE else (64, 128)
    if layout != "blinkdl" and (config.mix_rank, config.decay_rank) != usual:
        return (
            f"the low-rank maps have ranks {config.mix_rank} and {config.decay_rank}, and the code of {REMOTE_CODE} "
            f"knows {usual[0]} and {usual[1]} alone at this width: it will not load them"
        )
    return classic.lost(config, layout)


_SAYS = SIZES | {
    "num_heads": ("H", "time_mix.bonus"),
    "proj_low_rank_dim": ("Rm", "time_mix.decay_mix_up.weight"),
    "gate_low_rank_dim": ("Rw", "time_mix.decay_down.weight"),
}


# --- what training takes --------------------------------------------------------------------------------------------


def _states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
    # a matrix per sub-chunk, the scan's last, and the state before the chunk; products of pairs of a sub-chunk's
    # tokens, which kernels make again; of each token the hidden layers of the low-rank maps
    sub_chunk = _FUSED_SUB_CHUNK if fused else SUB_CHUNK
    pieces = math.ceil(length / sub_chunk)
    matrices = (pieces + 2) * config.hidden_size * config.head_size
    pairs = 0 if fused else pieces * config.num_attention_heads * sub_chunk**2
    hidden = length * (5 * config.mix_rank + config.decay_rank)
    return batch * (matrices + pairs + hidden)


def _whole(config: "RwkvRevConfig", batch: int) -> list[int]:
    matrices = NUMBER * batch * config.hidden_size * config.head_size
    return [matrices, NUMBER * batch * config.num_attention_heads]  # and the exponents of their grids


def _remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
    """The most that any data take: fingerprints, all 32 bits of each number, and a byte per row."""
    matrices, _ = _whole(config, batch)
    return [8 * batch * config.num_attention_heads, matrices, batch * config.hidden_size]


RWKV6 = Architecture(
    version="6",
    has_heads=True,
    has_group_norm=True,
    state_kind=RwkvRevState,
    state=classic.SHIFTS | {"wkv": Part("H N N", wide=True)},
    memory="wkv",
    keys="H N",
    lora_targets=(
        *classic.LORA_TARGETS,
        *(
            f"{pair}_{part}"
            for pair in (*(f"{name}_mix" for name in MIXED), "decay")
            for part in ("down", "up")
        ),
    ),
    targets=classic.TARGETS,
    float32=("decay_base", "bonus"),
    sizes=_sizes,
    fields={"mix_rank": _rank("each mix", 32), "decay_rank": _rank("the decay", 64)},
    letters={"Rm": "mix_rank", "Rw": "decay_rank"},
    cells=_cells,
    initialization={TimeMixRwkv6: _initialize_time_mix, ChannelMixRwkv6: _initialize_channel_mix},
    tunes_state=True,
    layouts=(
        Layout("blinkdl", "", "blocks."),
        Layout("v6-hub", "rwkv.", "rwkv.blocks."),
        Layout(FLA, "model.layers.", "model.layers.", says=_SAYS),
    ),
    outside=_OUTSIDE,
    block=_BLOCK,
    after=_AFTER,
    # value index first there, key index first here
    initial_state=Row("model.initial_wkv.", "H N N", ("att.time_state", None, None), transposed=True),
    sign="time_mix.mix_before_input",
    told_by=_told_by,
    epsilons=_epsilons,
    hub_config=_hub_config,
    lost=_lost,
    scan=lambda config: rwkv6_scan.SCAN,
    rwkv_package=RwkvPackage(),
    # the recurrence keeps its decays and states in float32 whatever the model's precision
    # on a CUDA device the gated norm keeps two of its five vectors, a token shift its input alone, and nobody keeps
    # decays twice
    cost=Cost(
        vectors=33,
        fused_vectors=29,
        mixes=2,
        states=_states,
        whole=_whole,
        remnant=_remnant,
        half=0.82,
        narrow=0.68,
    ),
)
