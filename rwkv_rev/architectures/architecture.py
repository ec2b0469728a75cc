"""All that an architecture has to say of itself: data and functions, nothing else knows one by its name.

Shapes are written in letters, ``"H N"``: those of :data:`LETTERS`, the architecture's own, numbers, and products of
these (``"D 5*R"``). A new one, a generation of RWKV or another recurrent model, is a file that makes an
:class:`Architecture`, its cells, and a line in :mod:`rwkv_rev.architectures.registry`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rwkv_rev.architectures.epsilons import by_divisor
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.scan import Scan
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

T = TypeVar("T")

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


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Layout:
    """How another tool names tensors.

    Attributes:
        name: of the layout.
        mark: what some names of a file in this layout begin with, and none of a file in another one.
        block: what the names of block 0's tensors begin with, but for its number.
        sign: a tensor of blocks that tells it from another layout with the same mark.
        says: fields of a ``config.json`` that must agree with the tensors, where it has them: letters of a size, and
            our name of a tensor that has it.
        family: the layout that ``export`` calls it by; its own name when empty.
    """

    name: str
    mark: str
    block: str
    sign: str = ""
    says: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    family: str = ""


@dataclass(frozen=True)
class Piece:
    """Which part of a foreign tensor a tensor is: that of ``number``, where ``dim`` is cut into ``of`` equal ones."""

    dim: int
    number: int
    of: int


@dataclass(frozen=True)
class Row:
    """One tensor; of a block its names leave out the block's.

    Attributes:
        ours: its name in a converted model.
        shape: its letters there.
        foreign: its name in each of :attr:`Architecture.layouts`, None where a layout has no place for it.
        foreign_shape: its letters there, where they are others; a tuple has them for each layout.
        squeezable: whether files may hold it with more or fewer dimensions of size one (all vectors are so).
        transposed: whether the last two dimensions are exchanged in the foreign layouts; a tuple tells of each.
        pieces: in each layout, where it is a part of a tensor there, whose shape ``foreign_shape`` is; None where it is
            one by itself.
        only: a field of the configuration and the value at which there is such a tensor; always when None.
        lowest, highest: the blocks that have it; None for all that are above.
    """

    ours: str
    shape: str
    foreign: tuple[str | None, ...] = ()
    foreign_shape: str | tuple[str, ...] | None = None
    squeezable: bool = False
    transposed: bool | tuple[bool, ...] = False
    pieces: tuple[Piece | None, ...] = ()
    only: tuple[str, Any] | None = None
    lowest: int = 0
    highest: int | None = None

    def is_in(self, layer: int) -> bool:
        """Whether block ``layer`` has it."""
        return self.lowest <= layer and (self.highest is None or layer <= self.highest)

    def foreign_letters(self, column: int) -> str:
        """The letters of its shape in a layout."""
        if isinstance(self.foreign_shape, tuple):
            return self.foreign_shape[column]
        return self.foreign_shape or self.shape

    def is_transposed(self, column: int) -> bool:
        """Whether the last two dimensions are exchanged in a layout."""
        return self.transposed[column] if isinstance(self.transposed, tuple) else self.transposed

    def piece(self, column: int) -> Piece | None:
        """Which part of a tensor it is in a layout."""
        return self.pieces[column] if self.pieces else None


@dataclass(frozen=True)
class Stored:
    """What a file holds, before it is known what it is.

    Attributes:
        width: D.
        tensors: the shapes of each kind of tensor by its blocks, from the lowest up; kinds are called by the names of
            the first layout without the block's.
    """

    width: int
    tensors: Mapping[str, Mapping[int, tuple[int, ...]]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each kind the shape that most blocks have, so that the others are blamed."""
        return {kind: most_common(shapes.values()) for kind, shapes in self.tensors.items()}

    def size(self, kinds: Sequence[str], of: Callable[[tuple[int, ...]], int | None]) -> int | None:
        """What most tensors of these kinds say of a size that all blocks have; None where no tensor does."""
        found = [of(shape) for kind in kinds for shape in self.tensors.get(kind, {}).values()]
        told = [size for size in found if size is not None]
        return most_common(told) if told else None


