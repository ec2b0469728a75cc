"""What a model is given: masks, embeddings and everything a loss needs, checked before anything is computed."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from rwkv_rev.bptt import LossInputs
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.exporting import exporting, refuse_tracing
from rwkv_rev.keywords import given_targets, refuse_loss_function
from rwkv_rev.loss import IGNORE, next_token_targets
from rwkv_rev.loss_weights import check_divisor, weights_of_targets
from rwkv_rev.packed_rows import given_borders
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.state import ModelState


class Model(Protocol):
    """What the checks need of a model."""

    config: RwkvRevConfig

    def initial_state(self, batch_size: int, device: torch.device | None = None) -> ModelState: ...
    @property
    def base_model(self) -> Any: ...


def rows_and_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int, torch.device]:
    """B and T of the input, and where it is.

    Raises:
        ValueError: for none or two inputs, for one that is no [B, T] of ids or [B, T, D] of embeddings, and for one
            without rows or tokens.
    """
    refuse_tracing()
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    name, tokens = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{name} are a {type(tokens).__name__}: give a tensor (torch.tensor(...))")
    if tokens.dim() != (3 if input_ids is None else 2):
        wanted = "[B, T, D]" if input_ids is None else "[B, T]: one row is ids[None]"
        raise ValueError(f"{name} have shape {list(tokens.shape)}: give {wanted}")
    if input_ids is not None and tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids are {tokens.dtype}: give token ids, int64")
    batch, length = tokens.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"the input has {batch} rows of {length} tokens: give at least one of each")
    return batch, length, tokens.device


def embedded(embeddings: nn.Module, input_ids: Tensor | None) -> Tensor:
    """Embeddings [B, T, D] of ids [B, T].

    Raises:
        ValueError: on the CPU, for ids that the matrix has no row for; a GPU's kernel tells of them.
    """
    try:
        return cast(Tensor, embeddings(input_ids))
    except IndexError:
        rows = getattr(getattr(embeddings, "weight", None), "shape", (None,))[0]
        if rows is None or input_ids is None:
            raise
        least, most = map(int, torch.aminmax(input_ids))
        if least >= 0 and most < rows:
            raise
        raise ValueError(
            f"input_ids has {least if least < 0 else most}, and the vocabulary ids from 0 to {rows - 1}; a masked "
            "position needs one of them, too"
        ) from None


def valid_tokens(attention_mask: Tensor | None, length: int, batch: int | None = None) -> Tensor | None:
    """[B, T] bool, a copy, or None when every token counts; a mask longer than the input is read from its end.

    Raises:
        ValueError: for a mask that is shorter, has other rows, or other values than 0 and 1.
    """
    if attention_mask is None:
        return None
    fits = attention_mask.dim() == 2 and attention_mask.shape[1] >= length
    if not fits or (batch is not None and attention_mask.shape[0] != batch):
        rows = "B" if batch is None else batch
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [{rows}, T] with T at least {length}, "
            "the length of the input"
        )
    attention_mask = attention_mask[:, -length:]
    if exporting():
        return attention_mask.bool()
    valid = attention_mask.to(
        torch.bool, copy=True
    )  # of what is often a buffer that the next batch is written to
    if attention_mask.dtype == torch.bool:
        return None if bool(valid.all()) else valid
    known, whole = torch.stack(
        [(attention_mask == valid).all(), valid.all()]
    ).tolist()  # one look at the device
    if not known:
        raise ValueError(
            "attention_mask has other values than 1 (a token that counts) and 0 (one that does not): masks that are "
            "added to attention scores, or that number the documents in a row, mean nothing to a recurrent state"
        )
    return None if whole else valid


def masked_embeds(inputs_embeds: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """``inputs_embeds`` [B, T, D] with zeros at masked positions, whatever stands there."""
    if inputs_embeds is None or valid is None:
        return inputs_embeds
    return inputs_embeds.masked_fill(~valid[..., None], 0)


def loss_inputs(
    model: Model,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    state: ModelState | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: int | float | Tensor | None,
    final_state_gradient: ModelState | None,
    dtype: torch.dtype,
    borders: Tensor | None = None,
    packed: dict[str, Any] | None = None,
    loss_weights: Tensor | None = None,
) -> LossInputs:
    """Arguments of the model's ``forward`` as a gradient strategy takes them; ``dtype`` is the loss's.

    ``packed`` are its further keywords, which may tell of ``borders``, too.

    Raises:
        ValueError: for what does not fit the model or the other arguments; for labels that the vocabulary has not, by
            the result's ``refuse`` where they are on a GPU.
        StrategyError: for a ``loss_function`` of somebody's own, which would be without effect.
    """
    refuse_tracing(loss=True)
    refuse_loss_function(model)
    batch, length, device = rows_and_tokens(input_ids, inputs_embeds)
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    assert given is not None
    if given.shape != (batch, length):
        raise ValueError(
            f"{name} have shape {list(given.shape)}, the input {[batch, length]}: give each token its label"
        )
    given, refuse = checked_labels(given, model.config.vocab_size, name)
    if state is not None:
        check_state(model.config, state, batch)
    if final_state_gradient is not None:
        check_state(model.config, final_state_gradient, batch, "final_state_gradient")
        if any(tensor.requires_grad for tensor in final_state_gradient.tensors()):
            raise ValueError(
                "final_state_gradient requires a gradient, and the loss gives it none: hand over "
                "final_state_gradient.detach(), or give the state a loss of your own"
            )
    valid = valid_tokens(attention_mask, length, batch)
    at = given_borders(
        packed or {},
        borders,
        valid,
        batch,
        length,
        fresh=state is None,
        embedded=inputs_embeds is not None,
    )
    targets = loss_targets(given, valid, at, shifted=shift_labels is not None)
    weights = None
    if loss_weights is not None:
        weights = weights_of_targets(
            loss_weights,
            targets,
            valid,
            dtype,
            shifted=shift_labels is not None,
            divided=num_items_in_batch is not None,
        )
        targets = targets.masked_fill(weights == 0, IGNORE)  # no chunk computes what does not count
    divisor = _divisor(num_items_in_batch, targets, weights, dtype)
    if weights is not None:
        name = "the sum of loss_weights" if num_items_in_batch is None else "num_items_in_batch"
        check_divisor(divisor, dtype, name)
    return LossInputs(
        input_ids=input_ids,
        inputs_embeds=masked_embeds(inputs_embeds, valid),
        valid=valid,
        targets=targets,
        divisor=divisor,
        state=model.initial_state(batch, device) if state is None else state,
        final_state_gradient=final_state_gradient,
        borders=None if at is None else model.base_model.borders(at, valid),
        weights=weights,
        refuse=refuse,
    )


def loss_targets(labels: Tensor, valid: Tensor | None, at: Tensor | None, *, shifted: bool) -> Tensor:
    """What each position predicts, [B, T] int64, -100 for nothing: the same for every loss of labels.

    Args:
        labels: [B, T] int64, -100 where nothing is to be predicted.
        valid: [B, T] bool, or None where every token counts.
        at: borders [B, T] as :func:`given_borders` finds them. The first token of a document is predicted by nothing.
        shifted: whether labels say already what each position predicts; then they are taken as they are, but for masks.
    """
    if shifted:
        return given_targets(labels, valid)
    return next_token_targets(
        labels if at is None else labels.masked_fill(at.to(labels.device), IGNORE), valid
    )


def checked_labels(labels: Tensor, vocab_size: int, name: str) -> tuple[Tensor, Callable[[], None]]:
    """Labels of any shape as int64, and what refuses those that the vocabulary has not.

    Where labels are on the host, they are refused at once. It takes no tensors of the context's length where no label
    is missing.

    Raises:
        ValueError: for labels that are no whole numbers, or, also by what is returned, are no ids and not -100.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} are {labels.dtype}: give token ids, int64")
    labels = labels.long()
    bounds = start_copy(torch.stack(labels.aminmax()))

    def refuse() -> None:
        least, most = bounds().tolist()
        if least >= 0 and most < vocab_size:
            return
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"{name} hold {int(labels[wrong][0])}, the vocabulary has ids 0 to {vocab_size - 1}, and {IGNORE} "
                "stands for no label"
            )

    if not labels.is_cuda:
        refuse()
    return labels, refuse


