"""Packing rows of small non-negative integers at a fixed number of bits per row.

The rows' widths are known beforehand (0 to 32 bits of int32, 0 to 63 of int64). A row of width 13 = 8 + 4 + 1 puts its
low 8 bits with the 8-bit fields, the next 4 with the 4-bit fields and the last with the 1-bit fields: few field sizes,
each packed and unpacked with one shift and one sum, give every width exactly. Rows of int32 with 32 bits hold another
tensor's values ("whole").
"""

import math

import torch
from torch import Tensor

FIELDS = (32, 16, 8, 4, 2, 1)


class BitPacking:
    """A layout for tensors [B, R, M] of R rows whose widths in bits are ``bits``.

    Attributes:
        bits: width of each of the R rows, 0..32, or 0..63.
        dtype: of the values, int32 or int64.
        whole: [R] bool tensor, the rows of 32 bits of int32.
    """

    def __init__(
        self, bits: list[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.int32
    ) -> None:
        most = 63 if dtype == torch.int64 else 32
        if any(not 0 <= width <= most for width in bits):
            raise ValueError(f"row widths must lie between 0 and {most} bits")
        self.bits, self.dtype = bits, dtype
        self.whole = torch.tensor([width == 32 and most == 32 for width in bits], device=device)
        self._fields: list[tuple[int, Tensor, Tensor]] = []
        for size in FIELDS:
            rows = [row for row, width in enumerate(bits) if width & size]
            offsets = [_offset(bits[row], size) for row in rows]
            if rows:
                self._fields.append(
                    (
                        size,
                        torch.tensor(rows, device=device),
                        torch.tensor(offsets, device=device, dtype=dtype)[None, :, None],
                    )
                )

    def nbytes(self, batch: int, columns: int) -> int:
        """Bytes of a packed [batch, R, columns] tensor."""
        return sum(math.ceil(batch * len(rows) * columns * size / 8) for size, rows, _ in self._fields)

    def pack(self, values: Tensor, whole: Tensor) -> Tensor:
        """Bytes (uint8, flat) of ``values`` [B, R, M], with ``whole`` [B, R, M] in rows of :attr:`whole`."""
        parts = []
        for size, rows, offsets in self._fields:
            if size == 32 and self.dtype == torch.int32:
                parts.append(whole.index_select(1, rows).contiguous().view(torch.uint8).flatten())
                continue
            field = (values.index_select(1, rows) >> offsets) & ((1 << size) - 1)
            parts.append(_join(field.flatten(), size))
        return torch.cat(parts) if parts else values.new_empty(0, dtype=torch.uint8)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """The values [B, R, M] (shape ``shape``) that :meth:`pack` was given; whole rows included."""
        values = torch.zeros(shape, dtype=self.dtype, device=packed.device)
        start = 0
        for size, rows, offsets in self._fields:
            count = shape[0] * len(rows) * shape[2]
            stop = start + math.ceil(count * size / 8)
            field = _split(packed[start:stop], size, count, self.dtype).view(shape[0], len(rows), shape[2])
            values.index_add_(1, rows, field << offsets)
            start = stop
        return values


def _offset(width: int, size: int) -> int:
    """Bit position of the field of ``size`` within a value of ``width``: larger fields hold lower bits."""
    return sum(field for field in FIELDS if field > size and width & field)


def _join(field: Tensor, size: int) -> Tensor:
    """Flat values below 2**size as bytes."""
    if size == 32:
        return field.to(torch.int32).view(torch.uint8)
    if size == 16:
        return field.to(torch.int16).view(torch.uint8)
    per_byte = 8 // size
    padding = -field.numel() % per_byte
    if padding:
        field = torch.nn.functional.pad(field, (0, padding))
    shifts = torch.arange(per_byte, device=field.device, dtype=field.dtype) * size
    return (field.view(-1, per_byte) << shifts).sum(dim=1).to(torch.uint8)


def _split(packed: Tensor, size: int, count: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_join` (and of the whole rows' bytes): ``count`` values."""
    if size == 32:
        values = packed.clone().view(torch.int32)
        return values if dtype == torch.int32 else values.to(dtype) & 0xFFFFFFFF
    if size == 16:
        return packed.clone().view(torch.int16).to(dtype) & 0xFFFF
    shifts = torch.arange(8 // size, device=packed.device, dtype=dtype) * size
    return ((packed.to(dtype)[:, None] >> shifts) & ((1 << size) - 1)).flatten()[:count]
