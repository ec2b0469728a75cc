"""The layer stack: the one place that walks the layers, in the plain forward pass, in both sweeps and in the checks.

In the backward sweep every block has a graph of its own, cut at its borders. Gradients are pulled back through one
block after another, from the top down: those of a block's parameters exist while the block is at hand, are taken at
once, and its graph is freed before the next one's gradients are made. A gradient at a border is a single tensor (one
each for the residual and what flows beside it), so the cut changes no bit of it.

Blocks are called as modules: hooks of users and of other tools are heard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.cells.block import (
    BlockAdvanced,
    BlockAgain,
    BlockForwards,
    BlockReplay,
    ExactStates,
    FloatStates,
    Plans,
    ResidualBlock,
    flat,
)
from rwkv_rev.cells.borders import Mask, of_part
from rwkv_rev.cells.contract import Stream, beside, joined, parts_of, residual
from rwkv_rev.cells.recomputation import checkpointed
from rwkv_rev.reversal.fingerprint import checksum

if TYPE_CHECKING:
    from rwkv_rev.distributed.sharded_blocks import ShardedBlock

Take = Callable[[Sequence[int], Sequence[Tensor | WeightProduct | None]], None]
"""Is given indices of parameters and a gradient for each, to be added to what there is."""

ByState = list[list[Any]]
"""Gradients by the tensors of each layer's states, in order: tensors, or None where there is none."""


def run_layers(
    blocks: Sequence[ResidualBlock],
    x: Tensor,
    states: Sequence[FloatStates],
    mask: Mask,
    *,
    recompute: bool = False,
    streams: list[Tensor] | None = None,
) -> tuple[Tensor, list[FloatStates]]:
    """All layers on x [B, C, D] by plain differentiable arithmetic: output and values of the states after it.

    ``recompute``: blocks that have a function to be computed again by are. ``streams`` collects every block's output.
    """
    after: list[FloatStates] = []
    stream: Stream = x
    for number, (block, state) in enumerate(zip(blocks, states, strict=True)):
        call: Callable[..., Any] = block
        if recompute and block.recompute is not None:
            call = partial(checkpointed, block.recompute, block)
        stream, values = call(stream, state, of_part(mask, number))
        after.append(values)
        if streams is not None:
            streams.append(residual(stream))
    return residual(stream), after


def each_layer(
    blocks: Sequence[ResidualBlock],
    x: Tensor,
    states: Sequence[FloatStates],
    call: Callable[[ResidualBlock, Stream, FloatStates], Stream],
) -> Iterator[Tensor]:
    """The residual [B, C, D] after each layer, which ``call`` computes when it is asked for: for checks.

    One stream is kept, where :func:`run_layers` collects all.
    """
    stream: Stream = x
    for block, state in zip(blocks, states, strict=True):
        stream = call(block, stream, state)
        yield residual(stream)


def advance_layers(
    blocks: Sequence[ResidualBlock],
    x: Tensor,
    states: Sequence[ExactStates],
    plans: Sequence[Plans],
    mask: Mask,
    *,
    whole_output: bool = True,
) -> list[BlockAdvanced]:
    """All layers of a chunk x [B, C, D] forwards, without graph.

    With ``whole_output`` the top layer's output is made, and its checksum put behind its print.
    """
    advanced: list[BlockAdvanced] = []
    stream: Stream = x
    for number, (block, state, plan) in enumerate(zip(blocks, states, plans, strict=True)):
        whole = whole_output or number < len(blocks) - 1
        stream, layer = block(stream, BlockForwards(state, plan, whole), of_part(mask, number))
        advanced.append(layer._replace(out=stream))  # what hooks on the block made of its output
    if whole_output:
        top = checksum(residual(stream))[None]
        advanced[-1] = advanced[-1]._replace(print=torch.cat([advanced[-1].print, top]))
    return advanced


def by_layer(state: Any, blocks: Sequence[ResidualBlock]) -> list[list[Tensor]]:
    """The tensors of a whole model's state, by layer."""
    return [flat(state.layer(index)) for index in range(len(blocks))]


@dataclass
class LayerGraph:
    """A block's chunk with a graph of its own: from ``given`` [B, C, D] and the leaves in ``replay`` to ``out``."""

    given: Stream
    out: Stream
    replay: BlockReplay


