"""Reading a context by a sharded model, without gradients, by FSDP2's own hooks, in step with other processes.

Each call gathers as often as it has pieces; processes whose contexts are shorter than others' go along.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rwkv_rev.distributed.shards import blocks_are_sharded, in_a_group, reshard
from rwkv_rev.distributed.taking_part import all_taking_part

Piece = tuple[int, int]


def go_along(model: Any, pieces: int) -> None:
    """Called before a base model is read in ``pieces``, without graph: takes part where other processes read more.

    Each process that shares the blocks must call this; where they are here whole it does nothing.
    """
    if blocks_are_sharded(model.blocks):
        from rwkv_rev.distributed.sharded_blocks import gather_for_others, most_of_all, units_outside

        for unit in units_outside(model):
            unit.unshard()
        gather_for_others(model.blocks, most_of_all(model.blocks, pieces) - pieces)


def go_along_with_calls(model: Any, calls: int) -> None:
    """The same before a base model is called so many times, each of which calls :func:`go_along` for itself."""
    if blocks_are_sharded(model.blocks):
        from rwkv_rev.distributed.sharded_blocks import most_of_all

        for _ in range(most_of_all(model.blocks, calls) - calls):
            go_along(model, 0)


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[bool]:
    """What is not a block, whole and without FSDP2's hooks inside, where it is sharded; blocks without hooks.

    Gives whether there was anything to do: modules hold other parameters then.
    """
    if not (in_a_group() and any(hasattr(p, "unshard") for module in modules for p in module.modules())):
        yield False
        return
    from rwkv_rev.distributed.sharded_blocks import unhooked, units_outside

    for module in modules:
        for unit in units_outside(module):
            unit.unshard()
    with unhooked(part for module in modules for part in module.modules()):
        yield True


@contextmanager
def reading(model: Any, pieces: Sequence[Piece]) -> Iterator[Iterable[Piece]]:
    """Around the pieces, (start, stop), in which a base model reads a context; gives them.

    With gradients there is one piece, and it is FSDP2's alone.
    """
    if torch.is_grad_enabled():
        reshard(model.blocks)
        with all_taking_part(model):
            yield pieces
    else:
        go_along(model, len(pieces))
        with gathered(model.embeddings, model.ln_out):
            yield _resharded(model, pieces)


def _resharded(model: Any, pieces: Sequence[Piece]) -> Iterator[Piece]:
    """What is gathered in a piece does not hang on what the one before has left whole."""
    for piece in pieces:
        reshard(model.blocks)
        yield piece
