"""A chunk of a :class:`~rwkv_rev.cells.token_cell.TokenCell`, one token after another: plainly, exactly, and back."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.token_checks import Token, Update, updated
from rwkv_rev.reversal.bit_stack import BitStack
from rwkv_rev.reversal.stepped import Stepped


class Steps(Protocol):
    """What a walk asks of a cell; see :class:`.token_cell.TokenCell`."""

    halves: ClassVar[tuple[tuple[int, ...], ...]]
    layer: int

    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> Any: ...

    def update(self, part: int, gates: Any, parts: Sequence[Tensor]) -> Update: ...


class Walk:
    """The tokens of a chunk, from the state before it or, for :meth:`backwards`, after it.

    Args:
        inputs: what the cell has projected, [B, C, ...] each.
        values: the parts [B, M], in the state's dtype.
        dtype: of the activations, in which gates read the parts.
        grid: the exact memory of the same ``values``; None for plain arithmetic.

    Gates are handed parts that are contiguous and begin at a new tensor's memory, in either direction.

    Attributes:
        values: the parts where the walk is now.
        after: the parts after each token, P for each.
        states, decays: of every step that multiplies, in order: s before it as integers, and z.
    """

    def __init__(
        self,
        cell: Steps,
        inputs: Token,
        values: list[Tensor],
        dtype: torch.dtype,
        mask: ChunkMask | None,
        grid: Stepped | None = None,
    ) -> None:
        self._cell, self._grid, self._dtype = cell, grid, dtype
        self._tokens = list(zip(*(part.unbind(1) for part in inputs), strict=True))
        self._valid = None if mask is None else mask.valid[:, :, None].unbind(1)
        self.values = values
        # a copy: on the way back a part is a tensor of its own, and products of a part that begins elsewhere in
        # memory, within a row of the state, have other bits on some CPUs
        self._read = [value.to(dtype, copy=True, memory_format=torch.contiguous_format) for value in values]
        self._units = [] if grid is None else grid.parts()
        self.after: list[Tensor] = []
        self._seen = list(self._units)
        self.states: list[Tensor] = []
        self.decays: list[Tensor] = []

    def forwards(self) -> None:
        """Walk to the end of the chunk; with a grid the same bits with and without graph."""
        cell, graph = self._cell, torch.is_grad_enabled()
        for place, token in enumerate(self._tokens):
            for half, parts in enumerate(cell.halves):
                gates = cell.gates(half, token, self._read)
                for part in parts:
                    decay, change = self._update(place, part, gates)
                    value = self.values[part]
                    if self._grid is None:
                        value = change + (value if decay is None else decay * value)
                    else:
                        exactly = self._step(part, decay, change)
                        value = OnGrid.apply(exactly, value, decay, change) if graph else exactly
                    self._move(part, value)
            self.after += self.values

    def end(self) -> Stepped:
        """The memory where the walk is now.

        Raises:
            GridOverflowError: if a number on the way did not fit the grid.
        """
        assert self._grid is not None
        return self._grid.after(self._units, torch.stack(self._seen))

    def backwards(self, bits: BitStack | None) -> Stepped:
        """Walk to the beginning of the chunk, from what its steps forgot; the memory there."""
        cell, grid = self._cell, self._grid
        assert grid is not None
        for place in reversed(range(len(self._tokens))):
            for half in reversed(range(len(cell.halves))):
                gates = cell.gates(half, self._tokens[place], self._read)
                for part in reversed(cell.halves[half]):
                    decay, change = self._update(place, part, gates)
                    self._units[part] = grid.undo(self._units[part], decay, change, bits)
                    self._move(part, grid.floats(self._units[part]))
        return grid.held(self._units)

    def parts(self) -> Tensor:
        """The parts [B, C, P, M] after each token, as outputs read them."""
        after = torch.stack(self.after, dim=1).to(self._dtype)
        return after.view(len(after), len(self._tokens), len(self.values), -1)

    def _update(self, place: int, part: int, gates: Any) -> Update:
        """z and c of a part, in the state's dtype; 1 and 0 where the token does not count."""
        dtype = self.values[part].dtype
        given = self._cell.update(part, gates, self._read)
        decay, change = updated(self._cell, given, self.values[part])
        decay, change = None if decay is None else decay.to(dtype), change.to(dtype)
        if self._valid is None:
            return decay, change
        valid = self._valid[place]
        return None if decay is None else torch.where(valid, decay, 1.0), torch.where(valid, change, 0.0)

    def _step(self, part: int, decay: Tensor | None, change: Tensor) -> Tensor:
        """Step a part's integers; its value."""
        assert self._grid is not None
        units, decay = self._units[part], None if decay is None else decay.detach()
        if decay is not None:
            self.states.append(units)
            self.decays.append(decay)
        self._units[part] = units = self._grid.step(units, decay, change.detach())
        self._seen.append(units)
        return self._grid.floats(units)

    def _move(self, part: int, value: Tensor) -> None:
        self.values[part] = value
        self._read[part] = value.to(self._dtype).contiguous()


class OnGrid(torch.autograd.Function):
    """``z s + c`` whose value is ``exactly``, its rounding; the gradient goes straight through that."""

    @staticmethod
    def forward(ctx: Any, exactly: Tensor, value: Tensor, decay: Tensor | None, change: Tensor) -> Tensor:
        if decay is not None:
            ctx.save_for_backward(value, decay)
        return exactly.view_as(exactly)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None, Tensor]:
        saved = ctx.saved_tensors  # one look: activation checkpointing gives them once
        if not saved:
            return None, gradient, None, gradient
        value, decay = saved
        return None, gradient * decay, gradient * value, gradient