def replay_layers(
    blocks: Sequence[ResidualBlock],
    x: Tensor,
    ask: Callable[[int], BlockAgain],
    mask: Mask,
    *,
    copies: bool = False,
) -> list[LayerGraph]:
    """All layers of a chunk x [B, C, D] again, with graph where gradients are enabled; ``ask`` says how, by layer.

    ``copies``: blocks are handed copies, to which modules may write: to leaves of a graph they may not.
    """
    layers: list[LayerGraph] = []
    stream: Stream = x
    for number, block in enumerate(blocks):
        given = joined(cut(residual(stream)), tuple(map(cut, beside(stream))))
        handed = joined(*_copied(given)) if copies else given
        stream, replay = block(handed, ask(number), of_part(mask, number))
        layers.append(LayerGraph(given, stream, replay))
    return layers


def _copied(stream: Stream) -> tuple[Tensor, tuple[Tensor, ...]]:
    return residual(stream).clone(), tuple(tensor.clone() for tensor in beside(stream))


def cut(x: Tensor) -> Tensor:
    """The same values as a leaf of another graph."""
    return x.detach().requires_grad_(x.requires_grad)


def pull_back(
    layers: list[LayerGraph],
    parameters: Sequence[Tensor],
    of_layer: Sequence[Sequence[int]],
    to_out: Tensor | None,
    to_ends: ByState | None,
    take: Take,
    *,
    keep_none: bool = False,
    sharded: "Sequence[ShardedBlock] | None" = None,
) -> tuple[Tensor | None, ByState]:
    """Gradients from the top layer down to the input of the bottom one; ``layers`` is emptied.

    Args:
        parameters: of the whole model.
        of_layer: indices of those that each layer's graph may reach.
        to_out: gradient by the top layer's residual, or None.
        to_ends: gradients by the values of each layer's states after the chunk, or None.
        take: is given each block's parameter gradients as soon as they are there.
        keep_none: whether states that nothing depends on have None for a gradient, instead of zeros.
        sharded: the blocks, where they are sharded; of their parameters ``take`` is given this process's parts.

    Returns:
        The gradient by the input of layer 0 (None without one), and by the values of each layer's states before it.
    """
    to_starts: ByState = [[] for _ in layers]
    arriving: list[Tensor | None] = [to_out]  # what flows beside the residual at the top is for nobody
    while layers:
        layer = layers.pop()
        number = len(layers)
        starts, indices = flat(layer.replay.start), of_layer[number]
        outputs = zip(parts_of(layer.out), arriving, strict=False)
        pairs = [(out, gradient) for out, gradient in outputs if gradient is not None]
        if to_ends is not None:
            ends = zip(flat(layer.replay.end), to_ends[number], strict=True)
            pairs += [(end, gradient) for end, gradient in ends if gradient is not None]
        given = parts_of(layer.given)
        # not those of a layer for which code of others has turned gradients off
        made = [tensor for tensor in (*starts, *given) if tensor.requires_grad]
        if sharded is None:
            found = vjp(pairs, [*(parameters[index] for index in indices), *made])
            take(indices, found[: len(indices)])
        else:
            block = sharded[number]
            with block.at_hand():
                own = [block.leaves.get(index, parameters[index]) for index in indices]
                found = vjp(pairs, [*own, *made])
            take(indices, block.reduced(indices, found[: len(indices)]))
        of_made = iter(found[len(indices) :])
        by_start = [next(of_made) if start.requires_grad else None for start in starts]
        # copies: a gradient may be a view of one of the chunk's length, which would stay in memory with it
        to_starts[number] = [
            g.clone() if g is not None else None if keep_none else torch.zeros_like(start)
            for start, g in zip(starts, by_start, strict=True)
        ]
        arriving = [next(of_made) if tensor.requires_grad else None for tensor in given]
    return arriving[0], to_starts


def vjp(pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients by ``wanted`` of outputs, each paired with the gradient that arrives at it."""
    pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    outputs = [output for output, _ in pairs]
    arriving = [gradient.to(output.dtype) for output, gradient in pairs]
    return list(torch.autograd.grad(outputs, wanted, arriving, allow_unused=True))
