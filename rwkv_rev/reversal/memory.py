"""What every exact memory can do, whatever its arithmetic: the one protocol that strategies, tape and CUDA graphs see.

An exact memory is a cell's recurrent state as bits that come back. Its kinds, a file each:

* :class:`~rwkv_rev.reversal.whole.Whole`: a tensor that is kept whole; the remnant of a chunk is the state before it;
* :class:`~rwkv_rev.reversal.fixed_point.FixedPoint`: decays elementwise on a grid; the remnant is what decay forgets;
* :class:`~rwkv_rev.reversal.lifting.Lifted`: multiplied by any matrix, on the same grid; the remnant is what that
  destroys;
* :class:`~rwkv_rev.reversal.additive.Additive`: sums in a format of one's choice, which say when they are full; nothing
  is forgotten, no remnant;
* :class:`~rwkv_rev.reversal.stepped.Stepped`: stepped token by token; the remnant is the bits that each step forgets;
* :class:`~rwkv_rev.reversal.division.LossyState`: divided back in float64; approximate.

A kind is known by name only where its cell makes it. What a remnant takes on the tape may depend on the data: then
``size`` is the small tensor that decides it, copied to the host while the device works on, and looked at a chunk later.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Remnant(Protocol):
    """What one chunk forgot of a memory.

    Attributes:
        size: on the device, what the record's size depends on; None where it depends on no data.
        excess: on the device, not zero where ``tensors(None)`` is not enough; None where it is for all data.
    """

    @property
    def size(self) -> Tensor | None: ...

    @property
    def excess(self) -> Tensor | None: ...

    def tensors(self, size: Tensor | None) -> list[Tensor]:
        """What must be kept; ``size`` is :attr:`size` on the host, or None for what depends on no data."""
        ...


class Memory(Protocol):
    """A memory that is exact to the bit; see the module's docstring."""

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The memory as the floats that outputs read."""
        ...

    def tensors(self) -> list[Tensor]:
        """All that it is made of: what a tape keeps of a whole memory."""
        ...

    def computed(self) -> list[Tensor]:
        """:meth:`tensors`, and what was computed of them and will be asked for again."""
        ...

    def like(self, tensors: list[Tensor]) -> Any:
        """A memory of this kind from :meth:`tensors` of one of the same shape."""
        ...

    def of_computed(self, tensors: list[Tensor]) -> Any:
        """The same from :meth:`computed`: a cell whose exact state it is, or a part of it, asks for both."""
        ...

    def fingerprint(self) -> Tensor:
        """Checksum of the bits, int64, of any shape."""
        ...

    def coarse(self) -> Tensor | None:
        """[B, H] bool, parts that have become less precise than they should be; None where that cannot happen."""
        ...

    @property
    def when_coarse(self) -> str:
        """What it means that a part is coarse, as the end of a sentence that begins with the part."""
        ...

    def remnant(self, tensors: list[Tensor]) -> Any:
        """The remnant of the chunk before this memory, from what :meth:`Remnant.tensors` kept."""
        ...
