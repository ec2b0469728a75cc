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
_WORDS = {32: torch.int32, 16: torch.int16, 8: torch.uint8}


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
        widths = torch.tensor(bits, dtype=torch.int64, device="cpu")
        self.whole = ((widths == 32) & (most == 32)).to(device)
        sizes = torch.tensor(FIELDS, device="cpu")[:, None]
        has = (widths & sizes) != 0
        self._fields = [(size, rows) for size, rows in zip(FIELDS, has.sum(1).tolist(), strict=True) if rows]
        # of the fields of every size, one behind the other
        field, rows = has.nonzero(as_tuple=True)
        size = sizes[field, 0]
        self._rows = rows.to(device)
        self._offsets = (widths[rows] & -2 * size)[:, None].to(device, dtype)  # larger fields hold lower bits
        self._masks = ((1 << size) - 1)[:, None].to(device, dtype)
        self._shifts = {
            size: (torch.arange(8 // size, device="cpu") * size).to(device, dtype)
            for size, _ in self._fields
            if size < 8
        }

    def nbytes(self, batch: int, columns: int) -> int:
        """Bytes of a packed [batch, R, columns] tensor."""
        return sum(math.ceil(batch * rows * columns * size / 8) for size, rows in self._fields)

    def pack(self, values: Tensor, whole: Tensor) -> Tensor:
        """Bytes (uint8, flat) of ``values`` [B, R, M], with ``whole`` [B, R, M] in rows of :attr:`whole`."""
        values = torch.where(self.whole[:, None], whole, values)
        fields = (values.index_select(1, self._rows) >> self._offsets) & self._masks
        parts = fields.split([rows for _, rows in self._fields], dim=1)
        joined = [
            self._join(part.contiguous().view(-1), size)
            for (size, _), part in zip(self._fields, parts, strict=True)
        ]
        return torch.cat(joined) if joined else values.new_empty(0, dtype=torch.uint8)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """The values [B, R, M] (shape ``shape``) that :meth:`pack` was given; whole rows included."""
        values = torch.zeros(shape, dtype=self.dtype, device=packed.device)
        fields, start = [], 0
        for size, rows in self._fields:
            count = shape[0] * rows * shape[2]
            stop = start + math.ceil(count * size / 8)
            fields.append(self._split(packed[start:stop], size)[:count].view(shape[0], rows, shape[2]))
            start = stop
        return values.index_add_(1, self._rows, torch.cat(fields, 1) << self._offsets) if fields else values

    def _join(self, field: Tensor, size: int) -> Tensor:
        """Flat values below 2**size as bytes."""
        if size >= 8:
            return field.to(_WORDS[size]).view(torch.uint8)
        padding = -field.numel() % (8 // size)
        if padding:
            field = torch.nn.functional.pad(field, (0, padding))
        return (field.view(-1, 8 // size) << self._shifts[size]).sum(dim=1).to(torch.uint8)

    def _split(self, packed: Tensor, size: int) -> Tensor:
        """The inverse of :meth:`_join`, with what it has padded."""
        mask = (1 << size) - 1
        if size >= 8:
            values = packed.clone().view(_WORDS[size]).to(self.dtype)
            return values if size == 32 and self.dtype == torch.int32 else values & mask
        return ((packed.to(self.dtype)[:, None] >> self._shifts[size]) & mask).flatten()