def most_common(values: Iterable[T]) -> T:
    """The first of the most frequent."""
    return Counter(values).most_common(1)[0][0]


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
            (config, log w of the stored shape or None, B, C).
        lifted: the same of remnants that are lifted, an estimate, by (config, B, C); None where no memory can be.
        shifts: how many token shifts of D numbers it puts there besides.
        half, narrow: what the graph takes of its float32 size under autocast to 16 bits, and in a model of 16 bits.
    """

    vectors: int
    fused_vectors: int
    mixes: int
    states: Callable[["RwkvRevConfig", int, int, bool], int]
    whole: Callable[["RwkvRevConfig", int], list[int]]
    remnant: Callable[["RwkvRevConfig", Tensor | None, int, int], list[int]]
    lifted: Callable[["RwkvRevConfig", int, int], list[int]] | None = None
    shifts: int = 2
    half: float = 2 / 3
    narrow: float = 0.6


@dataclass(frozen=True)
class RwkvPackage:
    """How the ``rwkv`` package, by RWKV's author, runs models of an architecture: one of the oracles of ``verify``.

    Attributes:
        environment: variables that choose its class while it is imported.
        inexact: which number of its code has float32's precision alone, for people; empty where float64 is exact.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    inexact: str = ""


OUTSIDE = (
    Row("model.embeddings.weight", "V D"),
    Row("model.ln0.weight", "D"),
    Row("model.ln0.bias", "D"),
)
AFTER = (Row("model.ln_out.weight", "D"), Row("model.ln_out.bias", "D"), Row("head.weight", "V D"))


@dataclass(frozen=True)
class AdapterTargets:
    """Which modules peft's methods adapt unless somebody says otherwise, by the last parts of their names.

    Attributes:
        square: linear maps of one shape, for methods that need that.
        scaled: whose outputs are scaled (IA3). scaled_inputs: those of them whose inputs are.
        norms: LayerNorms.
    """

    square: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    scaled_inputs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("ln1", "ln2")


