"""Official initialisation of RWKV-4 and RWKV-5, for models trained from scratch and for benchmarks.

RWKV paper, appendix E ("Parameter initializations"), and for RWKV-5 the v5 trainer's ``generate_init_weight``
(BlinkDL/RWKV-LM, RWKV-v5/src/model.py): embeddings near zero, decays spread over the channels by depth, and every
block the identity because its output maps start at zero. RWKV-5's key and gate start small, not at zero: without
RWKV-4's sigmoid and running mean, a zero key, gate and output would have no gradient and stay zero for good.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from rwkv_rev.cells import ChannelMix, TimeMixRwkv4, TimeMixRwkv5
from rwkv_rev.configuration import RwkvRevConfig


def initialize_time_mix(cell: TimeMixRwkv4 | TimeMixRwkv5, config: RwkvRevConfig) -> None:
    """Mixes, decays, bonus and maps of a time mix, by the depth of its layer."""
    layer = cell.layer
    depth = layer / max(1, config.num_hidden_layers - 1)  # 0 to 1
    height = 1 - layer / config.num_hidden_layers  # 1 to nearly 0
    size = config.hidden_size
    ramp = torch.arange(size, dtype=torch.float64) / size
    _set(cell.mix_key, ramp**height)
    _set(cell.mix_value, ramp**height + 0.3 * depth)
    _set(cell.mix_receptance, ramp ** (0.5 * height))
    steps = torch.arange(size, dtype=torch.float64)
    zigzag = (steps + 1) % 3 - 1
    if isinstance(cell, TimeMixRwkv4):
        _set(cell.time_decay, -5 + 8 * (steps / max(1, size - 1)) ** (0.7 + 1.3 * depth))
        _set(cell.bonus, zigzag * 0.5 + math.log(0.3))
    else:
        if cell.mix_gate is not None:
            _set(cell.mix_gate, ramp ** (0.5 * height))
        count = cell.time_decay.numel()
        each = torch.arange(count, dtype=torch.float64)
        _set(cell.time_decay, -6 + 5 * (each / max(1, count - 1)) ** (0.7 + 1.3 * depth))
        u = depth * (1 - each / max(1, count - 1)) + 0.1 * ((each + 1) % 3 - 1)
        _set(cell.bonus, u.clamp(min=1e-3).log() if cell.bonus_is_exponential else u)
        init.constant_(cell.ln_x.weight, ((1 + layer) / config.num_hidden_layers) ** 0.7)
        init.zeros_(cell.ln_x.bias)
        init.orthogonal_(cell.receptance.weight)
        init.orthogonal_(cell.key.weight, gain=0.1)
        if cell.gate is not None:
            init.orthogonal_(cell.gate.weight, gain=0.1)
    if isinstance(cell, TimeMixRwkv4):
        init.zeros_(cell.receptance.weight)
        init.zeros_(cell.key.weight)
    init.orthogonal_(cell.value.weight)
    init.zeros_(cell.output.weight)


def initialize_channel_mix(cell: ChannelMix, config: RwkvRevConfig) -> None:
    """Mixes and maps of a channel mix, by the depth of its layer."""
    height = 1 - cell.layer / config.num_hidden_layers
    ramp = torch.arange(config.hidden_size, dtype=torch.float64) / config.hidden_size
    _set(cell.mix_key, ramp**height)
    _set(cell.mix_receptance, ramp**height)
    gain = math.sqrt(max(1, config.intermediate_size / config.hidden_size))
    init.orthogonal_(cell.key.weight, gain=gain)
    init.zeros_(cell.receptance.weight)
    init.zeros_(cell.value.weight)


def initialize_head(head: nn.Linear) -> None:
    """The output head: orthogonal, half its natural size."""
    init.orthogonal_(head.weight, gain=0.5 * math.sqrt(max(1, head.out_features / head.in_features)))


def _set(parameter: Tensor, values: Tensor) -> None:
    init.copy_(parameter, values.view_as(parameter).to(parameter.dtype))
