"""What adapters make of the weight W [out, in] of a linear map, in float64.

    LoRA      W' = W + s B A                     A [r, in], B [out, r]; s = alpha / r, peft's rslora alpha / sqrt(r)
    PiSSA     W' = W - B_0 A_0 + B A             A_0, B_0: what training began with, in a file of its own
    DiSHA     W'[o, i] = W[o, i] + D[i mod r, o]                                              D [r, out] ("bone")
    DiSHA     W'_ab = W_ab + W_ab D_b + D_b      r x r pieces of W, D [in / r, r, r]           ("bat")

Sources: Hu et al. 2021 (LoRA); Meng et al. 2024 (PiSSA); Kang 2024, arXiv 2409.15371 (DiSHA).

Limits: RWKV-PEFT rounds W - B_0 A_0 to bfloat16 before it adds B A, and may quantise W; here neither is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """B A of one map, and how much of it.

    Attributes:
        down, up: A [r, in] and B [out, r], of the file's dtype.
        alpha, scale: s is ``scale``; both 1 for PiSSA.
        began: A_0 and B_0 of PiSSA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    scale: float
    began: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is one of a map [out, in]."""
        return (self.up.shape[0], self.down.shape[1]) == shape

    def merged(self, weight: Tensor) -> Tensor:
        """W' from W [out, in], both float64."""
        found = weight + self.scale * (self.up.double() @ self.down.double())
        if self.began is not None:
            down, up = self.began
            found -= up.double() @ down.double()
        return found


@dataclass(frozen=True)
class Disha:
    """What DiSHA adds to one map: D [r, out], or [in / r, r, r] where it multiplies W too."""

    values: Tensor

    @property
    def rank(self) -> int:
        return self.values.shape[-1] if self.values.dim() == 3 else self.values.shape[0]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is one of a map [out, in]."""
        out, inner = shape
        if self.values.dim() == 2:
            return self.values.shape[1] == out and self.rank <= inner
        blocks, rank, columns = self.values.shape
        return rank == columns and blocks * rank == inner and out % rank == 0

    def merged(self, weight: Tensor) -> Tensor:
        """W' from W [out, in], both float64."""
        out, inner = weight.shape
        values, rank = self.values.double(), self.rank
        if values.dim() == 2:
            times = -(-inner // rank)
            return weight + values.repeat(times, 1)[:inner].T
        pieces = weight.reshape(out // rank, rank, inner // rank, rank).transpose(1, 2)  # [a, b, r, r]
        return (pieces + pieces @ values + values).transpose(1, 2).reshape(out, inner)


@dataclass(frozen=True)
class Adapter:
    """What a file changes in a model.

    Attributes:
        kind: ``LoRA``, ``PiSSA`` or ``DiSHA``.
        layout: ``rwkv-peft`` or ``peft``.
        additions: by our name of the weight [out, in].
        replaced: tensors that were trained whole, by our names, as a converted model has them.
    """

    kind: str
    layout: str
    additions: Mapping[str, LowRank | Disha]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({addition.rank for addition in self.additions.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({each.alpha for each in self.additions.values() if isinstance(each, LowRank)}))

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the maps."""
        return tuple(sorted({name.split(".")[-2] for name in self.additions}))