@dataclass(frozen=True)
class Architecture:
    """A generation of RWKV, or another recurrent model.

    Attributes:
        version: its name, as ``RwkvRevConfig.rwkv_version`` has it.
        title: what people call it; RWKV and the version when None.
        has_heads: whether the memory is a matrix per head. has_group_norm: whether there is a GroupNorm behind it.
        has_two_bonuses: whether the bonus may be stored as its logarithm, too (``bonus_is_exponential``).
        state_kind: of a model.
        state: the tensors of a layer's, by the names of ``state_kind``.
        memory: the name of that which the forecast counts and state tuning tunes.
        keys: letters of one token's keys, by which a kernel is chosen.
        lora_targets: last names of the linear maps that low-rank additions go to unless somebody says otherwise.
        targets: the same of other methods of peft.
        float32: parameters that stay float32 in a model of half precision, by their last names.
        sizes: fields of the configuration that models of width D have as a rule.
        fields: of the configuration, that other architectures do not have, by their names.
        letters: further ones, as :data:`LETTERS`.
        check: raises ValueError for a configuration whose fields do not fit each other.

        cells: of a block, by the names of its attributes, in the order in which they are computed; from the
            configuration and the number of the layer.
        initialization: what fills a cell by its class and the depth of its layer, for training from scratch.
        log_decay: log w of the stored shape, float32, from what gives a tensor of a block by our name; None for a
            memory whose decay is no constant.
        tunes_state: whether the initial :attr:`memory` can be tuned.
        scan: the same model as a plain loop, which logits are compared with: over the names of the first of
            :attr:`layouts`, or over ours where there is none. Without it reversal and gradients alone can be verified.
        rwkv_package: how the ``rwkv`` package computes the same; None where it does not know such models.
        cost: of training.

        layouts: other tools'; the first is the trainer's own ``.pth``, the second that of Hugging Face repositories.
            Without any, nothing can be converted or exported, and none of the following is needed.
        outside: tensors before the blocks.
        block: tensors of every block, in the order of the original trainer.
        after: tensors after the blocks.
        initial_state: a tuned initial memory of each block, whose number its own name ends with; None where no other
            tool reads one.
        sign: our name of a tensor of blocks, which every file of this kind has.
        told_by: fields of the configuration that a file tells; None where it is of another kind, which may be an older
            one: generations are asked from the newest to the oldest. Raises ValueError where sizes do not fit.
        epsilons: of LayerNorm and GroupNorm, from a file's ``config.json``, the name of its layout, and N. Raises
            ValueError for what it does not understand.
        hub_config: what ``config.json`` of a Hugging Face repository in the layout of that name says besides what all
            say.
        lost: what the layout of that name cannot say of a model, for people; None where nothing is lost.
    """

    version: str
    state_kind: type[ModelState]
    state: Mapping[str, Part]
    memory: str
    keys: str
    lora_targets: tuple[str, ...]
    sizes: Callable[[int], dict[str, Any]]
    cells: Callable[["RwkvRevConfig", int], Mapping[str, ReversibleCell]]
    initialization: Mapping[type[nn.Module], Callable[[Any, "RwkvRevConfig"], None]]
    cost: Cost

    title: str | None = None
    has_heads: bool = False
    has_group_norm: bool = False
    has_two_bonuses: bool = False
    targets: AdapterTargets = AdapterTargets()
    float32: tuple[str, ...] = ()
    fields: Mapping[str, Field] = field(default_factory=dict)
    letters: Mapping[str, str] = field(default_factory=dict)
    check: Callable[["RwkvRevConfig"], None] = _nothing
    log_decay: Callable[[Callable[[str], Tensor]], Tensor] | None = None
    tunes_state: bool = False
    scan: Callable[["RwkvRevConfig"], Scan] | None = None
    rwkv_package: RwkvPackage | None = None

    layouts: tuple[Layout, ...] = ()
    outside: tuple[Row, ...] = OUTSIDE
    block: tuple[Row, ...] = ()
    after: tuple[Row, ...] = AFTER
    initial_state: Row | None = None
    sign: str = ""
    told_by: Callable[[Stored], dict[str, Any] | None] = _nothing
    epsilons: Callable[[Mapping[str, Any], str, int], tuple[float, float]] = by_divisor
    hub_config: Callable[["RwkvRevConfig", str], dict[str, Any]] = lambda config, layout: {}
    lost: Callable[["RwkvRevConfig", str], str | None] = _nothing

    @property
    def called(self) -> str:
        """``RWKV-5.2``, or its title."""
        return f"RWKV-{self.version}" if self.title is None else self.title

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
            ValueError: if the architecture has no such layout.
        """
        names = [known.name for known in self.layouts]
        if layout not in names:
            instead = f"; use {self.hub_layout!r}" if names else ""
            raise ValueError(f"the layout {layout!r} does not exist for {self.called}{instead}")
        return names.index(layout)

    def facts(self, config: "RwkvRevConfig") -> dict[str, object]:
        """What people are told of a configuration besides what all have."""
        found: dict[str, object] = {}
        if self.has_heads:
            found["heads"] = f"{config.num_attention_heads} of size {config.head_size}"
        if self.has_group_norm:
            found["GroupNorm eps"] = f"{config.group_norm_epsilon:g}"
        return found | {name.replace("_", " "): getattr(config, name) for name in self.fields}

    def shape(self, letters: str, config: "RwkvRevConfig") -> tuple[int, ...]:
        """The sizes that letters stand for."""
        known = LETTERS | dict(self.letters)

        def size(factor: str) -> int:
            return int(factor) if factor.isdigit() else getattr(config, known[factor])

        return tuple(math.prod(map(size, product.split("*"))) for product in letters.split())

    def memory_shape(self, config: "RwkvRevConfig") -> tuple[int, ...]:
        """Of a layer's :attr:`memory`, without rows."""
        return self.shape(self.state[self.memory].shape, config)

    def state_shapes(self, config: "RwkvRevConfig", batch_size: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors of a model's state, [L, B, ...], by their names."""
        rows = (config.num_hidden_layers, batch_size)
        return {name: (*rows, *self.shape(part.shape, config)) for name, part in self.state.items()}

    def empty_state(
        self, config: "RwkvRevConfig", batch_size: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> ModelState:
        """The state before the first token, where activations are of ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors, shapes = {}, self.state_shapes(config, batch_size)
        for name, part in self.state.items():
            tensors[name] = torch.zeros(shapes[name], device=device, dtype=wide if part.wide else dtype)
            part.begin(tensors[name])
        return self.state_kind.of(self.version)(**tensors)
