"""RWKV-4: a running mean per channel (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era").

Its memory is three numbers per channel and no matrix, and the ``rwkv`` package reads no tuned initial state of it.
Told by: ``time_decay`` and none of what newer generations have. Repositories of Hugging Face are those of
``RwkvForCausalLM`` of transformers.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures import classic, classic_scan
from rwkv_rev.architectures.architecture import NUMBER, Architecture, Cost, Layout, Part, RwkvPackage, Stored
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.state import RwkvRevState
from rwkv_rev.wkv.naive import EMPTY_EXPONENT

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig


def _cells(config: "RwkvRevConfig", layer: int) -> dict[str, ReversibleCell]:
    return {
        "time_mix": TimeMixRwkv4(config.hidden_size),
        "channel_mix": ChannelMix(config.hidden_size, config.intermediate_size),
    }


def _initialize_time_mix(cell: TimeMixRwkv4, config: "RwkvRevConfig") -> None:
    depth, size = classic.depth_of(cell.layer, config), config.hidden_size
    classic.initialize_mixes(cell, config)
    steps = torch.arange(size, dtype=torch.float64)
    zigzag = (steps + 1) % 3 - 1
    classic.set_values(cell.time_decay, -5 + 8 * (steps / max(1, size - 1)) ** (0.7 + 1.3 * depth))
    classic.set_values(cell.bonus, zigzag * 0.5 + math.log(0.3))
    init.zeros_(cell.receptance.weight)
    init.zeros_(cell.key.weight)
    init.orthogonal_(cell.value.weight)
    init.zeros_(cell.output.weight)


def _begin(memory: Tensor) -> None:
    memory[..., 2, :] = EMPTY_EXPONENT  # of (a, b, m)


def _sizes(width: int) -> dict[str, Any]:
    return {"num_attention_heads": 1, "head_size": width, "intermediate_size": 4 * width}


def _told_by(stored: Stored) -> dict[str, Any]:
    return {"num_attention_heads": 1, "head_size": stored.width}


def _hub_config(config: "RwkvRevConfig", layout: str) -> dict[str, Any]:
    return {"model_type": "rwkv", "context_length": 1024}


def _states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
    if fused:
        return 0
    piece = 1 << ((length - 1).bit_length() // 2)  # of the scan, see wkv/chunked_wkv4.py
    pieces = -(-length // piece)
    numbers = 2 if length % piece == 0 else 3  # without maxima, see wkv/linear_wkv4.py
    return numbers * batch * (piece + 1) * pieces * config.hidden_size


def _whole(config: "RwkvRevConfig", batch: int) -> list[int]:
    return [NUMBER * batch * 3 * config.hidden_size]


def _remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
    return [8, *_whole(config, batch)]  # a fingerprint, and the state itself


RWKV4 = Architecture(
    version="4",
    state_kind=RwkvRevState,
    state=classic.SHIFTS | {"wkv": Part("3 D", wide=True, begin=_begin)},
    memory="wkv",
    keys="D",
    lora_targets=classic.LORA_TARGETS,
    targets=classic.TARGETS,
    float32=classic.FLOAT32,
    sizes=_sizes,
    cells=_cells,
    initialization={TimeMixRwkv4: _initialize_time_mix, ChannelMix: classic.initialize_channel_mix},
    log_decay=classic.log_decay,
    layouts=(Layout("blinkdl", "", "blocks."), Layout("transformers", "rwkv.", "rwkv.blocks.")),
    outside=classic.OUTSIDE,
    block=(
        *classic.NORMS,
        *classic.MIXES,
        classic.time_decay("D"),
        classic.bonus("D", "time_first"),
        *classic.MAPS,
        *classic.CHANNEL_MIX,
    ),
    after=classic.AFTER,
    sign=classic.SIGN,
    told_by=_told_by,
    hub_config=_hub_config,
    scan=lambda config: classic_scan.SCAN,
    rwkv_package=RwkvPackage(),
    cost=Cost(vectors=18, fused_vectors=17, mixes=5, states=_states, whole=_whole, remnant=_remnant),
)
