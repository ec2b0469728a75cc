"""The gradient of one chunk: its loss, and what its states after it are to the chunks that follow.

From the embedded input up through the layers (:mod:`rwkv_rev.bptt.layers`) to the loss, then back down. Under float16
the chunk's graph is differentiated with a loss scale, lowered until all gradients are finite.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rev import random_state
from rwkv_rev.autograd.outside_leaves import Differentiated, OutsideLeaves, leaves_of
from rwkv_rev.bptt.layers import ByState, LayerGraph, Take, cut, pull_back, vjp
from rwkv_rev.bptt.strategy import Chunk, LanguageModel
from rwkv_rev.bptt.weight_products import adding, plain_maps
from rwkv_rev.cells.block import ExactStates, FloatStates, flat
from rwkv_rev.cells.contract import detached, parts_of, residual
from rwkv_rev.loss import scaled, wide

if TYPE_CHECKING:
    from rwkv_rev.distributed.sharded_blocks import ShardedBlock

Replay = Callable[[Tensor], tuple[list[LayerGraph], Tensor | None]]
"""From a chunk's embedded input [B, C, D] to its layers computed again, and [L] bool, which are as they were before."""

Found = tuple[Tensor, Tensor | None, list[Tensor | None]]
Objective = Callable[[LanguageModel, Chunk, Tensor, list[Tensor], float, OutsideLeaves | None], Found]
"""From a chunk and its normalised hidden states [B, C, D] to its loss, the gradient by the hidden states (None where it
does not depend on them), and those by the parameters that the head uses; times a loss scale. May look for outside
leaves."""


def own_loss(
    model: LanguageModel,
    chunk: Chunk,
    hidden: Tensor,
    parameters: list[Tensor],
    loss_scale: float,
    outside: OutsideLeaves | None,
) -> Found:
    """The model's own objective: the chunk's share of the cross-entropy."""
    return chunk.loss(model, hidden, parameters, loss_scale, outside)


class Parameters:
    """The parameters that a loss is differentiated by, and which of them each part of the model may depend on.

    Args:
        tensors: the parameters, each a leaf (:class:`~rwkv_rev.autograd.stand_ins.StandIns`).
        foreign: the model holds code of others, which may bring any parameter to any place: all may depend on all.
        starts: what documents begin with, by layer, where there are borders: each layer depends on its own.
        sharded: the blocks, where they are.
    """

    def __init__(
        self,
        model: LanguageModel,
        tensors: Sequence[Tensor],
        *,
        foreign: bool,
        starts: Any = None,
        sharded: "Sequence[ShardedBlock] | None" = None,
    ) -> None:
        self.tensors = list(tensors)
        self.sharded = sharded
        self._model, self._foreign, self._starts = model, foreign, starts

    @cached_property
    def of_layer(self) -> list[Sequence[int]]:
        """Indices of those that each layer may depend on; found when a chunk is differentiated without a recording."""
        blocks, places = self._model.blocks, self._places()
        found: list[Sequence[int]] = [range(len(self.tensors)) for _ in blocks]
        if not self._foreign:
            starts = self._starts
            begun = [[] if starts is None else flat(starts[number]) for number in range(len(blocks))]
            for number, (block, start) in enumerate(zip(blocks, begun, strict=True)):
                own: list[Any] = [*start]
                for module in block.modules():  # without the names that ``parameters()`` makes of each
                    own += module._parameters.values()
                found[number] = sorted({places[id(one)] for one in own if id(one) in places})
        return found

    @cached_property
    def maps(self) -> list[tuple[nn.Linear, int]]:
        """Linear maps that add their weights' gradients themselves, and the indices of these; found likewise."""
        model = self._model
        return [] if self._foreign or not isinstance(model, nn.Module) else plain_maps(model, self._places())

    def find(self) -> None:
        """Find all of this now, for others in the places of these, which it cannot be found by."""
        _ = self.of_layer, self.maps

    def _places(self) -> dict[int, int]:
        return {id(tensor): index for index, tensor in enumerate(self.tensors)}

    def reached(self, *outputs: Tensor) -> list[int]:
        """Indices of those that outputs of a small graph depend on: embeddings, norms, what blocks share with them."""
        found = {id(leaf) for leaf in leaves_of(outputs)}
        return [index for index, tensor in enumerate(self.tensors) if id(tensor) in found]

    def replaced(self, tensors: Sequence[Tensor]) -> "Parameters":
        """The same with other tensors in the places of these."""
        other = copy.copy(self)
        other.tensors = list(tensors)
        return other


class ChunkGradients(NamedTuple):
    """What the backward sweep takes from one chunk; gradients of the parameters have been taken already.

    Attributes:
        loss: the chunk's share.
        states: exact ones before the chunk.
        end: values of the states after it.
        to_start: gradients by the values of each layer's states before the chunk.
        to_embeds: by the input embeddings, where these were given; None where nothing depends on them.
        exactly: [L] bool, which layers computed the same as in the first sweep; None where nothing is compared.
    """

    loss: Tensor
    states: list[ExactStates]
    end: list[FloatStates]
    to_start: ByState
    to_embeds: Tensor | None
    exactly: Tensor | None


