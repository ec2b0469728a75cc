"""The second sweep: from the last chunk to the first, states back and gradients with them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.autograd.outside_leaves import OutsideLeaves
from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.bptt.chunk_gradients import ChunkGradients, chunk_gradients
from rwkv_rev.bptt.layers import ByState
from rwkv_rev.cells.block import ExactStates, FloatStates
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.loss import add_gradients
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rwkv_rev.bptt.runner import Runner
    from rwkv_rev.bptt.strategy import Chunk
    from rwkv_rev.bptt.sweep import Sweep

LIKELY_CAUSES = (
    "Likely causes: code inside the model that gives another result at each call (it draws from a generator of its "
    "own, counts calls, changes weights or buffers), inputs, a state or frozen weights that were overwritten before "
    "the gradient was taken, a non-deterministic kernel, another autocast. Try "
    "torch.use_deterministic_algorithms(True), or bptt='full', which computes everything once"
)


@dataclass
class SweepResult:
    """Loss, state after the last token, and gradients by parameters, the first state and the embeddings.

    ``refuse`` must be called before any of it is handed out: it waits for the device, and raises what
    :func:`backward_sweep` says.
    """

    loss: Tensor
    end: ModelState
    to_parameters: list[Tensor | None]
    to_first: ModelState
    to_embeds: Tensor | None
    refuse: Callable[[], None]


@dataclass
class Sums:
    """What the chunks add to, the last one first.

    Attributes:
        parameters: gradients, in float32 or wider; None where no chunk has one.
        loss: None before the first chunk.
        embeds: gradients by them, of each chunk; zeros where there is none.
        reaches_embeds: whether any chunk has one.
        checks: per chunk, [L] bool: which layers computed the same as in the first sweep.
        compare: :func:`comparison` of all of them, where that was started before the last gradients were.
    """

    parameters: list[Tensor | None]
    outside: OutsideLeaves
    loss: Tensor | None = None
    end: list[FloatStates] | None = None
    embeds: list[Tensor] = field(default_factory=list)
    reaches_embeds: bool = False
    checks: "list[tuple[int, Tensor]]" = field(default_factory=list)
    compare: Callable[[], None] | None = None

    def take(self, indices: "Sequence[int]", gradients: "Sequence[Tensor | WeightProduct | None]") -> None:
        """Add gradients of the parameters at ``indices``."""
        there = [pair for pair in zip(indices, gradients, strict=True) if pair[1] is not None]
        sums = add_gradients([self.parameters[index] for index, _ in there], [found for _, found in there])
        for (index, _), total in zip(there, sums, strict=True):
            self.parameters[index] = total

    def add(self, chunk: "Chunk", found: ChunkGradients) -> None:
        """Take everything else of a chunk."""
        self.loss = found.loss.clone() if self.loss is None else self.loss.add_(found.loss)
        if self.end is None:
            self.end = found.end
        embeds = chunk.embeds()
        if embeds is not None:
            self.reaches_embeds |= found.to_embeds is not None
            here = torch.zeros_like(embeds) if found.to_embeds is None else found.to_embeds
            self.embeds.append(chunk.of_all(here))
        if found.exactly is not None:
            self.checks.append((chunk.index, found.exactly))


def no_sums(sweep: "Sweep") -> Sums:
    """What the chunks of a sweep add to, before the first of them."""
    tensors = sweep.parameters.tensors
    whole = (
        [] if sweep.sharded is None else [t for block in sweep.sharded.blocks for t in block.leaves.values()]
    )
    return Sums([None] * len(tensors), OutsideLeaves([*tensors, *whole]))


def backward_sweep(
    sweep: "Sweep",
    runner: "Runner",
    states: list[ExactStates],
    gradient: ByState | None,
    sums: Sums | None = None,
) -> SweepResult:
    """Gradients of all chunks, from the last, whose exact ``states`` before it are given, to the first.

    ``gradient``: of a further objective, by the values of each layer's states after the last chunk; None without one.
    ``sums``: of other parts of the batch, to which loss and gradients of parameters are added; None where there are
    none.

    Raises:
        ReversalMismatchError: a layer did not compute the same in both sweeps. On a GPU by the result's ``refuse``.
        StrategyError: a tensor that is no parameter takes part; likewise.
    """
    sums = no_sums(sweep) if sums is None else sums
    sums.end, sums.embeds, sums.reaches_embeds = None, [], False
    following = None
    runner.begin(sums)
    for chunk in reversed(sweep.chunks):
        states, gradient = runner.differentiate(chunk, states, gradient, sums)
        if following is None:
            # whoever draws after this loss goes on from the last token, not from the first chunk
            following = random_state.capture(sweep.places)
        if sweep.device.type != "cuda":  # there once, at the end: no chunk waits for the one before
            comparison(sweep, sums)()
    compare = comparison(sweep, sums) if sums.compare is None else sums.compare
    if sweep.sharded is not None or sweep.inputs.group is not None:
        compare()  # before anything is exchanged
    if sweep.sharded is not None:
        sweep.sharded.wait_backwards(sums.take)
    runner.finish(sums)

    def refuse() -> None:
        compare()
        sums.outside.refuse()

    assert sums.loss is not None and sums.end is not None and gradient is not None and following is not None
    random_state.restore(following)
    kind = type(sweep.inputs.state)
    return SweepResult(
        sums.loss,
        kind.stack(sums.end),
        sums.parameters,
        _by_first(kind, gradient),
        torch.cat(sums.embeds[::-1], dim=1) if sums.reaches_embeds else None,
        refuse,
    )


def _by_first(kind: type[ModelState], gradient: ByState) -> Any:
    """The gradient by the state before the first chunk; None for tensors on which nothing depends in any layer."""
    names = [name for _, parts in kind.cells for name in parts]
    found = {}
    for name, layers in zip(names, zip(*gradient, strict=True), strict=True):
        there = next((g for g in layers if g is not None), None)
        found[name] = (
            None
            if there is None
            else torch.stack([torch.zeros_like(there) if g is None else g for g in layers])
        )
    return kind(**found)


def differentiate(
    sweep: "Sweep",
    chunk: "Chunk",
    states: list[ExactStates],
    record: list[list[Tensor]] | None,
    to_end: ByState | None,
    sums: Sums,
    *,
    recorded: bool = False,
) -> tuple[list[ExactStates], ByState]:
    """One chunk: exact states before it and gradients by their values; all else is added to ``sums``.

    ``recorded``: other chunks are run by recordings, which read and write the same tensors each time. They need a zero
    where a state has no gradient; so do ranks, which exchange gradients of all tensors.
    """
    strange = sweep.strangers
    alone = sweep.sharded is None and sweep.inputs.group is None
    look = strange.brings_tensors and (sums.end is None or strange.keeps)
    with sums.outside.naming(sweep.model):
        found = chunk_gradients(
            sweep.model,
            chunk,
            sweep.replayer(chunk, states, record),
            sweep.objective,
            sweep.parameters,
            to_end,
            sums.take,
            outside=sums.outside if look else None,
            half=sweep.places if sweep.half else None,
            keep_none=alone and not recorded,
            writes=strange.writes,
        )
    sums.add(chunk, found)
    return found.states, found.to_start


def _finite(states: list[FloatStates] | None) -> bool:
    tensors = [tensor for layer in states or () for values in layer for tensor in values]
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)


def comparison(sweep: "Sweep", sums: Sums) -> Callable[[], None]:
    """Take the checks off the list; what is returned looks at them, and waits for the device only then.

    A loss that is not finite is not looked into where the states at the end are not finite either: infinities and NaN
    have no bits to rely on, and the loss is conspicuous. From finite ones it was the second sweep that made it so.

    Raises:
        ReversalMismatchError: by what is returned, where a layer did not compute the same in both sweeps.
    """
    taken = sums.checks.copy()
    sums.checks.clear()
    same = start_copy(torch.cat([exactly for _, exactly in taken]).all()) if taken else None

    def look() -> None:
        if same is None or bool(same()) or sums.loss is None:
            return
        if not bool(sums.loss.isfinite()) and not _finite(sums.end):
            return
        for index, exactly in taken:
            if not exactly.all():
                layer, chunk = int((~exactly).nonzero()[0]), sweep.chunks[index]
                raise ReversalMismatchError(
                    f"layer {layer} computed other numbers for chunk {index} (tokens {chunk.start} to "
                    f"{chunk.stop - 1}) in the second sweep than in the first. {LIKELY_CAUSES}"
                )

    return look
