"""Label smoothing in transformers' Trainer, which makes this loss of logits itself.

Trainer shifts labels for models whose class it knows by name. A subclass is called otherwise, and so is a model that is
compiled, that FSDP2 shards or that has a parametrization: these would learn to give back the token that they read.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

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
    """``Trainer.compute_loss``, with labels shifted for our models, whatever is around them."""
    smoother = trainer.label_smoother
    if (
        smoother is None
        or trainer.compute_loss_func is not None
        or not any(isinstance(module, RwkvRevForCausalLM) for module in model.modules())
    ):
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    def smoothed(outputs: Any, labels: Tensor, **given: Any) -> Tensor:
        if isinstance(outputs, (RwkvRevCausalLMOutput, tuple)):
            given["shift_labels"] = True
        return smoother(outputs, labels, **given)

    trainer.label_smoother = smoothed
    try:
        return compute_loss(trainer, model, inputs, *args, **kwargs)
    finally:
        trainer.label_smoother = smoother
