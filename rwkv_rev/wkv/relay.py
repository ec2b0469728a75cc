"""The ranks between which a kernel hands a state on, as far as kernels know them."""

from typing import Protocol

from torch import Tensor


class Relay(Protocol):
    """Ranks that have a piece of a chunk each, in the order of its tokens: a context group."""

    rank: int
    size: int

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's ``part`` [W, ...]; no gradient."""
        ...

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; no gradient."""
        ...
