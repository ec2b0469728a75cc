"""A generation that nobody published: running sums per channel, which are never forgotten. Its file, and no more.

    S <- S + tanh(k_t) v_t,   y_t = sigmoid(r_t) S_t;   out = Wo y_t

Tests put it into the registry and convert, train and export it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev.architectures import classic, classic_scan
from rwkv_rev.architectures.architecture import NUMBER, Architecture, Cost, Layout, Part, Row, Stored
from rwkv_rev.architectures.scan import of_trainer
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.shifted_cell import ShiftedCell
from rwkv_rev.reversal.additive import Additive, NoRemnant
from rwkv_rev.state import RwkvRevState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig


class Projection(NamedTuple):
    receptance: Tensor  # [B, C, D]
    written: Tensor  # [B, C, D]


class TimeMixToy(ShiftedCell):
    """Memory [B, D]."""

    inverts_memory = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(hidden_size))
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def mixes(self) -> list[Tensor]:
        return [self.mix]

    def project(self, *mixed: Tensor) -> Projection:
        (x,) = mixed
        return Projection(self.receptance(x), torch.tanh(self.key(x)) * self.value(x))

    def compute(
        self, projection: Projection, memory: Tensor | None, mask: ChunkMask | None, plan: Any = None
    ) -> tuple[Tensor, Tensor]:
        assert memory is not None
        sums = self._sums(projection, mask)
        y = torch.sigmoid(projection.receptance) * (memory[:, None] + sums)
        return self.output(y.to(projection.receptance.dtype)), sums[:, -1]

    def update(
        self, memory: Tensor | None, projection: Projection, contribution: Tensor, mask: ChunkMask | None
    ) -> Tensor:
        assert memory is not None
        return memory + contribution

    def exact_memory(self, memory: Tensor) -> Additive:
        return Additive.of(memory)

    def advance_memory(
        self,
        memory: Additive,
        projection: Projection,
        contribution: Tensor,
        mask: ChunkMask | None,
        plan: Any,
    ) -> tuple[Additive, NoRemnant]:
        return memory.advance(contribution)

    def retreat_memory(
        self, memory: Additive, projection: Projection, mask: ChunkMask | None, remnant: Any, plan: Any
    ) -> Additive:
        return memory.retreat(self._sums(projection, mask)[:, -1])

    def _sums(self, projection: Projection, mask: ChunkMask | None) -> Tensor:
        written = projection.written.to(torch.promote_types(projection.written.dtype, torch.float32))
        return (written if mask is None else torch.where(mask.valid[:, :, None], written, 0.0)).cumsum(1)


def _initialize(cell: TimeMixToy, config: "RwkvRevConfig") -> None:
    nn.init.constant_(cell.mix, 0.5 + 0.1 * cell.layer)
    for linear in (cell.receptance, cell.key, cell.value, cell.output):
        nn.init.orthogonal_(linear.weight)


def _told_by(stored: Stored) -> dict[str, Any]:
    return {"num_attention_heads": 1, "head_size": stored.width}


def _scan_time_mix(x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]) -> Tensor:
    """The same once more, a token at a time, over the trainer's names."""

    def stored(name: str) -> Tensor:
        return tensors[name].to(x.dtype)

    mixed = x + (1 - stored("mu")) * (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x)
    r, k, v = (mixed @ stored(letter).T for letter in "rkv")
    sums, y = stored("start") if "start" in tensors else torch.zeros_like(x[0]), torch.empty_like(x)
    for t in range(len(x)):
        sums = sums + torch.tanh(k[t]) * v[t]
        y[t] = torch.sigmoid(r[t]) * sums
    return y @ stored("o").T


SCAN = of_trainer(_scan_time_mix, classic_scan.channel_mix, "toy")


def _rows(*names: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(ours, shape, (f"toy.{name}", f"sums.{name}_proj")) for ours, name, shape in names)


TOY = Architecture(
    version="toy",
    state_kind=RwkvRevState,
    state=classic.SHIFTS | {"wkv": Part("D", wide=True)},
    memory="wkv",
    keys="D",
    lora_targets=("key", "value"),
    sizes=lambda width: {
        "num_attention_heads": 1, "head_size": width, "intermediate_size": 2 * width,
    },
    cells=lambda config, layer: {
        "time_mix": TimeMixToy(config.hidden_size),
        "channel_mix": ChannelMix(config.hidden_size, config.intermediate_size),
    },
    initialization={TimeMixToy: _initialize, ChannelMix: classic.initialize_channel_mix},
    tunes_state=True,
    scan=lambda config: SCAN,
    log_decay=lambda read: torch.zeros(read("time_mix.mix").shape),
    layouts=(Layout("toy-pth", "", "blocks."), Layout("toy-hub", "rwkv.", "rwkv.blocks.")),
    outside=classic.OUTSIDE,
    block=(
        *classic.NORMS,
        Row("time_mix.mix", "D", ("toy.mu", "sums.mu"), "1 D"),
        *_rows(("time_mix.receptance.weight", "r", "D D"), ("time_mix.key.weight", "k", "D D")),
        *_rows(("time_mix.value.weight", "v", "D D"), ("time_mix.output.weight", "o", "D D")),
        *classic.CHANNEL_MIX,
    ),
    after=classic.AFTER,
    initial_state=Row("model.initial_wkv.", "D", ("toy.start", None)),
    sign="time_mix.mix",
    told_by=_told_by,
    hub_config=lambda config, layout: {"model_type": "toy"},
    cost=Cost(
        vectors=12,
        fused_vectors=12,
        mixes=0,
        states=lambda config, batch, length, fused: 0,
        whole=lambda config, batch: [NUMBER * batch * config.hidden_size],
        remnant=lambda config, log_decay, batch, length: [8],
    ),
)  # fmt: skip
