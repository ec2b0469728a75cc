"""A model as a plain loop over its tensors: what its checks are held against, and shares no code with its cells.

A generation of RWKV goes through the names of its original trainer, so that a mistake in our renaming shows; what has
no other layout goes through our own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Compute = Callable[[Tensor, Mapping[str, Tensor], float, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class SubLayer:
    """One cell of every block.

    Attributes:
        name: of the block's attribute.
        norm, prefix: what the names of its norm's and of its own tensors begin with, behind the block's.
        compute: from x [T, D] behind the norm, the tensors by their names behind the prefix (``initial`` is the layer's
            tuned initial memory, if there is one), the GroupNorm's eps, and a dictionary in which a layer may leave
            something for those above it, to what is added to the residual [T, D]. In the dtype of x; a recurrence goes
            token by token.
    """

    name: str
    norm: str
    prefix: str
    compute: Compute


@dataclass(frozen=True)
class Scan:
    """All of a model: its sub-layers, and what the other tensors are called.

    ``initial`` and a layer's number is the name of a tuned initial memory.
    """

    cells: tuple[SubLayer, ...]
    embeddings: str = "model.embeddings.weight"
    first_norm: str = "model.ln0"
    block: str = "model.blocks."
    last_norm: str = "model.ln_out"
    head: str = "head.weight"
    initial: str | None = "model.initial_wkv."

    def layers(self, tensors: Mapping[str, Tensor]) -> int:
        """L, counted in the tensors."""
        found = 0
        while f"{self.block}{found}.{self.cells[0].norm}.weight" in tensors:
            found += 1
        return found


def of_trainer(time_mix: Compute, channel_mix: Compute, prefix: str = "att") -> Scan:
    """A generation of RWKV by the names of its original trainer, who calls the time mix ``prefix``.

    A tuned initial memory is among the tensors of the time mix.
    """
    return Scan(
        (SubLayer("time_mix", "ln1", prefix, time_mix), SubLayer("channel_mix", "ln2", "ffn", channel_mix)),
        embeddings="emb.weight",
        first_norm="blocks.0.ln0",
        block="blocks.",
        last_norm="ln_out",
        initial=None,
    )


def standardised(x: Tensor, epsilon: float) -> Tensor:
    """Mean 0 and variance 1 over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
