"""What RWKV-4 and RWKV-5 share: LayerNorms, token-shift mixes, the channel mix, their names and initialisation.

Initialisation: RWKV paper, appendix E ("Parameter initializations"), and for RWKV-5 the v5 trainer's
``generate_init_weight`` (BlinkDL/RWKV-LM, RWKV-v5/src/model.py): embeddings near zero, decays spread over the channels
by depth, and every block the identity because its output maps start at zero.

Vectors that mix a token with the one before have the shape [1, 1, D] in every foreign layout and [D] in ours.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import initialization as init

from rwkv_rev.architectures.architecture import AdapterTargets, Part, Row
from rwkv_rev.architectures.epsilons import GROUP_NORM
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.cells.time_mix_rwkv6 import TimeMixRwkv6

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

LORA_TARGETS = ("receptance", "key", "value", "gate", "output")
TARGETS = AdapterTargets(
    square=("receptance", "output"),
    scaled=("time_mix.key", "time_mix.value", "channel_mix.value"),
    scaled_inputs=("channel_mix.value",),
)
FLOAT32 = ("time_decay", "bonus")
"""Decays act through a double exponential: half precision would change them."""
SIGN = "time_mix.time_decay"
MIX = "1 1 D"
SHIFTS = {"time_shift": Part("D"), "channel_shift": Part("D")}
"""The token shifts' part of the state."""


def row(ours: str, blinkdl: str, hugging_face: str, shape: str, foreign_shape: str | None = None) -> Row:
    """A tensor of every model."""
    return Row(ours, shape, (blinkdl, hugging_face), foreign_shape)


OUTSIDE = (
    row("model.embeddings.weight", "emb.weight", "rwkv.embeddings.weight", "V D"),
    row("model.ln0.weight", "blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight", "D"),
    row("model.ln0.bias", "blocks.0.ln0.bias", "rwkv.blocks.0.pre_ln.bias", "D"),
)
NORMS = (
    row("ln1.weight", "ln1.weight", "ln1.weight", "D"),
    row("ln1.bias", "ln1.bias", "ln1.bias", "D"),
    row("ln2.weight", "ln2.weight", "ln2.weight", "D"),
    row("ln2.bias", "ln2.bias", "ln2.bias", "D"),
)
MIXES = (
    row("time_mix.mix_key", "att.time_mix_k", "attention.time_mix_key", "D", MIX),
    row("time_mix.mix_value", "att.time_mix_v", "attention.time_mix_value", "D", MIX),
    row("time_mix.mix_receptance", "att.time_mix_r", "attention.time_mix_receptance", "D", MIX),
)
MAPS = (
    row("time_mix.receptance.weight", "att.receptance.weight", "attention.receptance.weight", "D D"),
    row("time_mix.key.weight", "att.key.weight", "attention.key.weight", "D D"),
    row("time_mix.value.weight", "att.value.weight", "attention.value.weight", "D D"),
    row("time_mix.output.weight", "att.output.weight", "attention.output.weight", "D D"),
)
CHANNEL_MIX = (
    row("channel_mix.mix_key", "ffn.time_mix_k", "feed_forward.time_mix_key", "D", MIX),
    row("channel_mix.mix_receptance", "ffn.time_mix_r", "feed_forward.time_mix_receptance", "D", MIX),
    row("channel_mix.key.weight", "ffn.key.weight", "feed_forward.key.weight", "F D"),
    row("channel_mix.receptance.weight", "ffn.receptance.weight", "feed_forward.receptance.weight", "D D"),
    row("channel_mix.value.weight", "ffn.value.weight", "feed_forward.value.weight", "D F"),
)
AFTER = (
    row("model.ln_out.weight", "ln_out.weight", "rwkv.ln_out.weight", "D"),
    row("model.ln_out.bias", "ln_out.bias", "rwkv.ln_out.bias", "D"),
    row("head.weight", "head.weight", "head.weight", "V D"),
)


def time_decay(shape: str) -> Row:
    """The decay's row."""
    return Row("time_mix.time_decay", shape, ("att.time_decay", "attention.time_decay"), squeezable=True)


def bonus(shape: str, name: str, only: tuple[str, bool] | None = None) -> Row:
    """The row of the bonus that the trainer calls ``name``."""
    return Row("time_mix.bonus", shape, (f"att.{name}", f"attention.{name}"), squeezable=True, only=only)


