"""Next-token cross-entropy that never holds [tokens, V] float32 logits at once.

The product with the head, the softmax and their gradients are made for one sub-chunk after another, some tokens of
each row, at most :data:`LOGITS_AT_ONCE` logits, as fused linear cross-entropy losses do; of a head that might look at
positions for all tokens at once. Gradients are finished in the forward pass and scaled by the incoming one in the
backward pass, which a scalar loss allows. Where gradients flow in float16 they are computed times a *loss scale*,
lowered until they are finite.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.autograd.outside_leaves import OutsideLeaves, leaves_of
from rwkv_rev.autograd.stand_ins import StandIns
from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.autograd.withheld_hooks import hooks_withheld
from rwkv_rev.distributed.shards import placing

T = TypeVar("T")

LOGITS_AT_ONCE = 2**26
"""Logits per sub-chunk: 256 MiB in float32."""

SMALL = 2**16
"""Numbers up to which a gradient takes longer to launch than to add."""

IGNORE = -100

LARGEST_LOSS_SCALE = 2.0**15
SMALLEST_LOSS_SCALE = 2.0**-10


def next_token_targets(labels: Tensor, valid: Tensor | None) -> Tensor:
    """What each position predicts: the label of the row's next *valid* token, [B, T] int64.

    Positions that are masked, or have no valid token after them, get -100, so padding and holes change nothing.

    Args:
        labels: [B, T] int64, -100 where nothing is to be predicted; not shifted.
        valid: [B, T] bool, or None when every token counts.
    """
    return of_next_token(labels, valid, missing=IGNORE)


def of_next_token(values: Tensor, valid: Tensor | None, *, missing: float) -> Tensor:
    """What stands at the row's next *valid* token, [B, T]; ``missing`` at masked positions and where there is none."""
    if valid is None:
        return F.pad(values[:, 1:], (0, 1), value=missing)
    length = values.shape[1]
    positions = torch.arange(length, device=values.device).expand_as(values)
    following = torch.where(valid, positions, length).flip(1).cummin(dim=1).values.flip(1)
    following = F.pad(following[:, 1:], (0, 1), value=length)
    padded = F.pad(values, (0, 1), value=missing)
    return padded.gather(1, following).masked_fill(~valid, missing)


def sum_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    scale: float | Tensor = 1.0,
    vocab_size: int,
    weights: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """``scale`` times the summed cross-entropy of ``head(hidden)``, without graph; float32 scalar.

    Args:
        hidden: [B, C, D].
        targets: [B, C] int64, -100 where ignored.
        weights: [B, C], of each token's cross-entropy; None for 1.
        whole: whether the head sees all tokens in one call, as one that may look at positions has to.
    """
    total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
    with torch.no_grad():
        for part in sub_chunks(targets.shape, vocab_size, whole=whole):
            total += _sum(head(_handed(head, hidden[part].contiguous())), targets, weights, part)
    return total * like(scale, total)


