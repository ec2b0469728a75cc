"""The seam behind which every gradient strategy stands: from a batch and a state to a loss with gradients.

A strategy sees the model through :class:`LanguageModel` and the batch through :class:`LossInputs`, and returns a
:class:`LossResult` whose loss can be back-propagated by any trainer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast, overload

import torch
from torch import Tensor, nn

from rwkv_rev import random_state
from rwkv_rev.autograd.outside_leaves import Differentiated, OutsideLeaves
from rwkv_rev.bptt.inference_tensors import ordinary, ordinary_state
from rwkv_rev.bptt.language_model import LanguageModel
from rwkv_rev.bptt.leaves import devices, refuse_lazy, refuse_offloaded
from rwkv_rev.bptt.uncached import uncached
from rwkv_rev.cells.borders import Borders, Mask, mask_of, part_of
from rwkv_rev.cells.mask import any_per_chunk
from rwkv_rev.distributed.sharded_reading import gathered, go_along_with_calls
from rwkv_rev.distributed.shards import refuse_sharded, refuse_zero3
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.neftune import neftune_share
from rwkv_rev.foreign.search import Strangers, refuse_unknown, strangers, strangers_at
from rwkv_rev.loss import IGNORE, cross_entropy_gradients, sum_cross_entropy
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.distributed.context_group import ContextGroup


def _nothing() -> None:
    """There is nothing to refuse."""


@dataclass(frozen=True)
class LossInputs:
    """One batch.

    Attributes:
        input_ids: [B, T] int64, or None with ``inputs_embeds`` [B, T, D].
        valid: [B, T] bool, or None when every token counts.
        targets: [B, T] int64, what each position predicts, -100 where nothing.
        divisor: what the summed cross-entropy is divided by (predicted tokens, the sum of their weights, or the
            trainer's own number).
        state: the state before the first token; its tensors may require gradients.
        final_state_gradient: gradient of some further objective with respect to the final state.
        borders: where documents begin inside of rows; None where they do nowhere.
        weights: [B, T] of the targets' cross-entropies, in the loss's dtype; None for 1.
        group: the ranks that every chunk's tokens are split over, all of which have the same batch; None for this one.
        kind: of chunks, where it is another one (:class:`.piece.Piece`).
        whole_length: T of the batch that this is a part of; None for a whole one.
        refuse: to be called before anything is computed of the tokens: waits for the device, and raises what
            :func:`.inputs.loss_inputs` says of labels.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    valid: Tensor | None
    targets: Tensor
    divisor: float | Tensor
    state: ModelState
    final_state_gradient: ModelState | None = None
    borders: Borders | None = None
    weights: Tensor | None = None
    group: "ContextGroup | None" = None
    kind: "type[Chunk] | None" = None
    whole_length: int | None = None
    refuse: Callable[[], None] = field(default=_nothing, compare=False)

    def __post_init__(self) -> None:
        for name in ("input_ids", "inputs_embeds", "valid", "targets", "weights"):
            object.__setattr__(self, name, ordinary(getattr(self, name)))
        for name in ("state", "final_state_gradient"):
            object.__setattr__(self, name, ordinary_state(getattr(self, name)))

    @property
    def length(self) -> int:
        return self.targets.shape[1]

    def taken(self, places: Tensor, *, ends: bool) -> "LossInputs":
        """Of the tokens at ``places``, int64 [n] on the host, alone; ``ends``: the last one is the batch's."""
        index = places.to(self.targets.device)

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(1, index.to(tensor.device))

        return replace(
            self,
            input_ids=of(self.input_ids),
            inputs_embeds=of(self.inputs_embeds),
            valid=of(self.valid),
            targets=self.targets.index_select(1, index),
            final_state_gradient=self.final_state_gradient if ends else None,
            borders=None if self.borders is None else self.borders.taken(places),
            weights=of(self.weights),
            whole_length=self.length,
        )

    def chunks(self, length: int) -> "Chunks":
        """The batch in chunks of ``length`` tokens; the last may be shorter."""
        return Chunks(self, length)


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``stop``; ``predicts``, ``is_full`` (no mask) and ``has_borders`` are known on the host."""

    inputs: LossInputs
    index: int
    start: int
    stop: int
    predicts: bool
    is_full: bool
    has_borders: bool = False

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def own_length(self) -> int:
        """Tokens that are run here."""
        return self.length

    @property
    def planned_length(self) -> int:
        """What cells plan for: of a chunk with borders the memory's plan is not used, and any will do."""
        return 1 if self.has_borders else self.length

    def mask(self) -> Mask:
        if self.is_full:
            return None
        borders = part_of(self.inputs.borders, self.start, self.stop) if self.has_borders else None
        return mask_of(self._valid(), borders, self.inputs.targets.device, self.length)

    def _valid(self) -> Tensor | None:
        valid = self.inputs.valid
        return None if valid is None else valid[:, self.start : self.stop]

    def take_ends(self, mask: Mask, layers: Sequence[Sequence[Tensor]]) -> None:
        """The states of documents that end in the chunk, if they are asked for; ``layers`` are those after it."""
        borders = self.inputs.borders
        if borders is not None and borders.ends is not None:
            with torch.no_grad():
                borders.ends.part(self.start, self.stop).take(type(self.inputs.state), mask, layers)

    def targets(self) -> Tensor:
        return self.inputs.targets[:, self.start : self.stop]

    def weights(self) -> Tensor | None:
        weights = self.inputs.weights
        return None if weights is None else weights[:, self.start : self.stop]

    def embeds(self) -> Tensor | None:
        """A copy [B, C, D], to which code of others may write, and which lies alike in memory whenever it is made.

        A product of numbers that begin elsewhere, or lie farther apart, has other bits on some CPUs.
        """
        embeds = self.inputs.inputs_embeds
        if embeds is None:
            return None
        return embeds[:, self.start : self.stop].clone(memory_format=torch.contiguous_format)

    def embed(self, model: LanguageModel, embeds: Tensor | None = None) -> Tensor:
        """The chunk's input to block 0, [B, C, D]."""
        whole = self.inputs.whole_length or self.inputs.length
        with neftune_share(model.get_input_embeddings(), self.length / whole):
            return model.embed(self.ids(), embeds)

    def loss(
        self,
        model: LanguageModel,
        hidden: Tensor,
        parameters: list[Tensor],
        loss_scale: float,
        outside: OutsideLeaves | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The chunk's share of the loss, from normalised ``hidden`` [B, C, D], with its finished gradients.

        See :func:`rwkv_rev.loss.cross_entropy_gradients`.
        """
        return cross_entropy_gradients(
            hidden,
            model.head,
            self.targets(),
            parameters,
            scale=1 / self.inputs.divisor,
            vocab_size=model.vocab_size,
            loss_scale=loss_scale,
            outside=outside,
            weights=self.weights(),
        )

    def read(self, model: LanguageModel, state: ModelState) -> tuple[Tensor, ModelState]:
        """Normalised hidden states [B, C, D] and the state after them, by the model itself."""
        borders = part_of(self.inputs.borders, self.start, self.stop)
        return model.read(self.ids(), self._valid(), self.embeds(), state, borders)

    def ids(self) -> Tensor | None:
        ids = self.inputs.input_ids
        return None if ids is None else ids[:, self.start : self.stop]

    def of_all(self, to_embeds: Tensor) -> Tensor:
        """The gradient by the embeddings of the chunk's tokens, [B, C, D], from that by those that are run here."""
        return to_embeds


class Chunks(Sequence[Chunk]):
    """A batch in chunks of ``length`` tokens, each made when it is looked at: two bytes stand for a chunk."""

    def __init__(self, inputs: LossInputs, length: int) -> None:
        self._inputs, self._length = inputs, length
        # one transfer each, looked at with the first chunk, so that no later one waits for the device
        flags = (
            inputs.targets != IGNORE,
            None if inputs.valid is None else ~inputs.valid,
            None if inputs.borders is None else inputs.borders.at,
        )
        self._started = [None if each is None else any_per_chunk(each, length) for each in flags]

    def __len__(self) -> int:
        return -(-self._inputs.length // self._length)

    def planned_lengths(self) -> list[int]:
        """:attr:`Chunk.planned_length` of each; without borders the device is not waited for."""
        if self._inputs.borders is not None or self._inputs.kind is not None:
            return [chunk.planned_length for chunk in self]
        whole, rest = divmod(self._inputs.length, self._length)
        return [self._length] * whole + [rest] * (rest > 0)

    @cached_property
    def _flags(self) -> list[bytearray | None]:
        """Chunks that predict, that are masked in part, that have borders; None where none are."""
        predicts, *others = [None if each is None else each() for each in self._started]
        assert predicts is not None
        if not any(predicts):
            # zero gradients, as ``full`` gives: data-parallel reduction waits for them
            predicts[-1] = 1
        return [predicts, *others]

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]
        start = index * self._length
        stop = min(start + self._length, self._inputs.length)
        predicts, masked, borders = (each is not None and bool(each[index]) for each in self._flags)
        kind = self._inputs.kind or Chunk
        return kind(self._inputs, index, start, stop, predicts, not (masked or borders), borders)


def planned_lengths(chunks: Sequence[Chunk]) -> list[int]:
    """:attr:`Chunk.planned_length` of each of some chunks."""
    if isinstance(chunks, Chunks):
        return chunks.planned_lengths()
    return [chunk.planned_length for chunk in chunks]


@dataclass(frozen=True)
class LossResult:
    """A loss ready for ``backward()``, the state after the last token (without graph), and what it took.

    ``report`` holds ``strategy``, ``chunk_length`` (tokens that were run at once: of small chunks several), and where
    they apply ``tape_bytes`` (most at once), ``drift`` and others a strategy documents.
    """

    loss: Tensor
    state: ModelState
    report: dict[str, object] = field(default_factory=dict)


class Strategy(ABC):
    """A way to back-propagate through a context.

    Args:
        chunk_length: C, tokens per chunk.
        tape, tape_dir, remnants: as of :class:`rwkv_rev.bptt_settings.BpttSettings`; of those who keep anything.

    Attributes:
        joins_chunks: whether small chunks may be run several at once: the gradient is the same.
    """

    name: str
    joins_chunks = False

    def __init__(
        self, chunk_length: int, tape: str = "host", tape_dir: str | None = None, remnants: str = "auto"
    ) -> None:
        self.chunk_length, self.remnants = chunk_length, remnants
        self.tape, self.tape_dir = tape, tape_dir

    @abstractmethod
    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        """The loss of ``inputs`` and its gradients, to be had by ``loss.backward()``."""

    def stream(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        """The loss alone, without graph, in memory that does not grow with T.

        Chunk after chunk, or at once where code inside the model might look at positions.
        """
        inputs.refuse()
        found = self.strangers(model)
        size = inputs.length if found.unknown else self.chunk_length
        whole = bool(found.unknown and strangers_at(model.head).unknown)
        if inputs.group is not None:
            refuse_unknown(found, "context parallelism")
        with torch.no_grad(), uncached(inputs.targets.device), gathered(model.head):
            total, state, chunks = None, inputs.state, inputs.chunks(size)
            go_along_with_calls(model, len(chunks))
            for chunk in chunks:
                with neftune_share(model.get_input_embeddings(), chunk.own_length / inputs.length):
                    hidden, state = chunk.read(model, state)
                part = sum_cross_entropy(
                    hidden,
                    model.head,
                    chunk.targets(),
                    scale=1 / inputs.divisor,
                    vocab_size=model.vocab_size,
                    weights=chunk.weights(),
                    whole=whole,
                )
                total = part if total is None else total + part
        assert total is not None
        if inputs.group is not None:
            total = inputs.group.add(total)
        return LossResult(total, state, {"strategy": self.name, "chunk_length": self.chunk_length})

    def untrained(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        """:meth:`stream`, where nothing that is known wants a gradient.

        Raises:
            StrategyError: if something that is not known does.
        """
        inputs.refuse()
        if torch.is_grad_enabled() and inputs.group is None:
            found = self.strangers(model)
            first = inputs.chunks(inputs.length if found.unknown else self.chunk_length)[0]
            generators = random_state.capture(devices(list(model.parameters()), inputs))
            hidden, state = first.read(model, inputs.state)
            outside = OutsideLeaves([])
            outside.look(Differentiated("the model", [model.head(hidden[:, -1:]), *state.tensors()], []))
            del hidden, state
            try:
                outside.refuse()
            except StrategyError:
                refuse_unknown(found, self.name)  # whose code it is
                raise
            random_state.restore(generators)
        return self.stream(model, inputs)

    def strangers(self, model: LanguageModel) -> Strangers:
        """Code of others inside the model."""
        return strangers(cast(nn.Module, model))

    def check(
        self, model: LanguageModel, parameters: list[Tensor], *, sharded_blocks: bool = False
    ) -> Strangers:
        """Refuse a model that cannot be differentiated chunk by chunk; gives the code of others in it.

        ``sharded_blocks``: whether blocks may be sharded.

        Raises:
            StrategyError: for code that may look at positions, and for parameters that are not here whole.
        """
        if not sharded_blocks:
            refuse_sharded(parameters, self.name)
        refuse_zero3(parameters)
        refuse_offloaded(parameters)
        refuse_lazy(parameters)
        if any(parameter.is_meta for parameter in parameters):
            raise StrategyError(
                "some of the model's parameters are offloaded: chunks need them on the device. Load the model without "
                "a device_map, or use bptt = 'full'"
            )
        found = self.strangers(model)
        refuse_unknown(found, self.name)
        return found