def log_decay(read: Callable[[str], Tensor]) -> Tensor:
    """log w = -exp(time_decay)."""
    return -read("time_mix.time_decay").float().exp()


def lost(config: "RwkvRevConfig", layout: str) -> str | None:
    """What the rwkv package cannot know of a model with a GroupNorm."""
    if layout != "blinkdl" or math.isclose(eps := config.group_norm_epsilon, GROUP_NORM):
        return None
    return (
        f"this model needs GroupNorm eps {eps:g}, which a .pth cannot say: the rwkv package will use "
        f"{GROUP_NORM:g} and compute something else"
    )


def set_values(parameter: Tensor, values: Tensor) -> None:
    """Values [n] in any shape and dtype."""
    init.copy_(parameter, values.view_as(parameter).to(parameter.dtype))


def depth_of(layer: int, config: "RwkvRevConfig") -> float:
    """0 for the lowest block to 1 for the highest."""
    return layer / max(1, config.num_hidden_layers - 1)


def height_of(layer: int, config: "RwkvRevConfig") -> float:
    """1 for the lowest block to nearly 0."""
    return 1 - layer / config.num_hidden_layers


def ramp(config: "RwkvRevConfig") -> Tensor:
    """0 to nearly 1 over the D channels, float64."""
    return torch.arange(config.hidden_size, dtype=torch.float64) / config.hidden_size


def initialize_mixes(cell: TimeMixRwkv4 | TimeMixRwkv5, config: "RwkvRevConfig") -> None:
    """The mixes that all time mixes have."""
    height, depth = height_of(cell.layer, config), depth_of(cell.layer, config)
    set_values(cell.mix_key, ramp(config) ** height)
    set_values(cell.mix_value, ramp(config) ** height + 0.3 * depth)
    set_values(cell.mix_receptance, ramp(config) ** (0.5 * height))


def initialize_decay_and_bonus(
    decay: Tensor, bonus: Tensor, depth: float, *, exponential: bool = False
) -> None:
    """log(-log w) and u of RWKV-5 and 6, of any shape; ``exponential``: u is the exponential of the bonus."""
    count = decay.numel()
    each = torch.arange(count, dtype=torch.float64)
    set_values(decay, -6 + 5 * (each / max(1, count - 1)) ** (0.7 + 1.3 * depth))
    u = depth * (1 - each / max(1, count - 1)) + 0.1 * ((each + 1) % 3 - 1)
    set_values(bonus, u.clamp(min=1e-3).log() if exponential else u)


def initialize_maps_and_norm(cell: TimeMixRwkv5 | TimeMixRwkv6, config: "RwkvRevConfig") -> None:
    """The maps and the GroupNorm of a time mix of RWKV-5 or 6.

    The key and the gate start small, not at zero: there is no sigmoid on r and no running mean as in RWKV-4, and a zero
    key, gate and output would have no gradient and stay zero for good.
    """
    init.constant_(cell.ln_x.weight, ((1 + cell.layer) / config.num_hidden_layers) ** 0.7)
    init.zeros_(cell.ln_x.bias)
    init.orthogonal_(cell.receptance.weight)
    init.orthogonal_(cell.key.weight, gain=0.1)
    if cell.gate is not None:
        init.orthogonal_(cell.gate.weight, gain=0.1)
    init.orthogonal_(cell.value.weight)
    init.zeros_(cell.output.weight)


def initialize_channel_mix(cell: ChannelMix, config: "RwkvRevConfig") -> None:
    """Mixes and maps of a channel mix, by the depth of its layer."""
    height = height_of(cell.layer, config)
    set_values(cell.mix_key, ramp(config) ** height)
    set_values(cell.mix_receptance, ramp(config) ** height)
    initialize_channel_maps(cell, config)


def initialize_channel_maps(cell: ChannelMix, config: "RwkvRevConfig") -> None:
    """The maps of a channel mix with a receptance."""
    gain = math.sqrt(max(1, config.intermediate_size / config.hidden_size))
    init.orthogonal_(cell.key.weight, gain=gain)
    init.zeros_(cell.receptance.weight)
    init.zeros_(cell.value.weight)
