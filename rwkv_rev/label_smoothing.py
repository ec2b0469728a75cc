"""Label smoothing in transformers' Trainer, which makes this loss of logits itself.

Trainer shifts labels for models whose class it knows by name. A subclass is called otherwise, and so is a model that is
compiled, that FSDP2 shards or that has a parametrization: these would learn to give back the token that they read.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rwkv_rev.context_parallel import refuse_accelerates_ranks
from rwkv_rev.errors import ConfigError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.outputs import RwkvRevCausalLMOutput


def of_the_next_token(
    compute_loss: Callable[..., Any],
    trainer: Any,
    model: Any,
    inputs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``compute_loss`` of a trainer that smooths labels, which are shifted for our models, whatever is around them.

    ``shift_labels`` in a batch take the place of its labels, and are not shifted.

    Raises:
        ConfigError: where logits [B, T, V] and labels [B, T] are not of the same tokens.
        StrategyError: for ``shift_labels`` on ranks of accelerate's that split a context.
    """
    smoother = trainer.label_smoother
    ours = any(isinstance(module, RwkvRevForCausalLM) for module in model.modules())
    if trainer.compute_loss_func is not None or not ours:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    shift = inputs.get("shift_labels") is None
    if not shift:
        refuse_accelerates_ranks()
        inputs = dict(inputs)
        inputs["labels"] = inputs.pop("shift_labels")

    def smoothed(outputs: Any, labels: Tensor, **given: Any) -> Tensor:
        if isinstance(outputs, (RwkvRevCausalLMOutput, tuple)):
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            if logits.shape[:-1] != labels.shape:
                raise ConfigError(
                    f"label_smoothing_factor needs a label for each token, and there are logits {list(logits.shape)} "
                    f"and labels {list(labels.shape)}, as with the virtual tokens of peft's prompt learning: train "
                    "with label_smoothing_factor=0"
                )
            given["shift_labels"] = shift
        return smoother(outputs, labels, **given)

    trainer.label_smoother = smoothed
    try:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    finally:
        trainer.label_smoother = smoother