def cross_entropy_gradients(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    parameters: Sequence[Tensor],
    *,
    scale: float | Tensor,
    vocab_size: int,
    loss_scale: float = 1.0,
    outside: OutsideLeaves | None = None,
    weights: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The loss of :func:`sum_cross_entropy` with its finished gradients.

    Args:
        parameters: trainable leaves, of which the head uses some.
        scale: factor of the loss.
        loss_scale: further factor on the gradients alone, against underflow in float16.
        outside: looks for leaves that are not among the parameters; without it each sub-chunk uses the same ones.
        weights, whole: as of :func:`sum_cross_entropy`.

    Returns:
        loss, d loss / d hidden [B, C, D], and d loss / d parameters (float32 sums).
    """
    total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    places = {id(parameter): index for index, parameter in enumerate(parameters)}
    used: list[int] = []
    scale = like(scale, total)
    hidden = hidden.detach()
    to_hidden = hidden.new_empty(hidden.shape)
    for number, place in enumerate(sub_chunks(targets.shape, vocab_size, whole=whole)):
        part = hidden[place].contiguous().requires_grad_()
        with torch.enable_grad():
            loss = _sum(head(_handed(head, part)), targets, weights, place) * scale
            if number == 0 or outside is not None:  # a head of others may use other ones for other tokens
                leaves = leaves_of([loss])
                used = list({places[id(leaf)]: None for leaf in leaves if id(leaf) in places})
                if outside is not None:
                    outside.note(leaves, [part], "the head")
            wanted = [part, *(parameters[index] for index in used)]
            gradients = torch.autograd.grad(loss * loss_scale, wanted, allow_unused=True)
        total += loss.detach()
        to_hidden[place] = 0 if gradients[0] is None else gradients[0]
        sums = add_gradients([of_parameters[index] for index in used], gradients[1:])
        for index, gradient in zip(used, sums, strict=True):
            of_parameters[index] = gradient
    return total, to_hidden, of_parameters


def add_gradients(
    sums: list[Tensor | None], gradients: Sequence[Tensor | WeightProduct | None]
) -> list[Tensor | None]:
    """Add ``gradients`` to running sums kept in float32 or wider."""
    added: list[Tensor | None] = []
    totals, further = [], []
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is None:
            added.append(total)
        elif isinstance(gradient, WeightProduct):
            added.append(gradient.add_to(total))
        elif total is None:
            added.append(gradient.detach().to(wide(gradient.dtype), copy=True))
        else:
            added.append(total)
            totals.append(total)
            further.append(gradient.detach() if gradient.requires_grad else gradient)
    _add(totals, further)
    return added


def _add(totals: list[Tensor], gradients: list[Tensor]) -> None:
    """In place; small gradients of another dtype are widened first: PyTorch adds lists of one dtype in one launch."""
    pairs = list(zip(totals, gradients, strict=True))
    small = [
        (total, gradient)
        for total, gradient in pairs
        if gradient.is_cuda and gradient.dtype != total.dtype and gradient.numel() <= SMALL
    ]
    if small:
        widened = [torch.empty_like(total) for total, _ in small]
        torch._foreach_copy_(widened, [gradient for _, gradient in small])
        torch._foreach_add_([total for total, _ in small], widened)
        taken = {id(total) for total, _ in small}
        pairs = [pair for pair in pairs if id(pair[0]) not in taken]
    if pairs:
        torch._foreach_add_([total for total, _ in pairs], [gradient for _, gradient in pairs])


def finished(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of ``tensors`` in the dtypes of these; those in float16 as they are.

    Float16 would lose small ones before the incoming gradient scales them.
    """
    half, pairs = torch.float16, list(zip(gradients, tensors, strict=True))
    return in_dtypes(gradients, [g.dtype if g is not None and t.dtype == half else t.dtype for g, t in pairs])


def in_dtypes(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Each gradient in its dtype; those that are not yet, in a few launches for all."""
    found = list(gradients)
    groups: dict[Any, list[int]] = {}
    for index, (gradient, dtype) in enumerate(zip(gradients, dtypes, strict=True)):
        if gradient is not None and gradient.dtype != dtype:
            groups.setdefault((gradient.dtype, dtype, gradient.device), []).append(index)
    for (_, dtype, _), places in groups.items():
        old = [gradient for index in places if (gradient := found[index]) is not None]
        new = [torch.empty_like(gradient, dtype=dtype) for gradient in old]
        torch._foreach_copy_(new, old)
        for index, gradient in zip(places, new, strict=True):
            found[index] = gradient
    return found


def sum_of(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be none."""
    if first is None or second is None:
        return first if second is None else second
    return first + second


class FinishedGradients(torch.autograd.Function):
    """A scalar whose gradients were computed along with it.

    ``FinishedGradients.apply(compute, *inputs)`` calls ``compute()``, which returns ``(loss, extras, gradients)``:
    the scalar, further outputs that carry no gradient, and one gradient (or None) per input. The backward pass
    scales and returns them, so hooks, accumulation and data-parallel reduction work as for any operation. Hooks on
    the inputs see the finished gradient alone, not the parts that it is computed from. Each input may be given once.
    """

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], tuple[Tensor, tuple[Tensor, ...], list]], *inputs: Tensor
    ) -> Any:
        with hooks_withheld(inputs):
            loss, extras, gradients = compute()
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.places = [placing(tensor) for tensor in inputs]
        ctx.gradients = finished(gradients, inputs)
        ctx.mark_non_differentiable(*extras)
        return (loss, *extras)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already used; call the model again")
        given, ctx.gradients = ctx.gradients, None
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for found in given:
            if found is not None:
                by_dtype.setdefault(found.dtype, []).append(found)
        for dtype, tensors in by_dtype.items():
            torch._foreach_mul_(tensors, gradient.to(dtype))  # in a few launches for all parameters
        found = zip(in_dtypes(given, ctx.dtypes), ctx.places, strict=True)
        return (None, *(g if g is None else place(g) for g, place in found))


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    scale: float | Tensor,
    vocab_size: int,
    parameters: Sequence[Tensor],
    weights: Tensor | None = None,
    model: nn.Module | None = None,
    whole: bool = False,
) -> Tensor:
    """Differentiable ``scale * sum of cross-entropies`` of ``head(hidden)``; see the module's docstring.

    Args:
        parameters: the model's trainable parameters, of which the head uses some.
        weights, whole: as of :func:`sum_cross_entropy`.
        model: whose modules hold them; the head alone when None.

    Raises:
        StrategyError: for a head that depends on a trainable tensor beside them.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or parameters):
        return sum_cross_entropy(
            hidden, head, targets, scale=scale, vocab_size=vocab_size, weights=weights, whole=whole
        )
    apart = StandIns(parameters)
    outside = OutsideLeaves(apart.leaves)

    def gradients(loss_scale: float) -> tuple[Tensor, list[Tensor | None]]:
        loss, to_hidden, to_parameters = cross_entropy_gradients(
            hidden,
            head,
            targets,
            apart.leaves,
            scale=scale,
            vocab_size=vocab_size,
            loss_scale=loss_scale,
            outside=outside,
            weights=weights,
            whole=whole,
        )
        return loss, [to_hidden, *to_parameters]

    def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
        with apart.within(head if model is None else model):
            loss, found = scaled(gradients) if dtype == torch.float16 else gradients(1.0)
        outside.refuse()
        return loss, (), found

    return FinishedGradients.apply(compute, hidden, *parameters)[0]


def scaled(
    gradients: Callable[[float], tuple[T, list[Tensor | None]]],
) -> tuple[T, list[Tensor | None]]:
    """``gradients(loss_scale)`` with the largest loss scale whose gradients are finite, taken out again in float32."""
    loss_scale = LARGEST_LOSS_SCALE
    while True:
        further, found = gradients(loss_scale)
        finite = [g.isfinite().all() for g in found if g is not None]
        if loss_scale <= SMALLEST_LOSS_SCALE or not finite or bool(torch.stack(finite).all()):
            return further, [None if g is None else g.to(wide(g.dtype)) / loss_scale for g in found]
        loss_scale /= 16


def like(scale: float | Tensor, total: Tensor) -> float | Tensor:
    """The factor in the precision of what it multiplies."""
    return scale.to(total) if isinstance(scale, Tensor) else scale


def cross_entropy(
    logits: Tensor, targets: Tensor, *, weights: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Nats of predictions, logits [n, V] of targets [n], in float32 at least: their sum, or [n] with ``none``.

    With ``weights`` [n] each is taken times its own.
    """
    logits = logits.to(wide(logits.dtype))
    if weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none") * weights
    return nats.sum() if reduction == "sum" else nats


