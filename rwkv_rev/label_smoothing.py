"""Label smoothing in transformers' Trainer, which makes this loss of logits itself.

Trainer shifts labels for models whose class it knows by name. A subclass is called otherwise, and so is a model that is
compiled, that FSDP2 shards, that has a parametrization or a module of somebody's own around it: these would learn to
give back the token that they read. And it knows neither masks nor documents: padding, holes and first tokens of
documents would be trained. Here the targets are those of the model's own loss.

Classes are known by name: a model may be older than a reload of this package, and then is of other classes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rwkv_rev.context_parallel import refuse_accelerates_ranks
from rwkv_rev.errors import ConfigError
from rwkv_rev.inputs import checked_labels, loss_targets, valid_tokens
from rwkv_rev.loss import IGNORE
from rwkv_rev.packed_rows import given_borders


def of_the_next_token(
    compute_loss: Callable[..., Any],
    trainer: Any,
    model: Any,
    inputs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``compute_loss`` of a trainer that smooths labels, at the targets of our models' own loss, whatever is around.

    ``shift_labels`` in a batch take the place of its labels, and are not shifted. Where nothing is predicted, the loss
    is 0.

    Raises:
        ConfigError: where logits [B, T, V] and labels [B, T] are not of the same tokens, or nobody can tell whether
            logits are of next tokens.
        StrategyError: for ``shift_labels`` on ranks of accelerate's that split a context.
        ValueError: for masks, borders and labels that the model refuses, too.
    """
    smoother = trainer.label_smoother
    if trainer.compute_loss_func is not None:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    inner = innermost(unwrapped(trainer, model))
    itself = is_a(inner, "RwkvRevForCausalLM")
    ours = [one for one in (inner if itself else model).modules() if is_a(one, "RwkvRevPreTrainedModel")]
    if not ours:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    for one in ours:
        one.was_called = itself and one is inner  # a subclass may have a forward of its own
    shifted = inputs.get("shift_labels") is not None
    if shifted:
        refuse_accelerates_ranks()
        inputs = dict(inputs)
        inputs["labels"] = inputs.pop("shift_labels")

    def smoothed(outputs: Any, labels: Tensor, **given: Any) -> Tensor:
        logits = _logits(outputs)
        if logits is not None and _of_next_tokens(outputs, logits, ours):
            labels = _checked(logits, labels, "shift_labels" if shifted else "labels")
            labels = targets(labels, inputs, shifted=shifted)
            given["shift_labels"] = False
            if not bool((labels != IGNORE).any()):
                given["num_items_in_batch"] = 1  # the smoother would divide 0 by 0
        return smoother(outputs, labels, **given)

    trainer.label_smoother = smoothed
    try:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    finally:
        trainer.label_smoother = smoother


def unwrapped(trainer: Any, model: Any) -> Any:
    """The model without what trainers and compilers put around it."""
    model = trainer.accelerator.unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def innermost(model: Any) -> Any:
    """The model that peft adapts, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_a(one: Any, name: str) -> bool:
    """Whether an object is of this package's class of that name, or of a subclass."""
    return any(
        kind.__name__ == name and kind.__module__.startswith("rwkv_rev.") for kind in type(one).__mro__
    )


def targets(labels: Tensor, inputs: dict[str, Any], *, shifted: bool) -> Tensor:
    """What each position predicts, [B, T] int64, of labels [B, T], as the loss of a model of ours would have it.

    Args:
        inputs: the model's keyword arguments, which may tell of masks and borders.
        shifted: whether labels say already what each position predicts.

    Raises:
        ValueError: for masks and borders that the model refuses, too.
    """
    batch, length = labels.shape
    valid = valid_tokens(inputs.get("attention_mask"), length, batch)
    at = given_borders(inputs, inputs.get("borders"), valid, batch, length)
    return loss_targets(labels.long(), valid, at, shifted=shifted)


def _logits(outputs: Any) -> Tensor | None:
    """Those that Trainer smooths, if there are any."""
    if isinstance(outputs, dict):
        found = outputs.get("logits")
    else:
        found = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    return found if isinstance(found, Tensor) else None


def _of_next_tokens(outputs: Any, logits: Tensor, ours: list[Any]) -> bool:
    """Whether logits are of next tokens, and not of tags, or of another model beside ours.

    Raises:
        ConfigError: for logits of our vocabulary that a module around made of hidden states: of which tokens is not
            known.
    """
    if is_a(outputs, "RwkvRevCausalLMOutput"):
        return True
    called = [one for one in ours if one.was_called and logits.shape[-1:] == (one.config.vocab_size,)]
    if any(is_a(one, "RwkvRevForCausalLM") for one in called):
        return True
    if called:
        raise ConfigError(
            "label_smoothing_factor cannot tell whether logits of the vocabulary that a module of your own makes of "
            "hidden states are of the next token: take RwkvRevForCausalLM and call the whole model in it, or give "
            "Trainer a compute_loss_func"
        )
    return False


def _checked(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    """Labels [B, T] of logits [B, T, V] as int64, each of them -100 or in the vocabulary."""
    if logits.shape[:-1] != labels.shape:
        raise ConfigError(
            f"label_smoothing_factor needs logits for each label, and there are logits {list(logits.shape)} "
            f"and {name} {list(labels.shape)}, as with the virtual tokens of peft's prompt learning, or with "
            "logits_to_keep in a batch: train with label_smoothing_factor=0, and leave logits_to_keep out"
        )
    labels, refuse = checked_labels(labels, logits.shape[-1], name)
    refuse()
    return labels
