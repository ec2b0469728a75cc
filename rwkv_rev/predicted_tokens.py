"""What transformers' Trainer divides a loss by: the predicted tokens of all batches of a step.

It counts labels that are not -100, from each row's second on, before a model sees them. The loss of our models predicts
no padding, no holes and no first tokens of documents, and the first token of a row that has virtual tokens before it:
the gradient would be too small or too large by a factor.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from rwkv_rev.label_smoothing import innermost, is_a, targets, unwrapped
from rwkv_rev.loss import IGNORE


def with_targets(trainer: Any, batches: list[Any]) -> list[Any]:
    """The batches with what is predicted in ``shift_labels``, which Trainer counts as they are.

    They are returned as they are for other models, also for one of somebody's own that has ours inside, and where the
    loss is somebody's own: ``compute_loss_func``, or a subclass's ``compute_loss``.

    Raises:
        ValueError: for masks and borders that the model refuses, too.
    """
    kind: Any = next(kind for kind in type(trainer).__mro__ if kind.__module__ == "transformers.trainer")
    own = getattr(trainer.compute_loss, "__func__", None) is not kind.compute_loss
    counts = trainer.model_accepts_loss_kwargs and trainer._loss_shifts_labels
    if own or trainer.compute_loss_func is not None or not counts:
        return batches
    model = unwrapped(trainer, trainer.model)
    if not is_a(innermost(model), "RwkvRevForCausalLM"):
        return batches
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return [_with_targets(batch, virtual=virtual) for batch in batches]


def _with_targets(batch: Any, *, virtual: bool) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    shifted = batch.get("shift_labels") is not None
    labels = batch.get("shift_labels" if shifted else "labels")
    tokens = batch.get("input_ids") if batch.get("inputs_embeds") is None else batch["inputs_embeds"]
    if not isinstance(labels, Tensor) or tokens is None or labels.shape != tokens.shape[:2]:
        return batch  # the model says what is wrong
    inputs = dict(batch)
    if virtual and not shifted:  # one of the virtual tokens is enough to predict the first that is read
        labels = pad(labels, (1, 0), value=IGNORE)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = pad(inputs["attention_mask"], (1, 0), value=1)
    return inputs | {"shift_labels": targets(labels, inputs, shifted=shifted)}