def _divisor(
    number: int | float | Tensor | None, targets: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    if number is None and weights is not None:
        total = weights.sum()
        return torch.where(total > 0, total, 1)
    if number is None:
        # not a sum, which would make int64 of the flags first
        return torch.count_nonzero(targets != IGNORE).clamp(min=1).to(dtype)
    if isinstance(number, Tensor):
        if number.numel() != 1:
            raise ValueError(f"num_items_in_batch has {number.numel()} numbers: give one")
        if number.requires_grad:
            raise ValueError(
                "num_items_in_batch requires a gradient, and the loss gives it none: hand over "
                "num_items_in_batch.detach()"
            )
        if number.device.type != "cpu":  # not looked at: that would wait for the device
            return number.reshape(()).to(targets.device, dtype, copy=True)
        number = number.item()
    if not isinstance(number, Real):
        raise ValueError(f"num_items_in_batch is a {type(number).__name__}: give a number")
    if number == 0 and not bool((targets != IGNORE).any()):
        return 1.0  # nothing is predicted, here or in the rest of the batch
    if not 0 < number < math.inf:
        raise ValueError(f"num_items_in_batch = {number} must be above 0, and finite")
    check_divisor(number, dtype, "num_items_in_batch", weighted=weights is not None)
    return float(number)  # a fraction is a number, and no tensor is divided by it


def check_state(config: RwkvRevConfig, state: ModelState, batch: int, name: str = "the state") -> None:
    """Refuse a state that is none of such a model and batch: all that are given are looked at here.

    A state knows the architecture that made it, unless it was made by hand, or comes out of a trainer's list of
    tensors. One of the same architecture and other weights is taken. Its dtype may be another than the activations'.

    Raises:
        ValueError: for a state of another kind or architecture, with tensors of other shapes, or that are not
            floating-point numbers.
    """
    kind = config.architecture.state_kind
    if not isinstance(state, kind):
        raise ValueError(
            f"{name} is a {type(state).__name__}; this model's states are of the kind {kind.__name__}"
        )
    if state.made_by not in (None, config.rwkv_version):
        raise ValueError(
            f"{name} was made by a model of rwkv_version {state.made_by!r}, and this one's is {config.rwkv_version!r}: "
            "give one of its own"
        )
    for part, wanted in config.architecture.state_shapes(config, batch).items():
        tensor = getattr(state, part)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{part} of {name} is {what}: give floating-point numbers")
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{part} of {name} has shape {list(tensor.shape)}; this model and batch need {list(wanted)}: "
                f"{_difference(tensor, wanted)}"
            )


def _difference(tensor: Tensor, wanted: tuple[int, ...]) -> str:
    """What makes a shape another one, for people."""
    if tensor.dim() == len(wanted):
        if tensor.shape[0] != wanted[0]:
            return f"it is of {tensor.shape[0]} layers, the model has {wanted[0]}"
        if tensor.shape[1] != wanted[1]:
            return f"it is of {tensor.shape[1]} rows, the input has {wanted[1]}"
    return "it is of a model of other sizes"