def chunk_gradients(
    model: LanguageModel,
    chunk: Chunk,
    replay: Replay,
    objective: Objective,
    parameters: Parameters,
    to_end: ByState | None,
    take: Take,
    *,
    outside: OutsideLeaves | None = None,
    half: set[torch.device] | None = None,
    compared: Callable[[], None] | None = None,
    keep_none: bool = False,
    writes: bool = False,
) -> ChunkGradients:
    """Gradients of ``chunk``.

    Args:
        objective: what the chunk's hidden states are for.
        to_end: by the values of the states after the chunk; None for none.
        take: is given the gradients of the parameters, part by part.
        outside: looks for leaves that are not among the parameters.
        half: where the model may draw random numbers, if gradients need a loss scale; None if not.
        compared: called when the chunk has been computed again and compared; not with a loss scale.
        keep_none: whether states and embeddings that nothing depends on have None for a gradient, instead of zeros.
        writes: whether a module may write to what it is handed.
    """
    if half is None:
        # a checkpointed block is computed once more when its gradient is taken, by maps that are plain again
        with adding(() if model.checkpoints_blocks else parameters.maps, take):
            return _gradients(
                model,
                chunk,
                replay,
                objective,
                parameters,
                to_end,
                take,
                1.0,
                outside,
                keep_none,
                writes,
                compared,
            )
    random = random_state.capture(half)
    taken: list[tuple[Sequence[int], int]] = []

    def attempt(loss_scale: float) -> tuple[ChunkGradients, list[Tensor | None]]:
        random_state.restore(random)
        taken.clear()
        found: list[Any] = []

        def keep(indices: Sequence[int], gradients: Sequence[Any]) -> None:
            taken.append((indices, len(found)))
            found.extend(gradients)

        result = _gradients(
            model, chunk, replay, objective, parameters, to_end, keep, loss_scale, outside, keep_none, writes
        )
        return result, [*found, *(g for layer in result.to_start for g in layer), result.to_embeds]

    result, unscaled = scaled(attempt)
    for indices, first in taken:
        take(indices, unscaled[first : first + len(indices)])
    starts = iter(unscaled[len(unscaled) - 1 - sum(map(len, result.to_start)) : -1])
    to_start = [[next(starts) for _ in layer] for layer in result.to_start]
    return result._replace(to_start=to_start, to_embeds=unscaled[-1])


def _gradients(
    model: LanguageModel,
    chunk: Chunk,
    replay: Replay,
    objective: Objective,
    parameters: Parameters,
    to_end: ByState | None,
    take: Take,
    scale: float,
    outside: OutsideLeaves | None,
    keep_none: bool,
    writes: bool,
    compared: Callable[[], None] | None = None,
) -> ChunkGradients:
    embeds = chunk.embeds()
    with torch.enable_grad():
        if embeds is not None:
            embeds = embeds.detach().requires_grad_()
        # to a leaf no module may write
        bottom = chunk.embed(model, embeds.clone() if writes and embeds is not None else embeds)
        layers, exactly = replay(bottom)
        if compared is not None:
            compared()
        top = cut(residual(layers[-1].out))
        hidden = model.normalize(top.clone() if writes else top)
    if outside is not None:
        outside.look(
            Differentiated("the embedding", [bottom], [] if embeds is None else [embeds]),
            *(_differentiated(number, layer) for number, layer in enumerate(layers)),
            Differentiated("the final norm", [hidden], [top]),
        )
    states = [layer.replay.states for layer in layers]
    end = [tuple(detached(values) for values in layer.replay.end) for layer in layers]
    loss = torch.zeros((), device=hidden.device, dtype=wide(hidden.dtype))
    indices = parameters.reached(bottom, hidden)
    beside = [parameters.tensors[index] for index in indices]
    to_top: Tensor | None = None
    if chunk.predicts:
        loss, to_hidden, of_head = objective(model, chunk, hidden, parameters.tensors, scale, outside)
        take(range(len(of_head)), of_head)
        if to_hidden is not None:
            below = [top] if top.requires_grad else []  # a hook may detach it
            found = vjp([(hidden, to_hidden)], [*beside, *below])
            take(indices, found[: len(beside)])
            to_top = found[-1] if below else None
    if to_end is not None and scale != 1.0:
        to_end = [[None if g is None else g * scale for g in layer] for layer in to_end]
    to_bottom, to_start = pull_back(
        layers,
        parameters.tensors,
        parameters.of_layer,
        to_top,
        to_end,
        take,
        sharded=parameters.sharded,
        keep_none=keep_none,
    )
    to_embeds = None
    if to_bottom is not None:
        made = [] if embeds is None else [embeds]
        found = vjp([(bottom, to_bottom)], [*beside, *made])
        take(indices, found[: len(beside)])
        to_embeds = found[-1] if made else None
    if embeds is not None and to_embeds is None and not keep_none:
        to_embeds = torch.zeros_like(embeds)
    return ChunkGradients(loss, states, end, to_start, to_embeds, exactly)


def _differentiated(number: int, layer: LayerGraph) -> Differentiated:
    replay = layer.replay
    outputs, made = [*parts_of(layer.out), *flat(replay.end)], [*parts_of(layer.given), *flat(replay.start)]
    return Differentiated(f"layer {number}", outputs, made)
