"""Gradients of weights that are multiplied straight into their float32 sums.

By itself autograd makes the gradient of a bfloat16 weight in bfloat16, and the sweep adds it to a float32 sum: in short
chunks a tenth of a step, and a rounding for each chunk. A product of two bfloat16 matrices can be added to a float32
matrix by the product itself (CUDA; PyTorch's ``addmm`` with ``out_dtype``), so inside :func:`adding` linear maps do
that, and autograd is told that there is nothing left to return.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.distributed.shards import is_sharded

Add = Callable[[Sequence[int], Sequence[WeightProduct]], None]
"""Is given the index of a parameter and its gradient, to be added to what there is."""


def plain_maps(model: nn.Module, places: dict[int, int]) -> list[tuple[nn.Linear, int]]:
    """The linear maps whose weights' gradients can be added so, and the indices of these by ``places`` of their ids.

    Bfloat16 on a CUDA device alone: float16 needs a loss scale, and float32 no other sum. Nothing but plain maps: what
    other tools have made of one computes its gradient itself.
    """
    found: list[tuple[nn.Linear, int]] = []
    for module in model.modules():
        if type(module) is not nn.Linear or "forward" in vars(module):  # no map, or another tool's own
            continue
        weight = module.weight
        if id(weight) in places and module.bias is None and _adds(weight):
            found.append((module, places[id(weight)]))
    return found


def _adds(weight: Tensor) -> bool:
    """Whether PyTorch adds products of such matrices to a float32 one."""
    sharded = is_sharded(weight)
    return (
        weight.is_cuda
        and not sharded
        and weight.dtype == torch.bfloat16
        and hasattr(torch.ops.aten.addmm, "dtype_out")
    )


@contextmanager
def adding(maps: Sequence[tuple[nn.Linear, int]], add: Add) -> Iterator[None]:
    """Graphs made inside hand the gradients of these maps' weights to ``add`` when they are differentiated."""
    if torch.is_autocast_enabled("cuda"):
        maps = ()
    this_thread = threading.get_ident()
    try:
        for module, index in maps:
            module.forward = partial(_linear, module, index, add, this_thread)  # type: ignore[method-assign]
        yield
    finally:
        for module, _ in maps:
            vars(module).pop("forward", None)


def _linear(module: nn.Linear, index: int, add: Add, thread: int, x: Tensor) -> Tensor:
    if threading.get_ident() != thread:  # a forward pass of somebody else, with a gradient of its own
        return F.linear(x, module.weight)
    if x.dtype != module.weight.dtype or not module.weight.requires_grad or not torch.is_grad_enabled():
        return F.linear(x, module.weight)
    return _Linear.apply(x, module.weight, index, add)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: int, add: Add) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.index, ctx.add = index, add
        return F.linear(x, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.add([ctx.index], [WeightProduct(gradient.flatten(0, -2), x.flatten(0, -2))])
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None, None
