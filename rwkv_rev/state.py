"""The recurrent state of a whole model, as it passes through ``forward(..., state=...)`` and ``generate()``.

A state has named tensors, each for all layers at once. What they are an architecture says, in a dataclass of its own
(:class:`ModelState`); RWKV's is :class:`RwkvRevState`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from rwkv_rev.cells.shifted_cell import ShiftedState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig


@dataclass(frozen=True)
class ModelState:
    """State after some tokens, for every layer: a dataclass whose fields are tensors [L, B, ...].

    Attributes:
        cells: of each cell of a block the NamedTuple that its values are, and which of our fields these are, in order.
        listed: the list of all tensors with the batch first, which trainers walk through.
        made_by: the architecture whose models made it, by its name; None where nobody said, as of states made by hand.
    """

    cells: ClassVar[tuple[tuple[type, tuple[str, ...]], ...]]
    listed: ClassVar[type[list]]
    made_by: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        cls.listed = type(f"{cls.__name__}List", (list,), {"kind": cls})

    @classmethod
    def of(cls, architecture: str) -> type[Self]:
        """This class, whose states and all that are made of them know the ``architecture`` that made them."""
        known: Any = _OF.get((cls, architecture))
        if known is None:
            told = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
            known = _OF[cls, architecture] = type(cls.__name__, (cls,), told | {"made_by": architecture})
            known.listed = cls.listed
        return known

    def __reduce__(self) -> Any:
        """Copies and pickles: a class of :meth:`of` has no name of its own."""
        if self.made_by is None:
            return type(self), tuple(self.tensors())
        return _made, (type(self).__base__, self.made_by, self.tensors())

    @classmethod
    def empty(
        cls,
        config: "RwkvRevConfig",
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """The state before the first token, of the kind that the model has. ``dtype`` is the activations'; memories
        are float32, float64 for float64."""
        return config.architecture.empty_state(config, batch_size, device, dtype)

    @classmethod
    def stack(cls, layers: Sequence[tuple[Any, ...]]) -> Self:
        """From the values of each layer's cells."""
        return cls.like(
            [[part for values in layer for part in values if part is not None] for layer in layers]
        )

    @classmethod
    def like(cls, layers: Sequence[Sequence[Tensor]]) -> Self:
        """From the tensors of each layer, in the order of its cells."""
        names = [name for _, parts in cls.cells for name in parts]
        stacked = [torch.stack(list(tensors)) for tensors in zip(*layers, strict=True)]
        return cls(**dict(zip(names, stacked, strict=True)))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the tensors, in the order of the fields."""
        return tuple(field.name for field in fields(cls))

    def layer(self, index: int) -> tuple[Any, ...]:
        """The values of the cells of layer ``index``."""
        return tuple(kind(*(getattr(self, name)[index] for name in parts)) for kind, parts in self.cells)

    @property
    def layers(self) -> int:
        return self.tensors()[0].shape[0]

    @property
    def batch_size(self) -> int:
        return self.tensors()[0].shape[1]

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [getattr(self, name) for name in self.names()]

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The state of what a function makes of each tensor."""
        return type(self)(*map(function, self.tensors()))

    def detach(self) -> Self:
        """The same values without graph."""
        return self.each(Tensor.detach)

    def rows(self, index: Tensor) -> Self:
        """The batch rows ``index`` (int64 [B'])."""
        return self.each(lambda tensor: tensor.index_select(1, index.to(tensor.device)))

    def batch_first(self) -> list[Tensor]:
        """The tensors [B, L, ...], in a list that knows whose they are."""
        return self.listed(tensor.transpose(0, 1) for tensor in self.tensors())

    def inner(self, other: Self) -> Tensor:
        """Sum of the products of all elements, a scalar: the objective whose state gradient is ``other``."""
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors()))
        return torch.stack(
            [(a * b).sum().to(dtype) for a, b in zip(self.tensors(), other.tensors(), strict=True)]
        ).sum()


_OF: dict[tuple[type[ModelState], str], type[ModelState]] = {}


def _made(kind: type[ModelState], architecture: str, tensors: list[Tensor]) -> ModelState:
    return kind.of(architecture)(*tensors)


def of_batch_first(tensors: list[Tensor]) -> ModelState:
    """The state that :meth:`ModelState.batch_first` was called of."""
    kind: type[ModelState] = getattr(type(tensors), "kind", RwkvRevState)
    return kind(*(tensor.transpose(0, 1) for tensor in tensors))


@dataclass(frozen=True)
class RwkvRevState(ModelState):
    """State of an RWKV model after some tokens.

    Attributes:
        time_shift: [L, B, D], the last token's vector at each time mix.
        channel_shift: [L, B, D], the same at each channel mix.
        wkv: float32 or wider, [L, B, H, N, N] (RWKV-5 to 7, key index first) or [L, B, 3, D] (RWKV-4: a, b, m).
    """

    time_shift: Tensor
    channel_shift: Tensor
    wkv: Tensor

    cells = ((ShiftedState, ("time_shift", "wkv")), (ShiftedState, ("channel_shift",)))


RwkvRevState.listed = list
