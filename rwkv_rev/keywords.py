"""What trainers and collators hand to any model, as far as it would change what this one computes.

A model that takes ``**kwargs`` swallows keyword arguments. ``shift_labels`` is given its meaning, and so is what tells
of several documents in one row (:mod:`rwkv_rev.packed_rows`); what would be without effect is refused.
"""

import difflib
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from rwkv_rev.errors import StrategyError
from rwkv_rev.loss import IGNORE
from rwkv_rev.packed_rows import PACKING

_TAKEN = (
    *PACKING,
    "cache_position",
    "output_attentions",
    "use_cache",
)
"""What others hand to any model: what packs rows is read, the rest has no effect (``output_attentions`` if False)."""
WITH_A_HEAD = (
    "labels",
    "shift_labels",
    "logits_to_keep",
    "return_logits",
    "num_items_in_batch",
    "loss_weights",
    "final_state_gradient",
)
"""What the model with an output layer has a name for, and the base model none."""


def refuse_unknown_keywords(kwargs: dict[str, Any], model: type[nn.Module]) -> None:
    """Refuse keyword arguments that the model has no name for, rather than leave them without effect.

    Args:
        model: class of the model that was called.

    Raises:
        TypeError: naming the first one. What is None may have any name.
        ValueError: for attentions, which there are none of.
    """
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: this model has no attention, and so no weights of it")
    for name, value in kwargs.items():
        if value is not None and name not in _TAKEN:
            raise TypeError(
                f"forward() got an unexpected keyword argument {name!r}, which would be without effect; "
                f"{_what_there_is(name, model)}"
            )


def _what_there_is(name: str, model: type[nn.Module]) -> str:
    """The nearest keyword to one that there is not, or all of them."""
    takes = [
        known for known in inspect.signature(model.forward).parameters if known not in ("self", "kwargs")
    ]
    has_head = WITH_A_HEAD[0] in takes
    if name in WITH_A_HEAD and not has_head:
        return "the model with an output layer takes it, RwkvRevForCausalLM"
    takes += [known for known in WITH_A_HEAD if has_head and known not in takes]
    near = difflib.get_close_matches(name, takes, n=1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(takes)}"


def refuse_replica(model: nn.Module) -> None:
    """Refuse a copy that ``torch.nn.DataParallel`` made, which has no parameters of its own.

    Raises:
        StrategyError: for such a copy.
    """
    if getattr(model, "_is_replica", False):
        raise StrategyError(
            "torch.nn.DataParallel, which Trainer uses when it sees several GPUs, makes copies without parameters: "
            "start one process per GPU (torchrun, accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def refuse_loss_function(model: Any) -> None:
    """Refuse a loss function of somebody's own, which transformers' models call and this one does not.

    Raises:
        StrategyError: for one on the model or in a subclass that is not transformers' own.
    """
    if not isinstance(model, PreTrainedModel):
        return
    if type(model).loss_function is PreTrainedModel.loss_function:
        given = getattr(model, "_loss_function", None)
        if given is None or given is ForCausalLMLoss:
            return
    raise StrategyError(
        "model.loss_function would be without effect: the loss of labels is the cross-entropy of the next token. Call "
        "the model without labels and compute the loss of its logits, or give the cross-entropies loss_weights"
    )


def given_targets(shift_labels: Tensor, valid: Tensor | None) -> Tensor:
    """What each position predicts where that is given: [B, T] int64, a copy, -100 at masked positions."""
    return shift_labels.clone() if valid is None else shift_labels.masked_fill(~valid, IGNORE)
