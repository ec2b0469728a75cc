"""Label smoothing in transformers' Trainer, which makes this loss of logits itself.

Trainer shifts labels for models whose class it knows by name. A subclass is called otherwise, and so is a model that is
compiled, that FSDP2 shards, that has a parametrization or a module of somebody's own around it: these would learn to
give back the token that they read. And it knows neither masks nor documents: padding, holes and first tokens of
documents would be trained. Here the targets are those of the model's own loss.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rwkv_rev.context_parallel import refuse_accelerates_ranks
from rwkv_rev.errors import ConfigError
from rwkv_rev.inputs import loss_targets, valid_tokens
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.outputs import RwkvRevCausalLMOutput
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

    ``shift_labels`` in a batch take the place of its labels, and are not shifted.

    Raises:
        ConfigError: where logits [B, T, V] and labels [B, T] are not of the same tokens, or nobody can tell whether
            logits are of next tokens.
        StrategyError: for ``shift_labels`` on ranks of accelerate's that split a context.
        ValueError: for masks and borders that the model refuses, too.
    """
    smoother = trainer.label_smoother
    if trainer.compute_loss_func is not None:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    itself = isinstance(inner := _innermost(trainer, model), RwkvRevForCausalLM)
    ours = [inner] if itself else [one for one in model.modules() if isinstance(one, RwkvRevForCausalLM)]
    if not ours:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    for one in ours:
        one.was_called = itself  # a subclass may have a forward of its own
        one.base_model.was_called = False
    shifted = inputs.get("shift_labels") is not None
    if shifted:
        refuse_accelerates_ranks()
        inputs = dict(inputs)
        inputs["labels"] = inputs.pop("shift_labels")

    def smoothed(outputs: Any, labels: Tensor, **given: Any) -> Tensor:
        logits = _logits(outputs)
        if logits is not None and _of_next_tokens(outputs, logits, ours):
            labels = _targets(logits, labels, inputs, shifted=shifted)
            given["shift_labels"] = False
        return smoother(outputs, labels, **given)

    trainer.label_smoother = smoothed
    try:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    finally:
        trainer.label_smoother = smoother


def _innermost(trainer: Any, model: Any) -> Any:
    """The model without what trainers, compilers and peft put around it."""
    model = trainer.accelerator.unwrap_model(model)
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logits(outputs: Any) -> Tensor | None:
    """Those that Trainer smooths, if there are any."""
    if isinstance(outputs, dict):
        found = outputs.get("logits")
    else:
        found = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    return found if isinstance(found, Tensor) else None


def _of_next_tokens(outputs: Any, logits: Tensor, ours: list[RwkvRevForCausalLM]) -> bool:
    """Whether logits are of next tokens, and not of tags, or of another model beside ours.

    Raises:
        ConfigError: for logits of our vocabulary that a module around made of hidden states: of which tokens is not
            known.
    """
    if isinstance(outputs, RwkvRevCausalLMOutput):
        return True
    fitting = [one for one in ours if logits.shape[-1:] == (one.config.vocab_size,)]
    if any(one.was_called for one in fitting):
        return True
    if any(one.base_model.was_called for one in fitting):
        raise ConfigError(
            "label_smoothing_factor cannot tell whether logits of the vocabulary that a module of your own makes of "
            "hidden states are of the next token: call the whole model in it, or give Trainer a compute_loss_func"
        )
    return False


def _targets(logits: Tensor, labels: Tensor, inputs: dict[str, Any], *, shifted: bool) -> Tensor:
    """What each position predicts, [B, T], of labels [B, T], as the model's own loss would have it."""
    if logits.shape[:-1] != labels.shape:
        raise ConfigError(
            f"label_smoothing_factor needs a label for each token, and there are logits {list(logits.shape)} "
            f"and labels {list(labels.shape)}, as with the virtual tokens of peft's prompt learning: train "
            "with label_smoothing_factor=0"
        )
    batch, length = labels.shape
    valid = valid_tokens(inputs.get("attention_mask"), length, batch)
    at = given_borders(inputs, inputs.get("borders"), valid, batch, length)
    return loss_targets(labels.long(), valid, at, shifted=shifted)
