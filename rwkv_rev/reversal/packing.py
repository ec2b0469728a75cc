"""Packing rows of small non-negative integers at a fixed number of bits per row.

The rows' widths are known beforehand (0 to 32 bits). A row of width 13 = 8 + 4 + 1 puts its low 8 bits with the
8-bit fields, the next 4 with the 4-bit fields and the last with the 1-bit fields: five field sizes, each packed and
unpacked with one shift and one sum, give every width exactly. Rows of 32 bits hold another tensor's values ("whole").
"""

import math

import torch
from torch import Tensor

FIELDS = (32, 16, 8, 4, 2, 1)


class BitPacking:
    """A layout for tensors [B, R, M] of R rows whose widths in bits are ``bits``.

    Attributes:
        bits: width of each of the R rows, 0..32.
        whole: [R] bool tensor, the rows of 32 bits.
    """

    def __init__(self, bits: list[int], device: torch.device | str = "cpu") -> None:
        if any(not 0 <= width <= 32 for width in bits):
            raise ValueError("row widths must lie between 0 and 32 bits")
        self.bits = bits
        self.whole = torch.tensor([width == 32 for width in bits], device=device)
        self._fields: list[tuple[int, Tensor, Tensor]] = []
        for size in FIELDS:
            rows = [row for row, width in enumerate(bits) if width & size]
            offsets = [_offset(bits[row], size) for row in rows]
            if rows:
                self._fields.append(
                    (
                        size,
                        torch.tensor(rows, device=device),
                        torch.tensor(offsets, device=device, dtype=torch.int32)[None, :, None],
                    )
                )

    def nbytes(self, batch: int, columns: int) -> int:
        """Bytes of a packed [batch, R, columns] tensor."""
        return sum(math.ceil(batch * len(rows) * columns * size / 8) for size, rows, _ in self._fields)

    def pack(self, values: Tensor, whole: Tensor) -> Tensor:
        """Bytes (uint8, flat) of ``values`` [B, R, M] int32, with ``whole`` [B, R, M] int32 in rows of 32 bits."""
        parts = []
        for size, rows, offsets in self._fields:
            if size == 32:
                parts.append(whole.index_select(1, rows).contiguous().view(torch.uint8).flatten())
                continue
            field = (values.index_select(1, rows) >> offsets) & ((1 << size) - 1)
            parts.append(_join(field.flatten(), size))
        return torch.cat(parts) if parts else values.new_empty(0, dtype=torch.uint8)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """The values [B, R, M] int32 (shape ``shape``) that :meth:`pack` was given; whole rows included."""
        values = torch.zeros(shape, dtype=torch.int32, device=packed.device)
        start = 0
        for size, rows, offsets in self._fields:
            count = shape[0] * len(rows) * shape[2]
            stop = start + math.ceil(count * size / 8)
            field = _split(packed[start:stop], size, count).view(shape[0], len(rows), shape[2])
            values.index_add_(1, rows, field << offsets)
            start = stop
        return values


def _offset(width: int, size: int) -> int:
    """Bit position of the field of ``size`` within a value of ``width``: larger fields hold lower bits."""
    return sum(field for field in FIELDS if field > size and width & field)


def _join(field: Tensor, size: int) -> Tensor:
    """Flat int32 values below 2**size as bytes."""
    if size == 16:
        return field.to(torch.int16).view(torch.uint8)
    per_byte = 8 // size
    padding = -field.numel() % per_byte
    if padding:
        field = torch.nn.functional.pad(field, (0, padding))
    shifts = torch.arange(per_byte, device=field.device, dtype=torch.int32) * size
    return (field.view(-1, per_byte) << shifts).sum(dim=1).to(torch.uint8)


def _split(packed: Tensor, size: int, count: int) -> Tensor:
    """The inverse of :func:`_join` (and of the whole rows' bytes): ``count`` int32 values."""
    if size == 32:
        return packed.clone().view(torch.int32)
    if size == 16:
        return packed.clone().view(torch.int16).to(torch.int32) & 0xFFFF
    shifts = torch.arange(8 // size, device=packed.device, dtype=torch.int32) * size
    return ((packed.to(torch.int32)[:, None] >> shifts) & ((1 << size) - 1)).flatten()[:count]
