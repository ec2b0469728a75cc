"""Weights of tokens in the model's loss.

    loss = sum_t w_t nll_t / sum_t w_t

over the tokens that are predicted. A weight stands where the label stands that it weighs, and is shifted with it: w_t
belongs to token t, whose nll_t is computed from the tokens before it. Weights multiply the mask that -100 makes: where
no token is predicted, whatever stands there does not count, and a token of weight 0 is as one without a label.

Their sum, and what takes its place under ``num_items_in_batch``, must be numbers whose inverses and products with nats
the loss's dtype holds: between 1/s and s, with s the root of its largest number.
"""

import math

import torch
from torch import Tensor

from rwkv_rev.loss import IGNORE, of_next_token


def weights_of_targets(
    given: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    dtype: torch.dtype,
    *,
    shifted: bool,
    divided: bool = False,
) -> Tensor:
    """What each position's prediction weighs, [B, T] in ``dtype``; 0 where nothing is predicted.

    Args:
        given: [B, T], at the labels' places.
        targets: [B, T], what each position predicts, -100 where nothing.
        valid: [B, T] bool, or None when every token counts.
        dtype: the loss's.
        shifted: labels were given as ``shift_labels``, beside the positions that predict them.
        divided: the loss is divided by another number than their sum, of which others may be the larger part.

    Raises:
        ValueError: for another shape, sparse tensors, numbers that are no weights or too large in sum, and weights
            that want a gradient.
    """
    if not isinstance(given, Tensor) or given.shape != targets.shape:
        shape = list(given.shape) if isinstance(given, Tensor) else f"of a {type(given).__name__}"
        raise ValueError(
            f"loss_weights have shape {shape}, the labels {list(targets.shape)}: give each label its weight"
        )
    if given.layout != torch.strided:
        raise ValueError(f"loss_weights are {given.layout}: hand over loss_weights.to_dense()")
    if given.is_complex():
        raise ValueError(f"loss_weights are {given.dtype}: give real numbers")
    if given.requires_grad:
        raise ValueError(
            "loss_weights require a gradient, and the loss gives them none: hand over loss_weights.detach()"
        )

    def of_targets(values: Tensor) -> Tensor:
        values = values.to(targets.device, dtype)
        if not shifted:
            values = of_next_token(values, valid, missing=0)
        return values.masked_fill(targets == IGNORE, 0)

    weights = of_targets(given)
    wrong = ~((weights >= 0) & weights.isfinite())  # NaN is neither
    if bool(wrong.any()):
        raise ValueError(
            f"loss_weights hold {weights[wrong][0].item()} at a token that is predicted: a weight is a finite number "
            "from 0 on (0 leaves the token out of the loss)"
        )
    total = weights.sum()
    if bool(total > _root_of_largest(dtype)):
        raise _out_of_range("the sum of loss_weights", total, dtype)
    if not divided and bool(total == 0) and bool(of_targets(given > 0).any()):
        raise _out_of_range("the sum of loss_weights", total, dtype)
    return weights


def check_divisor(divisor: float | Tensor, dtype: torch.dtype, name: str, *, weighted: bool = True) -> None:
    """Refuse to divide the sum of nats, ``weighted`` or not, by what the loss's ``dtype`` has no inverse of.

    Raises:
        ValueError: for such a ``divisor``, called ``name``.
    """
    most = _root_of_largest(dtype)
    if not 1 / most <= float(divisor) <= most:
        raise _out_of_range(name, divisor, dtype, weighted)


def _root_of_largest(dtype: torch.dtype) -> float:
    return math.sqrt(torch.finfo(dtype).max)


def _out_of_range(what: str, number: float | Tensor, dtype: torch.dtype, weighted: bool = True) -> ValueError:
    most = _root_of_largest(dtype)
    advice = (
        ": divide loss_weights by the largest of them, and num_items_in_batch too where it is given"
        if weighted
        else ""
    )
    return ValueError(
        f"{what} is {float(number):.3g}, and a loss in {dtype} can be divided by {1 / most:.1e} to {most:.1e}{advice}"
    )


def refuse_without_labels(**given: object) -> None:
    """Refuse what changes a loss that nobody asks for, rather than leave it without effect.

    Raises:
        ValueError: for the first of ``given`` that is not None.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} changes the model's own loss: give labels, too (label_smoothing_factor and compute_loss_func "
                "of Trainer take the labels away: their loss is not the model's)"
            )
