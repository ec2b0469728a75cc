"""Parameters that one process's batch has no use for, where a model is sharded: they get a gradient of zero there.

FSDP2 reduces together, over the processes, the gradients of those parameters of a unit that have one. It does not look
whether they are the same ones everywhere: buffers of different sizes meet, or gradients of different parameters. What
takes part may hang on the batch (a tuned initial state where a row has no border, the embedding beside
``inputs_embeds``), on the active adapter, or on a block that is left out. So what does not take part is made to.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rwkv_rev.autograd.outside_leaves import leaves_of
from rwkv_rev.distributed.shards import in_a_group, in_units, is_sharded


@contextmanager
def all_taking_part(model: Any) -> Iterator[None]:
    """Around a forward pass of a base model with a graph, by FSDP2's own hooks.

    What the last norm is given has a graph to all trainable parameters of the base model and through all blocks, those
    too that another hook has left out, since FSDP2 gathers a block's weights when a gradient arrives.
    """
    units = [m for m in model.modules() if hasattr(m, "unshard")] if in_a_group() else []
    if not units or not torch.is_grad_enabled():
        yield
        return
    whole: dict[int, Tensor] = {}
    made: list[list[Tensor]] = []

    def note(module: nn.Module, *_: Any) -> None:
        whole.update((id(p), p) for p in module.parameters() if p.requires_grad and not is_sharded(p))

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        leaves = tree_leaves(output)
        made.append([t for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None])

    note(model)
    inside = {id(p) for p in model.blocks.parameters()}
    outside = [p for p in whole.values() if id(p) not in inside]
    hooks = [
        model.ln0.register_forward_hook(lambda _, __, x: taking_part(x, outside)),
        model.ln_out.register_forward_pre_hook(
            lambda _, given: (taking_part(given[0], [*whole.values(), *_left_out(given[0], made)]),)
        ),
    ]
    for unit in units:
        hooks.append(unit.register_forward_pre_hook(note))  # behind FSDP2's own
        hooks.append(unit.register_forward_hook(keep, prepend=True))  # before anybody replaces the output
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def for_the_head(model: Any, hidden: Tensor) -> Tensor:
    """Hidden states that the model's head reads, likewise with a graph to all that is trained in the head."""
    if not (torch.is_grad_enabled() and in_units(model)):
        return hidden
    return taking_part(hidden, (p for p in model.head.parameters() if p.requires_grad and not is_sharded(p)))


def taking_part(output: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """``output``, with a graph to those of the tensors to which it has none; their gradient by it is zero."""
    reached = {id(leaf) for leaf in leaves_of([output])}
    unused = [tensor for tensor in tensors if id(tensor) not in reached]
    return _WithZeros.apply(output, *unused) if unused else output


def _left_out(output: Tensor, made: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What units have made of which ``output`` was computed from nothing at all."""
    left = {id(tensor): tensor for outputs in made for tensor in outputs if tensor is not output}
    found: list[Tensor] = [output]
    while found:
        found = [t for leaf in leaves_of(found, left.values()) if (t := left.pop(id(leaf), None)) is not None]
    return [t for outputs in made if all(id(t) in left for t in outputs) for t in outputs]


def zeros_for_missing(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], parameters: Iterable[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``tensors``: zero for those among ``parameters`` that have none; of shards, this process's part."""
    among = {id(parameter) for parameter in parameters}
    return [
        torch.zeros_like(getattr(tensor, "_local_tensor", tensor)) if g is None and id(tensor) in among else g
        for g, tensor in zip(gradients, tensors, strict=True)
    ]


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *unused: Tensor) -> Tensor:
        ctx.like = [(one.shape, one.dtype, one.device) for one in unused]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # without memory: where nothing else arrives, autograd makes a tensor of it
        zeros = (
            torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like
        )
        return (gradient, *zeros)
