"""The tape of a context group: each rank keeps its share of every record, and gets the whole one when it is popped.

All ranks hold the same states, so what a chunk forgot is the same bytes on all of them: a rank keeps every W-th part of
these. What is compared of a layer (checksums of a rank's own tokens among them) each rank keeps for itself.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_rev.distributed.context_group import ContextGroup
from rwkv_rev.reversal.tape import ALIGNMENT, FlatRecord, Tape, _Shapes


class SharedTape(Tape):
    """A :class:`Tape` whose records are held once per group; every rank pushes and pops the same.

    Args:
        groups: tensor lists of a layer in a record, of which the first is of this rank alone.
    """

    def __init__(
        self, place: str, device: torch.device, directory: str | Path | None, group: ContextGroup, groups: int
    ) -> None:
        super().__init__(place, device, directory)
        self._group, self._groups = group, groups
        self._of_all = _Shapes()
        self._whole: list[tuple[bytes, int]] = []

    def push(self, record: list[list[Tensor]]) -> None:
        self.push_flat(FlatRecord.of(record, self.device))

    def push_flat(self, record: FlatRecord) -> None:
        size = record.data.numel()
        share = -(-size // (self._group.size * ALIGNMENT)) * ALIGNMENT
        part = record.data[self._group.rank * share :][:share]
        self._whole.append((self._of_all.packed(record.layouts), size))
        own = record.tensors()[:: self._groups]
        super().push([*own, [F.pad(part, (0, share - part.numel()))]])

    def pop_flat(self) -> FlatRecord:
        *own, (part,) = super().pop_flat().tensors()
        packed, size = self._whole.pop()
        found = FlatRecord(self._group.gather(part).view(-1)[:size], self._of_all.unpacked(packed))
        for mine, any_rank in zip(own, found.tensors()[:: self._groups], strict=True):
            torch._foreach_copy_(any_rank, mine)
        return found
