"""The lowest held-out loss: which step has it (``keep_best``), and when to stop waiting for a lower one (``patience``).

Both are told by the rows of evaluations in the trainer's log, which lies in every checkpoint: a resumed run knows the
best step so far and how many evaluations have gone by since. transformers' ``EarlyStoppingCallback`` forgets its count
then, and its ``load_best_model_at_end`` knows only evaluations that ``save_every`` happens to meet. The evaluation
before the first step is no candidate: there is no checkpoint of it, and a warmup may well begin with a higher loss.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rwkv_rev.errors import CheckpointError
from rwkv_rev.training.callbacks import NothingLeft
from rwkv_rev.training.checkpoints import PREFIX, RUN_NAME, damage, step_of
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.identity import refuse_other_run
from rwkv_rev.training.token_store import TokenStore

Rows = Iterable[Mapping[str, Any]]


def held_out_losses(rows: Rows) -> dict[int, float]:
    """Held-out loss in nats per token by step from 1, in the order of the log; what is no number is infinite."""
    found = {row.get("step", 0): row["eval_loss"] for row in rows if "eval_loss" in row}
    return {
        step: math.inf if loss is None or math.isnan(loss) else loss for step, loss in found.items() if step
    }


def best_step(rows: Rows) -> int | None:
    """The first step with the lowest held-out loss; None before the first evaluation."""
    return next(iter(_best_first(rows)), None)


def _best_first(rows: Rows) -> list[int]:
    """Steps with a finite held-out loss, the lowest first; of equal ones the earlier."""
    losses = {step: loss for step, loss in held_out_losses(rows).items() if math.isfinite(loss)}
    return sorted(losses, key=lambda step: losses[step])


def without_improvement(rows: Rows, min_delta: float = 0.0) -> tuple[int, int | None]:
    """How many evaluations have gone by since the loss last fell by more than ``min_delta``, and the step of that."""
    since, last, lowest = 0, None, math.inf
    for step, loss in held_out_losses(rows).items():
        if loss < lowest - min_delta:
            since, last, lowest = 0, step, loss
        else:
            since += 1
    return since, last


def never_better(rows: Rows) -> str | None:
    """Where no step had a lower held-out loss than the model before the first one, a line that says so; else None."""
    before = [row["eval_loss"] for row in rows if "eval_loss" in row and row.get("step", 0) == 0]
    best, losses = best_step(rows), held_out_losses(rows)
    if not before or before[0] is None or best is None or losses[best] < before[0]:
        return None
    return (
        f"no step was better than the beginning: the held-out loss was {before[0]:.4f} before the first step and "
        f"{losses[best]:.4f} after step {best}, the lowest since; the model that the run began with is better"
    )


class KeepBest(TrainerCallback):
    """Has a checkpoint written wherever the held-out loss is lower than ever before."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if best_step(state.log_history) == state.global_step:
            control.should_save = True


class Patience(TrainerCallback):
    """Ends a run after so many evaluations without improvement, with a checkpoint where ``save`` wants them.

    Args:
        evaluations: to wait. min_delta: nats per token by which a loss must fall to be an improvement.
        save: whether the run saves checkpoints.
        notify: takes the line that says why.
    """

    def __init__(
        self, evaluations: int, min_delta: float, save: bool, notify: Callable[[str], object]
    ) -> None:
        self.evaluations, self.min_delta, self.save, self.notify = evaluations, min_delta, save, notify

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self._is_over(state):
            control.should_training_stop = True
            control.should_save = control.should_save or self.save

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that is resumed after it had stopped has nothing left to train."""
        if state.global_step < state.max_steps and self._is_over(state):
            raise NothingLeft

    def _is_over(self, state: TrainerState) -> bool:
        since, last = without_improvement(state.log_history, self.min_delta)
        if since < self.evaluations:
            return False
        if state.is_world_process_zero:
            what = "evaluation" if since == 1 else "evaluations"
            self.notify(
                f"stopping after step {state.global_step} of {state.max_steps}: no lower held-out loss in {since} "
                f"{what}" + (f" since step {last}" if last is not None else "")
            )
        return True


def best_checkpoint(
    rows: Rows, step: int, working: Path, resumed: Path | None, identity: dict[str, Any]
) -> tuple[int, Path | None, str | None]:
    """The step whose weights a run with ``keep_best`` ends with, where they lie (None: in the model), and a warning.

    Args:
        rows: of the log. step: the model's.
        working: folder of this run's checkpoints.
        resumed: the checkpoint that it went on from; those before lie beside that.
        identity: of the run.
    """
    warning = None
    for at in _best_first(rows):
        if at == step:
            return step, None, warning
        before = resumed is not None and at <= step_of(resumed)
        path = (resumed.parent if resumed is not None and before else working) / f"{PREFIX}-{at}"
        wrong = _unusable(path, identity)
        if wrong is None:
            return at, path, warning
        warning = warning or (
            f"step {at} has the lowest held-out loss, but {path} {wrong}; the best of what is there is kept"
        )
    return step, None, warning


def _unusable(path: Path, identity: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None for a whole one of this run."""
    if not path.is_dir():
        return "is not there"
    if (wrong := damage(path)) is not None:
        return f"is damaged: {wrong}"
    try:
        refuse_other_run(path, json.loads(json.dumps(identity)))
    except CheckpointError:
        return "is of another run"
    return None


def held_out_identity(config: FinetuneConfig, held_out: TokenStore | None) -> dict[str, Any] | None:
    """What held-out losses depend on beside the weights and the run's identity; None without a held-out text."""
    if held_out is None:
        return None
    return {"data": held_out.fingerprint, "tokens": config.eval_tokens}


def refuse_other_evaluations(checkpoint: Path, held_out: dict[str, Any] | None) -> None:
    """Raise CheckpointError where the losses in a checkpoint are of another held-out text than this run's."""
    saved = json.loads((checkpoint / RUN_NAME).read_text("utf-8")).get("held_out")
    if saved is not None and saved != held_out:
        raise CheckpointError(
            f"{checkpoint} has held-out losses of another --eval-data or eval_tokens, which --keep-best and --patience "
            "cannot compare with this run's; give the held-out data as it was, or leave both options out"
        )
