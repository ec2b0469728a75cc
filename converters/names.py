"""The tensors of a model: our names and shapes beside those of a foreign layout.

Layouts:
    ``blinkdl``       the trainer's own ``.pth`` (https://github.com/BlinkDL/RWKV-LM), all versions;
    ``transformers``  ``RwkvForCausalLM`` of transformers, RWKV-4 only;
    ``v5-hub``        the published RWKV-5 repositories with remote code (``RWKV/v5-Eagle-7B-HF``), which
                      extend the names of ``transformers``;
    ``v6-hub``        the published RWKV-6 repositories with remote code (``RWKV/v6-Finch-1B6-HF``), likewise;
    ``fla``           flash-linear-attention's classes and the repositories that need them, RWKV-6 and RWKV-7;
    ``fla-x_x``       its first version of RWKV-7, in which a layer's six mixes are one tensor, ``attn.x_x``.

Which names there are each generation says itself (:mod:`rwkv_rev.architectures`). A tuned initial state exists in
``blinkdl`` alone. Shapes are written in the letters B, T, D, H, N, F, V of the README.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.architectures.architecture import Piece, Row
from rwkv_rev.architectures.registry import generations
from rwkv_rev.cells.block import Block
from rwkv_rev.configuration import RwkvRevConfig


def layouts() -> tuple[str, ...]:
    """The names of all foreign layouts."""
    return tuple(dict.fromkeys(layout.name for known in generations() for layout in known.layouts))


HEAD, EMBEDDINGS = "head.weight", "model.embeddings.weight"
"""Ours, and one tensor where a model's ``tie_word_embeddings`` is true: then a file may hold the second alone."""


@dataclass(frozen=True)
class TensorNames:
    """One tensor: its name and shape in a converted model, and in a foreign layout.

    ``squeezable``: files may hold it with more or fewer dimensions of size one. ``transposed``: the last two
    dimensions are exchanged in the foreign layout. ``piece``: it is a part of the foreign tensor. ``letters``: those of
    its shape in the converted model.
    """

    name: str
    shape: tuple[int, ...]
    foreign: str
    foreign_shape: tuple[int, ...]
    squeezable: bool = False
    transposed: bool = False
    piece: Piece | None = None
    letters: str = ""

    def of(self, foreign: Tensor) -> Tensor:
        """The tensor as a converted model has it, from the foreign one."""
        if self.piece is not None:
            dim, number, of = self.piece.dim, self.piece.number, self.piece.of
            foreign = foreign.narrow(dim, number * (size := foreign.shape[dim] // of), size)
        return (foreign.mT if self.transposed else foreign).reshape(self.shape)

    def back(self, tensor: Tensor) -> Tensor:
        """The foreign tensor from the model's, or this row's piece of it."""
        shape = list(self.foreign_shape)
        if self.piece is not None:
            shape[self.piece.dim] //= self.piece.of
        return (tensor.mT if self.transposed else tensor).reshape(shape)


def by_foreign(table: Iterable[TensorNames]) -> dict[str, list[TensorNames]]:
    """The rows of each foreign tensor, its pieces in their order."""
    found: dict[str, list[TensorNames]] = {}
    for row in table:
        found.setdefault(row.foreign, []).append(row)
    return {name: sorted(rows, key=_place) for name, rows in found.items()}


def foreign_tensor(rows: list[TensorNames], read: Callable[[str], Tensor]) -> Tensor:
    """A tensor as its layout has it, from the model's tensors of :func:`by_foreign`; ``read`` gives one by our name."""
    parts = [row.back(read(row.name)) for row in rows]
    first = rows[0].piece
    return parts[0] if first is None else torch.cat(parts, first.dim)


def _place(row: TensorNames) -> int:
    return 0 if row.piece is None else row.piece.number


def tensor_table(config: RwkvRevConfig, layout: str | None = None) -> tuple[TensorNames, ...]:
    """Every tensor of a model, in the order of the original trainer, with its name and shape in ``layout``.

    None is the original trainer's own, or where there is no other tool, ours.

    Raises:
        ValueError: if ``layout`` cannot hold the version (``transformers`` is RWKV-4 only, ``v5-hub`` RWKV-5 only).
    """
    architecture = config.architecture
    if layout is None and not architecture.layouts:
        return _own_table(config)
    layout = architecture.own_layout if layout is None else layout
    if layout not in layouts():
        raise ValueError(f"layout {layout!r} must be one of {', '.join(layouts())}")
    column = architecture.column(layout)
    table: list[TensorNames] = []

    def add(row: Row, ours: str = "", prefix: str = "", layer: int = 0) -> None:
        foreign = row.foreign[column]
        if foreign is None or (row.only is not None and getattr(config, row.only[0]) != row.only[1]):
            return
        if not row.is_in(layer):
            return
        shape = architecture.shape(row.shape, config)
        table.append(
            TensorNames(
                name=ours or row.ours,
                shape=shape,
                foreign=prefix + foreign,
                foreign_shape=architecture.shape(row.foreign_letters(column), config),
                squeezable=row.squeezable or (row.piece(column) is None and len(shape) == 1),
                transposed=row.is_transposed(column),
                piece=row.piece(column),
                letters=row.shape,
            )
        )

    for row in architecture.outside:
        add(row)
    for i in range(config.num_hidden_layers):
        prefix = f"{architecture.layouts[column].block}{i}."
        for row in architecture.block:
            add(row, f"model.blocks.{i}.{row.ours}", prefix, i)
        if config.has_initial_state and architecture.initial_state is not None:
            add(architecture.initial_state, f"{architecture.initial_state.ours}{i}", prefix)
    for row in architecture.after:
        add(row)
    return tuple(table)


def _own_table(config: RwkvRevConfig) -> tuple[TensorNames, ...]:
    """Of an architecture that no other tool has: what its blocks hold, and what is around them."""
    architecture = config.architecture
    shapes = {row.ours: architecture.shape(row.shape, config) for row in architecture.outside}
    for i in range(config.num_hidden_layers):
        with torch.device("meta"):
            block = Block(config, i)
        # persistent buffers too: they are part of the model
        shapes |= {f"model.blocks.{i}.{name}": tuple(t.shape) for name, t in block.state_dict().items()}
        if config.has_initial_state:
            shapes[f"model.initial_wkv.{i}"] = architecture.memory_shape(config)
    shapes |= {row.ours: architecture.shape(row.shape, config) for row in architecture.after}
    return tuple(TensorNames(name, shape, name, shape) for name, shape in shapes.items())
