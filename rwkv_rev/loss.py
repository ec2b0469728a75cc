"""Next-token cross-entropy that never holds [tokens, V] float32 logits at once.

The product with the head, the softmax and their gradients are made for one sub-chunk of tokens after another, at
most :data:`LOGITS_AT_ONCE` logits each, as fused linear cross-entropy losses do. Gradients are finished in the
forward pass and scaled by the incoming one in the backward pass, which a scalar loss allows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS_AT_ONCE = 2**26
"""Logits per sub-chunk: 256 MiB in float32."""

IGNORE = -100


def next_token_targets(labels: Tensor, valid: Tensor | None) -> Tensor:
    """What each position predicts: the label of the row's next *valid* token, [B, T] int64.

    Positions that are masked, or have no valid token after them, get -100, so padding and holes change nothing.

    Args:
        labels: [B, T] int64, -100 where nothing is to be predicted; not shifted.
        valid: [B, T] bool, or None when every token counts.
    """
    if valid is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    length = labels.shape[1]
    positions = torch.arange(length, device=labels.device).expand_as(labels)
    following = torch.where(valid, positions, length).flip(1).cummin(dim=1).values.flip(1)
    following = F.pad(following[:, 1:], (0, 1), value=length)
    padded = F.pad(labels, (0, 1), value=IGNORE)
    return padded.gather(1, following).masked_fill(~valid, IGNORE)


def sum_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, scale: float | Tensor = 1.0, vocab_size: int
) -> Tensor:
    """``scale`` times the summed cross-entropy of ``head(hidden)``, without graph; float32 scalar.

    Args:
        hidden: [B, C, D].
        targets: [B, C] int64, -100 where ignored.
    """
    total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
    with torch.no_grad():
        for part, target in _sub_chunks(hidden, targets, vocab_size):
            total += _cross_entropy(head(part), target)
    return total * scale


def cross_entropy_gradients(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    parameters: Sequence[Tensor],
    *,
    scale: float | Tensor,
    vocab_size: int,
    loss_scale: float = 1.0,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The loss of :func:`sum_cross_entropy` with its finished gradients.

    Args:
        parameters: the head's trainable parameters.
        loss_scale: further factor on the gradients alone, against underflow in float16.

    Returns:
        loss, d loss / d hidden [B, C, D], and d loss / d parameters (float32 sums).
    """
    total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
    hidden_gradients: list[Tensor] = []
    sums: list[Tensor | None] = [None] * len(parameters)
    for part, target in _sub_chunks(hidden.detach(), targets, vocab_size):
        part = part.requires_grad_()
        with torch.enable_grad():
            loss = _cross_entropy(head(part), target) * scale
            gradients = torch.autograd.grad(loss * loss_scale, [part, *parameters], allow_unused=True)
        total += loss.detach()
        hidden_gradients.append(torch.zeros_like(part) if gradients[0] is None else gradients[0])
        sums = add_gradients(sums, gradients[1:])
    return total, torch.cat(hidden_gradients).view_as(hidden), sums


def add_gradients(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add ``gradients`` to running sums kept in float32 or wider."""
    added: list[Tensor | None] = []
    totals, further = [], []
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is None:
            added.append(total)
        elif total is None:
            added.append(gradient.detach().to(_wide(gradient.dtype), copy=True))
        else:
            added.append(total)
            totals.append(total)
            further.append(gradient.detach())
    if totals:
        torch._foreach_add_(totals, further)  # in few launches where there are hundreds of parameters
    return added


class FinishedGradients(torch.autograd.Function):
    """A scalar whose gradients were computed along with it.

    ``FinishedGradients.apply(compute, *inputs)`` calls ``compute()``, which returns ``(loss, extras, gradients)``:
    the scalar, further outputs that carry no gradient, and one gradient (or None) per input. The backward pass
    scales and returns them, so hooks, accumulation and data-parallel reduction work as for any operation. Hooks on
    the inputs see the finished gradient alone, not the parts that it is computed from.
    """

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], tuple[Tensor, tuple[Tensor, ...], list]], *inputs: Tensor
    ) -> Any:
        with _hooks_withheld(inputs):
            loss, extras, gradients = compute()
        ctx.gradients = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        ctx.mark_non_differentiable(*extras)
        return (loss, *extras)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already used; call the model again")
        finished, ctx.gradients = ctx.gradients, None
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for found in finished:
            if found is not None:
                by_dtype.setdefault(found.dtype, []).append(found)
        for dtype, tensors in by_dtype.items():
            torch._foreach_mul_(tensors, gradient.to(dtype))  # in a few launches for all parameters
        return (None, *finished)


def linear_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, scale: float | Tensor, vocab_size: int
) -> Tensor:
    """Differentiable ``scale * sum of cross-entropies`` of ``head(hidden)``; see the module's docstring."""
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or parameters):
        return sum_cross_entropy(hidden, head, targets, scale=scale, vocab_size=vocab_size)

    def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
        loss, to_hidden, to_head = cross_entropy_gradients(
            hidden, head, targets, parameters, scale=scale, vocab_size=vocab_size
        )
        return loss, (), [to_hidden, *to_head]

    return FinishedGradients.apply(compute, hidden, *parameters)[0]


@contextmanager
def _hooks_withheld(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep hooks of ``tensors`` from being called by ``torch.autograd.grad``, which would apply them twice over."""
    withheld = [(hooks, dict(hooks)) for tensor in tensors if (hooks := tensor._backward_hooks)]
    for hooks, _ in withheld:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in withheld:
            hooks.update(kept)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, ignore_index=IGNORE, reduction="sum")


def _sub_chunks(hidden: Tensor, targets: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return list(zip(flat.split(size), targets.reshape(-1).split(size), strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
