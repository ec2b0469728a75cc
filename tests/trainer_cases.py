"""One step of transformers' Trainer that is the gradient itself: what it is divided by shows there."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments


def one_step(
    model: nn.Module,
    rows: Any,
    folder: Path,
    *,
    kind: type[Trainer] = Trainer,
    more: Any = None,
    **settings: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step of a Trainer's, by plain SGD with a rate of 1.

    Args:
        more: keyword arguments of the Trainer; ``settings`` are those of its TrainingArguments.
    """
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made = kind(model, arguments, train_dataset=rows, **(more or {}))
    made.train()
    after = dict(model.named_parameters())
    return made.state.log_history[0]["loss"], {name: p - after[name].detach() for name, p in before.items()}