def sub_chunks(shape: Sequence[int], vocab_size: int, *, whole: bool = False) -> list[tuple[slice, slice]]:
    """Rows and tokens whose logits are made at once, of [B, C]: all rows, unless one token of each is too much.

    ``whole``: everything in one.
    """
    rows, length = shape
    most = max(1, LOGITS_AT_ONCE // vocab_size)
    high, long = (rows, length) if whole else (min(rows, most), max(1, most // rows))
    return [
        (slice(row, row + high), slice(start, start + long))
        for start in range(0, length, long)
        for row in range(0, rows, high)
    ]


def _sum(logits: Tensor, targets: Tensor, weights: Tensor | None, place: tuple[slice, slice]) -> Tensor:
    """Nats of predictions, logits [b, n, V] of the targets at ``place``."""
    weight = None if weights is None else weights[place].reshape(-1)
    return cross_entropy(logits.flatten(0, -2), targets[place].reshape(-1), weights=weight)


def _handed(head: nn.Module, hidden: Tensor) -> Tensor:
    """What a head is handed: hooks and other modules than a linear map may write to it, and not to a leaf."""
    plain = type(head) in (nn.Linear, nn.Identity) and not head._forward_pre_hooks
    return hidden if plain else hidden.clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of losses and sums: float32, or float64 for float64; of complex numbers two of these."""
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32
