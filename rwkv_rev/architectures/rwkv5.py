"""RWKV-5 (Peng et al. 2024, "Eagle and Finch"): a decaying matrix per head, in three versions.

    5.0   a decay and a bonus per head; the bonus is stored as it is (``time_faaaa``) or as its logarithm
          (``time_first``); no gate
    5.1   a gate
    5.2   ("Eagle") a decay and a bonus per channel

Told by ``ln_x``, ``time_faaaa`` or a gate. Repositories of Hugging Face are those with remote code of
``RWKV/v5-Eagle-7B-HF``, whose names extend those of transformers' RWKV-4.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rwkv_rev.architectures import classic, classic_scan
from rwkv_rev.architectures.architecture import (
    NUMBER,
    Architecture,
    Cost,
    Layout,
    Part,
    Row,
    RwkvPackage,
    Stored,
)
from rwkv_rev.architectures.epsilons import divisor_of
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.reversal.fixed_point import decay_plan
from rwkv_rev.state import RwkvRevState
from rwkv_rev.wkv.chunked_wkv5 import SUB_CHUNK

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

REMOTE_CODE = "RWKV/v5-Eagle-7B-HF"
"""A published repository whose code ``config.json`` of an export refers to."""
_FUSED_SUB_CHUNK = 64  # of wkv/triton_wkv5.py, which cannot be imported without triton
_HEAD_SIZE = 64  # of all published models
_MIX_GATE = classic.row("time_mix.mix_gate", "att.time_mix_g", "attention.time_mix_gate", "D", classic.MIX)
_GATE = classic.row("time_mix.gate.weight", "att.gate.weight", "attention.gate.weight", "D D")
_GROUP_NORM = (
    classic.row("time_mix.ln_x.weight", "att.ln_x.weight", "attention.ln_x.weight", "D"),
    classic.row("time_mix.ln_x.bias", "att.ln_x.bias", "attention.ln_x.bias", "D"),
)


def _cells(
    config: "RwkvRevConfig", layer: int, *, gated: bool, per_channel: bool
) -> dict[str, ReversibleCell]:
    heads = config.num_attention_heads
    time_mix = TimeMixRwkv5(
        heads,
        config.head_size,
        (heads, config.head_size) if per_channel else (heads,),
        gated=gated,
        bonus_is_exponential=config.bonus_is_exponential,
        group_norm_epsilon=config.group_norm_epsilon,
    )
    return {
        "time_mix": time_mix,
        "channel_mix": ChannelMix(config.hidden_size, config.intermediate_size),
    }


def _initialize_time_mix(cell: TimeMixRwkv5, config: "RwkvRevConfig") -> None:
    depth = classic.depth_of(cell.layer, config)
    classic.initialize_mixes(cell, config)
    if cell.mix_gate is not None:
        classic.set_values(
            cell.mix_gate, classic.ramp(config) ** (0.5 * classic.height_of(cell.layer, config))
        )
    classic.initialize_decay_and_bonus(
        cell.time_decay, cell.bonus, depth, exponential=cell.bonus_is_exponential
    )
    classic.initialize_maps_and_norm(cell, config)


def _sizes(width: int, *, gated: bool) -> dict[str, Any]:
    size = math.gcd(width, _HEAD_SIZE)
    return {
        "num_attention_heads": width // size,
        "head_size": size,
        "intermediate_size": int(3.5 * width) // 32 * 32 if gated else 4 * width,
    }


def _told_by(stored: Stored, *, gated: bool, per_channel: bool) -> dict[str, Any] | None:
    kinds, decay, D = stored.shapes, stored.shapes["att.time_decay"], stored.width
    gate = not {"att.gate.weight", "att.time_mix_g"}.isdisjoint(kinds)
    if not gate and {"att.time_faaaa", "att.ln_x.weight"}.isdisjoint(kinds):
        return None
    matrix = len(decay) > 1 and decay[1] > 1 and decay[0] * decay[1] == D and decay[2:] in ((), (1,))
    if matrix != per_channel or (gate != gated and not matrix):
        return None
    H = decay[0] if decay else 0
    if not H or D % H or (not matrix and any(size != 1 for size in decay[1:])) or H == D:
        raise ValueError(
            f"time_decay has the shape {list(decay)}; "
            f"RWKV-5 of width D = {D} needs [H] or [H, N] with H*N = D and N > 1"
        )
    return {
        "num_attention_heads": H,
        "head_size": D // H,
        "bonus_is_exponential": not gated and "att.time_faaaa" not in kinds,
        "has_initial_state": "att.time_state" in kinds,
    }


def _hub_config(config: "RwkvRevConfig", layout: str) -> dict[str, Any]:
    return {
        "architectures": ["Rwkv5ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}--configuration_rwkv5.Rwkv5Config",
            "AutoModelForCausalLM": f"{REMOTE_CODE}--modeling_rwkv5.Rwkv5ForCausalLM",
        },
        "model_type": "rwkv5",
        "model_version": config.rwkv_version.replace(".", "_"),
        "head_size": config.head_size,
        "head_size_divisor": divisor_of(config.group_norm_epsilon),
        "num_attention_heads": config.head_size,  # published configs call the head size so
    }


def _states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
    # one per sub-chunk, the scan's last, and the state before the chunk
    sub_chunk = _FUSED_SUB_CHUNK if fused else SUB_CHUNK
    return batch * (math.ceil(length / sub_chunk) + 2) * config.hidden_size * config.head_size


def _whole(config: "RwkvRevConfig", batch: int) -> list[int]:
    matrices = NUMBER * batch * config.hidden_size * config.head_size
    return [matrices, NUMBER * batch * config.num_attention_heads]  # and the exponents of their grids


def _remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
    assert log_decay is not None
    heads, size = config.num_attention_heads, config.head_size
    per_channel = log_decay.reshape(heads, -1).expand(heads, size)
    return [
        8 * batch * heads,
        decay_plan(per_channel, length).packing.nbytes(batch, size),
    ]  # 8 for fingerprints


def _version(version: str, *, gated: bool, per_channel: bool) -> Architecture:
    decay = "H N" if per_channel else "H"
    return Architecture(
        version=version,
        has_heads=True,
        has_group_norm=True,
        has_two_bonuses=True,
        state_kind=RwkvRevState,
        state=classic.SHIFTS | {"wkv": Part("H N N", wide=True)},
        memory="wkv",
        keys="H N",
        lora_targets=classic.LORA_TARGETS,
        targets=classic.TARGETS,
        float32=classic.FLOAT32,
        sizes=partial(_sizes, gated=gated),
        cells=partial(_cells, gated=gated, per_channel=per_channel),
        initialization={TimeMixRwkv5: _initialize_time_mix, ChannelMix: classic.initialize_channel_mix},
        log_decay=classic.log_decay,
        tunes_state=True,
        layouts=(Layout("blinkdl", "", "blocks."), Layout("v5-hub", "rwkv.", "rwkv.blocks.")),
        outside=classic.OUTSIDE,
        block=(
            *classic.NORMS,
            *classic.MIXES,
            *((_MIX_GATE,) if gated else ()),
            classic.time_decay(decay),
            classic.bonus(decay, "time_faaaa", only=("bonus_is_exponential", False)),
            classic.bonus(decay, "time_first", only=("bonus_is_exponential", True)),
            *classic.MAPS,
            *((_GATE,) if gated else ()),
            *_GROUP_NORM,
            *classic.CHANNEL_MIX,
        ),
        after=classic.AFTER,
        # value index first there, key index first here
        initial_state=Row("model.initial_wkv.", "H N N", ("att.time_state", None), transposed=True),
        sign=classic.SIGN,
        told_by=partial(_told_by, gated=gated, per_channel=per_channel),
        hub_config=_hub_config,
        lost=classic.lost,
        scan=lambda config: classic_scan.SCAN,
        rwkv_package=RwkvPackage(),
        cost=Cost(
            vectors=22 if gated else 18,
            fused_vectors=18 if gated else 15,
            mixes=6 if gated else 5,
            states=_states,
            whole=_whole,
            remnant=_remnant,
        ),
    )


RWKV5_0 = _version("5.0", gated=False, per_channel=False)
RWKV5_1 = _version("5.1", gated=True, per_channel=False)
RWKV5_2 = _version("5.2", gated=True, per_channel=True)
