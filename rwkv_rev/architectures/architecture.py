"""All that an architecture has to say of itself: data and functions, nothing else knows one by its name.

Shapes are written in letters, ``"H N"``: those of :data:`LETTERS`, the architecture's own, numbers, and a number before
a letter for so many times its size (``"D 5R"``). A new one, a generation of RWKV or another recurrent model, is a file
that makes an :class:`Architecture`, its cells, and a line in :mod:`rwkv_rev.architectures.registry`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_rev.architectures.fields import Field
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

NUMBER = 4
"""Bytes of a float32."""
LETTERS = {
    "V": "vocab_size",
    "D": "hidden_size",
    "H": "num_attention_heads",
    "N": "head_size",
    "F": "intermediate_size",
}
"""Of which field of the configuration a letter of a shape is the size."""
_SIZE = re.compile(r"(\d*)([A-Za-z]*)")


def _nothing(_: Any) -> None:
    return None


@dataclass(frozen=True)
class Layout:
    """How another tool names tensors.

    Attributes:
        name: of the layout.
        mark: what some names of a file in this layout begin with, and none of a file in another one.
        block: what the names of block 0's tensors begin with, but for its number.
    """

    name: str
    mark: str
    block: str


@dataclass(frozen=True)
class Row:
    """One tensor; of a block its names leave out the block's.

    Attributes:
        ours: its name in a converted model.
        shape: its letters there.
        foreign: its name in each of :attr:`Architecture.layouts`, None where a layout has no place for it.
        foreign_shape: its letters there, where they are others.
        squeezable: whether files may hold it with more or fewer dimensions of size one (all vectors are so).
        transposed: whether the last two dimensions are exchanged in the foreign layouts.
        only: a field of the configuration and the value at which there is such a tensor; always when None.
        lowest: the lowest block that has it.
    """

    ours: str
    shape: str
    foreign: tuple[str | None, ...] = ()
    foreign_shape: str | None = None
    squeezable: bool = False
    transposed: bool = False
    only: tuple[str, Any] | None = None
    lowest: int = 0


@dataclass(frozen=True)
class Stored:
    """What a file holds, before it is known what it is.

    Attributes:
        width: D.
        shapes: of each kind of tensor in its blocks, by the names of the first layout without the block's.
        lowest: block that has one of each kind.
    """

    width: int
    shapes: Mapping[str, tuple[int, ...]]
    lowest: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One tensor of a layer's state.

    Attributes:
        shape: its letters, without rows.
        wide: whether it is float32 at least, and else of the activations' type.
        begin: makes zeros [..., *shape] what it is before the first token, in place.
    """

    shape: str
    wide: bool = False
    begin: Callable[[Tensor], None] = _nothing


@dataclass(frozen=True)
class Cost:
    """What training takes (:mod:`rwkv_rev.forecast`), B rows and C tokens at once.

    Attributes:
        vectors: D numbers each, that the graph of a layer keeps of a token.
        fused_vectors: the same where the CUDA kernels run.
        mixes: how many of these are mixes of two tokens, which a CUDA device makes again instead of keeping.
        states: numbers that the graph of a layer keeps of the recurrence's states, by (config, B, C, fused).
        whole: bytes of each tensor of a memory on the tape where it is kept whole, by (config, B).
        remnant: bytes of each tensor that one chunk puts there otherwise, fingerprints too but no token shifts, by
            (config, log w of the stored shape, B, C).
    """

    vectors: int
    fused_vectors: int
    mixes: int
    states: Callable[["RwkvRevConfig", int, int, bool], int]
    whole: Callable[["RwkvRevConfig", int], list[int]]
    remnant: Callable[["RwkvRevConfig", Tensor, int, int], list[int]]


