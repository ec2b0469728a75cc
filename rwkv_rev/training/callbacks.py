"""What a run shows and writes down on its way: a progress bar, a JSONL log, a stop at a loss that is no number.

The bar goes to stderr; where that is no terminal, a line every half minute (:mod:`rwkv_rev.progress`). The log is
always written, one JSON object a line: rows with ``loss`` per logged step, rows with ``eval_loss`` per evaluation. A
resumed run drops the rows after the checkpoint it goes on from, so that each step stands in the log once.
"""

import json
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rwkv_rev.errors import CheckpointError, ConfigError, DataError
from rwkv_rev.json_text import finite
from rwkv_rev.progress import Progress

_REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def refuse_missing_reporter(name: str) -> None:
    """Raise ConfigError when the package that ``report_to = name`` needs is not installed."""
    packages = _REPORTERS.get(name, ())
    if packages and not any(find_spec(package) for package in packages):
        raise ConfigError(f"report_to = {name} needs a package: pip install {packages[0]}")


class Log(TrainerCallback):
    """Appends every row to ``path``; only the first process writes.

    A resumed run takes the rows up to its checkpoint from there, where checksums guard them, and tells ``notify`` if
    the log held others.
    """

    def __init__(self, path: Path, notify: Callable[[str], object] = lambda text: None) -> None:
        self.path = path
        self.notify = notify

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = [_row(logs, int(logs["step"])) for logs in state.log_history if _of_interest(logs)]
            there = [row for row in read_log(self.path) if row["step"] <= state.global_step]
            if state.global_step and there != kept:
                self.notify(
                    f"warning: {self.path.name} is not what was written; its rows are taken from checkpoint-"
                    f"{state.global_step}"
                )
            fresh = self.path.with_name(f".{self.path.name}")
            fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
            fresh.replace(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not _of_interest(logs):
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_row(logs, state.global_step)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _of_interest(logs: dict[str, Any]) -> bool:
    return "loss" in logs or "eval_loss" in logs


def _row(logs: dict[str, Any], step: int) -> dict[str, Any]:
    """A row of the log; a step that float16's loss scale skipped has no finite norm, and JSON no infinity."""
    return {"step": step} | finite({name: value for name, value in logs.items() if name != "step"})


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; what is none, as a last line cut short by a killed process, is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8", "replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class StopAtBadLoss(TrainerCallback):
    """Raises DataError at a loss that is not finite: nothing after it could be right, and no checkpoint holds it.

    CheckpointError where the model held NaN or infinity before the first step, which no setting of a run mends.
    """

    def __init__(self) -> None:
        self.broken: str | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Looks at the weights once: after a step by a loss that is NaN, all that are trained would be."""
        if state.global_step == 0 and model is not None:
            self.broken = next((name for name, one in model.named_parameters() if not _finite(one)), None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            if self.broken is not None:
                raise CheckpointError(
                    f"the loss is {logs['loss']} at step {state.global_step}: weights of the model held NaN or "
                    f"infinity before the first step ({self.broken}); take a checkpoint from before that"
                )
            raise DataError(
                f"the loss is {logs['loss']} at step {state.global_step}: lower --lr, lengthen --warmup or use "
                "--dtype float32; --resume auto goes on from the last checkpoint, if there is one"
            )


def _finite(parameter: Tensor) -> bool:
    """Of a sharded one this process's part."""
    return bool(getattr(parameter, "to_local", parameter.detach)().isfinite().all())


class NothingLeft(Exception):
    """Every step of a run had been trained before it was resumed."""


class StopWhenNothingIsLeft(TrainerCallback):
    """Raises :class:`NothingLeft` where a resumed run has all its steps: transformers would train one more."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise NothingLeft


class Bar(TrainerCallback):
    """Tells how far a run is, with loss, tokens per second, memory and tape."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._shown: Progress | None = None
        self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        wanted = not self.quiet and state.is_world_process_zero
        self._step = state.global_step
        self._shown = Progress(
            "fine-tuning", state.max_steps, "steps", done=self._step, wanted=wanted, scaled=False
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._shown is None or not logs:
            return
        if "loss" in logs:
            self._show(state, *describe(logs))
        elif "eval_loss" in logs:
            self._shown.say(
                f"step {state.global_step}: held-out {logs['eval_bits_per_byte']:.4f} bits per byte"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not control.should_log:  # else the row follows, with the loss of this step
            self._show(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Tell no more; also after an error, when the trainer calls nobody."""
        if self._shown is not None:
            self._shown.close()

    def _show(self, state: TrainerState, *facts: str) -> None:
        if self._shown is not None:
            self._shown.add(state.global_step - self._step, *facts)
            self._step = state.global_step


def describe(row: dict[str, Any]) -> list[str]:
    """A log row in a few words, the most important first."""
    parts = [f"loss {row['loss']:.4f}", f"{row.get('tokens_per_second', 0):,.0f} tokens/s"]
    for name, label in (("memory_bytes", "memory"), ("tape_bytes", "tape")):
        if row.get(name):
            parts.append(
                f"{label} {row[name] / 1e6:,.0f} MB"
                if row[name] >= 1e6
                else f"{label} {row[name] / 1e3:,.0f} kB"
            )
    return parts
