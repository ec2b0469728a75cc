"""An architecture that is no RWKV, as somebody outside of the package would write it: one file, and ``register``.

Two memories of different sizes in one cell, sums of D and of F numbers that are never forgotten:

    a <- a + m tanh(Wa x_t),   b <- b + m Wb x_t,   y_t = Wo (a_t * gather(b_t))
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev.architectures.architecture import Architecture, Cost, Part
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.scan import Scan, SubLayer
from rwkv_rev.cells.contract import Advanced, Replay, ReversibleCell, leaves
from rwkv_rev.cells.exact_sums import ExactSums
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.reversal.additive import Additive, NoRemnant
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.state import ModelState


class Two(NamedTuple):
    narrow: Tensor  # [B, D]
    broad: Tensor  # [B, R D]


@dataclass(frozen=True)
class TwoState(ModelState):
    narrow: Tensor  # [L, B, D]
    broad: Tensor  # [L, B, R D]

    cells = ((Two, ("narrow", "broad")),)


class TwoSums(ReversibleCell):
    inverts_memory = True

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, width, bias=False)
        self.broad = nn.Linear(width, times * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def plan(self, length: int) -> None:
        return None

    def exact(self, state: Two) -> ExactSums:
        return ExactSums(tuple(Additive.of(part.detach(), format="int64", exponent=-40) for part in state))

    def values(self, state: ExactSums) -> Two:
        dtype = torch.promote_types(self.output.weight.dtype, torch.float32)
        return Two(*(memory.value(dtype) for memory in state.memories))

    def sums(self, x: Tensor, mask: ChunkMask | None) -> tuple[Tensor, Tensor]:
        parts = torch.tanh(self.narrow(x)), self.broad(x)
        if mask is not None:
            parts = tuple(torch.where(mask.valid[:, :, None], part, 0.0) for part in parts)
        return tuple(part.to(torch.promote_types(part.dtype, torch.float32)).cumsum(1) for part in parts)

    def step(self, state: Two, x: Tensor, mask: ChunkMask | None = None) -> tuple[Tensor, Two]:
        narrow, broad = (part[:, None] + sums for part, sums in zip(state, self.sums(x, mask), strict=True))
        read = narrow * broad.unflatten(-1, (-1, narrow.shape[-1])).mean(-2) / (1 + narrow.square())
        return self.output(read.to(x.dtype)), Two(narrow[:, -1], broad[:, -1])

    @torch.no_grad()
    def advance(
        self, state: ExactSums, x: Tensor, mask: Any = None, plan: Any = None, *, output: bool = True
    ) -> Advanced:
        out, _ = self.step(self.values(state), x, mask)
        added = [sums[:, -1] for sums in self.sums(x, mask)]
        return Advanced(self._moved(state, added, Additive.advance), out, NoRemnant(), _print(added))

    def replay(
        self, state: ExactSums, x: Tensor, mask: Any = None, plan: Any = None, after: Any = None
    ) -> Replay:
        start = leaves(self.values(state))
        out, end = self.step(start, x, mask)
        with torch.no_grad():
            added = [sums[:, -1] for sums in self.sums(x, mask)]
            same = None
            if after is not None:
                left = self._moved(state, added, Additive.advance)
                same = (left.fingerprint() == after.fingerprint()).all()
        return Replay(state, out, start, end, _print(added), same)

    def retreat(
        self, state: ExactSums, x: Tensor, mask: Any, remnant: NoRemnant, plan: Any = None, after: Any = None
    ) -> Replay:
        with torch.no_grad():
            added = [sums[:, -1] for sums in self.sums(x, mask)]
            before = self._moved(state, added, Additive.retreat)
        return self.replay(before, x, mask, plan, after)

    def _moved(self, state: ExactSums, added: list[Tensor], way: Any) -> ExactSums:
        moved = [way(memory, part) for memory, part in zip(state.memories, added, strict=True)]
        return ExactSums(tuple(found[0] if isinstance(found, tuple) else found for found in moved))


def _print(added: list[Tensor]) -> Tensor:
    return torch.stack([checksum(part) for part in added])


def _initialize(cell: TwoSums, config: RwkvRevConfig) -> None:
    for linear in (cell.narrow, cell.broad, cell.output):
        nn.init.orthogonal_(linear.weight)


def loop(x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]) -> Tensor:
    """The cell as a plain loop, which ``verify`` compares with."""
    narrow, broad, output = (tensors[f"{name}.weight"].to(x.dtype) for name in ("narrow", "broad", "output"))
    a, b = torch.zeros(len(narrow), dtype=x.dtype), torch.zeros(len(broad), dtype=x.dtype)
    if "initial" in tensors:
        a = tensors["initial"].to(x.dtype)
    out = []
    for token in x:
        a, b = a + torch.tanh(narrow @ token), b + broad @ token
        out.append(output @ (a * b.view(-1, len(a)).mean(0) / (1 + a * a)))
    return torch.stack(out)


TWO_SUMS = Architecture(
    version="two-sums",
    title="two sums",
    state_kind=TwoState,
    state={"narrow": Part("D", wide=True), "broad": Part("R*D", wide=True)},
    memory="narrow",
    keys="D",
    lora_targets=("narrow", "broad"),
    sizes=lambda width: {"num_attention_heads": 1, "head_size": width, "intermediate_size": width},
    fields={"times": Field(int, 2, "R, how many times D the broad sums are", least=1, most=8)},
    letters={"R": "times"},
    cells=lambda config, layer: {"sums": TwoSums(config.hidden_size, config.times)},
    initialization={TwoSums: _initialize},
    tunes_state=True,
    scan=lambda config: Scan((SubLayer("sums", "ln1", "sums", loop),)),
    cost=Cost(
        vectors=10,
        fused_vectors=10,
        mixes=0,
        shifts=0,
        states=lambda config, batch, length, fused: 0,
        whole=lambda config, batch: [8 * batch * math.prod((1 + config.times, config.hidden_size))],
        remnant=lambda config, log_decay, batch, length: [16],
    ),
)