@dataclass(frozen=True)
class Architecture:
    """One generation.

    Attributes:
        version: its name, as ``RwkvRevConfig.rwkv_version`` has it.
        has_heads: whether the memory is a matrix per head, with a GroupNorm behind it.
        state_kind: of a model.
        state: the tensors of a layer's, by the names of ``state_kind``.
        memory: the name of that which the forecast counts and state tuning tunes.
        keys: letters of one token's keys, by which a kernel is chosen.
        lora_targets: last names of the linear maps that low-rank additions go to unless somebody says otherwise.
        published_sizes: fields of the configuration that published models of width D have.

        cells: of a block, by the names of its attributes, in the order in which they are computed; from the
            configuration and the number of the layer.
        initialization: what fills a cell by its class and the depth of its layer, for training from scratch.
        log_decay: log w of the stored shape, float32, from what gives a tensor of a block by our name.

        layouts: other tools'; the first is the trainer's own ``.pth``, the second that of Hugging Face repositories.
        outside: tensors before the blocks.
        block: tensors of every block, in the order of the original trainer.
        after: tensors after the blocks.
        fields: of the configuration, that other architectures do not have, by their names.
        letters: further ones, as :data:`LETTERS`.
        check: raises ValueError for a configuration whose fields do not fit each other.

        initial_state: a tuned initial memory of each block, whose number its own name ends with; None where no other
            tool reads one: then it cannot be tuned.
        sign: our name of a tensor of blocks, which every file of this kind has.
        told_by: fields of the configuration that a file tells; None where it is of another kind, which may be an older
            one: generations are asked from the newest to the oldest. Raises ValueError where sizes do not fit.
        hub_config: what ``config.json`` of a Hugging Face repository says besides what all say.
        lost: what the first layout cannot say of a model, for people; None where nothing is lost.
        cost: of training.
    """

    version: str
    has_heads: bool
    state_kind: type[ModelState]
    state: Mapping[str, Part]
    memory: str
    keys: str
    lora_targets: tuple[str, ...]
    published_sizes: Callable[[int], dict[str, Any]]

    cells: Callable[["RwkvRevConfig", int], Mapping[str, ReversibleCell]]
    initialization: Mapping[type[nn.Module], Callable[[Any, "RwkvRevConfig"], None]]
    log_decay: Callable[[Callable[[str], Tensor]], Tensor]

    layouts: tuple[Layout, ...]
    outside: tuple[Row, ...]
    block: tuple[Row, ...]
    after: tuple[Row, ...]
    sign: str
    told_by: Callable[[Stored], dict[str, Any] | None]
    hub_config: Callable[["RwkvRevConfig"], dict[str, Any]]
    cost: Cost

    fields: Mapping[str, Field] = field(default_factory=dict)
    letters: Mapping[str, str] = field(default_factory=dict)
    check: Callable[["RwkvRevConfig"], None] = _nothing

    initial_state: Row | None = None
    lost: Callable[["RwkvRevConfig"], str | None] = _nothing

    @property
    def tunes_state(self) -> bool:
        """Whether the initial memory can be tuned."""
        return self.initial_state is not None

    @property
    def own_layout(self) -> str:
        """The original trainer's."""
        return self.layouts[0].name

    @property
    def hub_layout(self) -> str:
        """That of Hugging Face repositories."""
        return self.layouts[1].name

    def column(self, layout: str) -> int:
        """The place of a layout in :attr:`Row.foreign`.

        Raises:
            ValueError: if the generation has no such layout.
        """
        names = [known.name for known in self.layouts]
        if layout not in names:
            raise ValueError(
                f"the layout {layout!r} does not exist for RWKV-{self.version}; use {self.hub_layout!r}"
            )
        return names.index(layout)

    def shape(self, letters: str, config: "RwkvRevConfig") -> tuple[int, ...]:
        """The sizes that letters stand for."""
        known = LETTERS | dict(self.letters)
        sizes = []
        for times, letter in (_SIZE.fullmatch(size).groups() for size in letters.split()):  # type: ignore[union-attr]
            sizes.append(int(times or 1) * (getattr(config, known[letter]) if letter else 1))
        return tuple(sizes)

    def memory_shape(self, config: "RwkvRevConfig") -> tuple[int, ...]:
        """Of a layer's :attr:`memory`, without rows."""
        return self.shape(self.state[self.memory].shape, config)

    def empty_state(
        self, config: "RwkvRevConfig", batch_size: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> ModelState:
        """The state before the first token, where activations are of ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        rows = (config.num_hidden_layers, batch_size)
        tensors = {}
        for name, part in self.state.items():
            shape = (*rows, *self.shape(part.shape, config))
            tensors[name] = torch.zeros(shape, device=device, dtype=wide if part.wide else dtype)
            part.begin(tensors[name])
        return self.state_kind(**tensors)
