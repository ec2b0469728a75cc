"""This rank's piece of a chunk whose tokens are split over the ranks of a context group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_rev.bptt.strategy import Chunk, LanguageModel, LossInputs
from rwkv_rev.cells.borders import Borders, mask_of
from rwkv_rev.cells.shared_chunk import SharedChunk
from rwkv_rev.distributed.shards import shared_with
from rwkv_rev.foreign.neftune import neftune_share
from rwkv_rev.loss import IGNORE
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.distributed.context_group import ContextGroup


@dataclass(frozen=True)
class Piece(Chunk):
    """A :class:`Chunk` of which this rank has ``own_length`` tokens; those behind the chunk's end do not count.

    ``start``, ``stop`` and ``length`` are the whole chunk's, ``predicts`` and so on are of it, too.
    """

    @property
    def group(self) -> "ContextGroup":
        assert self.inputs.group is not None
        return self.inputs.group

    @property
    def own_length(self) -> int:
        return -(-self.length // self.group.size)

    @property
    def planned_length(self) -> int:
        return self.length

    @cached_property
    def own(self) -> slice:
        """This rank's tokens that are there."""
        first = min(self.start + self.group.rank * self.own_length, self.stop)
        return slice(first, min(first + self.own_length, self.stop))

    def _filled(self, tensor: Tensor, value: int) -> Tensor:
        """Of a tensor [B, T, ...] this rank's tokens, with ``value`` in the place of those that are missing."""
        part = tensor[:, self.own]
        missing = self.own_length - part.shape[1]
        return F.pad(part, (*(0, 0) * (part.dim() - 2), 0, missing), value=value) if missing else part

    def mask(self) -> SharedChunk:
        inputs, size = self.inputs, self.own_length
        device = inputs.targets.device
        spread = self.group.size * size
        if self.is_full and spread == self.length:
            return SharedChunk(self.group, None, size)
        rows = inputs.targets.shape[0]
        if inputs.valid is None:
            valid = torch.ones(rows, self.length, dtype=torch.bool, device=device)
        else:
            valid = inputs.valid[:, self.start : self.stop]
        valid = F.pad(valid, (0, spread - self.length), value=False)
        there = self.own.stop - self.own.start
        known = None if self.is_full and there == size else valid.unflatten(1, (-1, size))[:, self.group.rank]
        if not self.has_borders:
            return SharedChunk.of(self.group, mask_of(known, None, device, size), valid, None, size)
        borders = inputs.borders
        assert borders is not None
        begins = F.pad(borders.at[:, self.start : self.stop], (0, spread - self.length), value=False)
        own = mask_of(known, self._borders(borders, begins), device, size)
        return SharedChunk.of(self.group, own, valid, begins.to(device), size, borders.starts)

    def _borders(self, borders: Borders, begins: Tensor) -> Borders:
        """Of this rank's tokens, on the host."""
        size = self.own_length
        valid = torch.ones_like(borders.at) if borders.valid is None else borders.valid
        at = begins.unflatten(1, (-1, size))[:, self.group.rank]
        return replace(borders, at=at, valid=self._filled(valid, False))

    def targets(self) -> Tensor:
        return self._filled(self.inputs.targets, IGNORE)

    def weights(self) -> Tensor | None:
        weights = self.inputs.weights
        return None if weights is None else self._filled(weights, 0)

    def embeds(self) -> Tensor | None:
        embeds = self.inputs.inputs_embeds
        if embeds is None:
            return None
        return self._filled(embeds, 0).clone(memory_format=torch.contiguous_format)

    def embed(self, model: LanguageModel, embeds: Tensor | None = None) -> Tensor:
        with neftune_share(model.get_input_embeddings(), self.own_length / self.inputs.length):
            return model.embed(self.ids(), embeds)

    def ids(self) -> Tensor | None:
        ids = self.inputs.input_ids
        return None if ids is None else self._filled(ids, 0)

    def read(self, model: LanguageModel, state: ModelState) -> tuple[Tensor, ModelState]:
        x, after = model.run(self.embed(model, self.embeds()), state, self.mask())
        return model.normalize(x), after

    def of_all(self, to_embeds: Tensor) -> Tensor:
        there = self.own.stop - self.own.start
        before = self.own.start - self.start
        return F.pad(to_embeds[:, :there], (0, 0, before, self.length - before - there))


def over_the_group(
    inputs: LossInputs, loss: Tensor, leaves: Sequence[Tensor], gradients: list
) -> tuple[Tensor, list]:
    """Loss and gradients of ``leaves`` over all ranks of the batch's context group, from this rank's share of them.

    Parts of a sharded block's gradient may be the mean over these ranks already.
    """
    group = inputs.group
    if group is None:
        return loss, gradients
    loss = group.add(loss.clone())
    if group.reduce_gradients:
        means = [group.ranks <= shared_with(leaf) for leaf in leaves]
        pairs = list(zip(gradients, means, strict=True))
        summed = iter(group.sums([gradient for gradient, is_mean in pairs if not is_mean]))
        return loss, [gradient * group.size if is_mean else next(summed) for gradient, is_mean in pairs]
    given = [*inputs.state.tensors(), *([] if inputs.inputs_embeds is None else [inputs.inputs_embeds])]
    own = {id(tensor) for tensor in given}
    places = [place for place, leaf in enumerate(leaves) if id(leaf) in own]
    found = [None if gradient is None else gradient * group.size for gradient in gradients]
    for place, total in zip(places, group.sums([gradients[place] for place in places]), strict=True):
        found[place] = total
    return loss, found
