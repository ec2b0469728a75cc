"""``transformers.Trainer`` over our rows: its schedules, optimizer, checkpoints, logging and distributed launch.

What is added to it, and why:

- batches come from :class:`~rwkv_rev.training.batches.RowLoader`, already split over processes;
- the loss is summed and divided by the predicted tokens of *all* processes and accumulated batches (or by their
  weights, where an objective gives them some), so that two processes compute what one does with the doubled batch;
- ``carry_state``: the state that a slot's row ended in begins its next row, and lies in the checkpoints;
- a checkpoint is written beside its place, sealed with checksums and renamed into it: a folder called
  ``checkpoint-N`` was whole then;
- log rows gain tokens per second, tape bytes and memory;
- with ``tune = state``, checkpoints hold the tuned state alone;
- ``shard_optimizer``: each process keeps its share of the optimizer's state (:mod:`rwkv_rev.training.sharded`);
- ``shard_model``: and of weights and gradients (:mod:`rwkv_rev.training.sharded_model`), outside of accelerate's hands;
- ``context_parallel``: processes in groups of W share every row (:mod:`rwkv_rev.distributed`);
- evaluation is :func:`rwkv_rev.training.evaluate.evaluate_documents`, streaming, split over the processes; samples
  (:mod:`rwkv_rev.training.samples`) are taken after it;
- ``keep_best``: the checkpoint with the lowest held-out loss stays (:mod:`rwkv_rev.training.best`).

Resuming: the trainer counts the batches it has taken and skips as many (:func:`accelerate.skip_first_batches` reads
no row); random generators are restored after that.
"""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rwkv_rev.distributed.shards import is_sharded
from rwkv_rev.errors import CheckpointError
from rwkv_rev.state import ModelState
from rwkv_rev.training.batches import BatchOrder, RowLoader
from rwkv_rev.training.best import best_step, held_out_identity
from rwkv_rev.training.checkpoints import RUN_NAME, checkpoints, discard, seal, step_of
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.evaluate import evaluate_documents
from rwkv_rev.training.memory import MemoryInUse
from rwkv_rev.training.remains import foreign_in
from rwkv_rev.training.samples import Samples
from rwkv_rev.training.sharded import ShardedOptimizer, state_bytes
from rwkv_rev.training.sharded_model import (
    Sharded,
    apart,
    take_state,
    take_weights,
    whole_state,
    whole_weights,
)
from rwkv_rev.training.tensorboard import show
from rwkv_rev.training.token_store import TokenStore
from rwkv_rev.training.tuning import language_model
from rwkv_rev.training.working_folder import WRITING, refuse_foreign

CARRIED_NAME = "carried_state_{rank}.safetensors"
TUNED_NAME = "tuned_state.safetensors"


class RwkvRevTrainer(Trainer):
    """Trains ``model`` on the rows of ``order``; see the module's docstring.

    Args:
        model: the model, or peft's wrapper of it.
        args: from :func:`training_arguments`.
        order: this process's rows, step by step.
        config: of the run.
        identity: what a checkpoint must agree with to be resumed; saved in each.
        held_out: documents to evaluate on, with the bytes of every token id.
        samples: taken at every evaluation.
        callbacks: watchers of the run.
        memory: for the log.
        progress: tell on stderr how far an evaluation is.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        order: BatchOrder,
        config: FinetuneConfig,
        identity: dict[str, Any],
        held_out: tuple[TokenStore, Tensor] | None = None,
        samples: Samples | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        memory: MemoryInUse,
        progress: bool = False,
    ) -> None:
        self.memory = memory
        self.progress = progress
        self.order = order
        self.run = config
        self.identity = identity
        self.held_out = held_out
        self.samples = samples
        self.carried: ModelState | None = None
        self.report: dict[str, Any] = {}
        self.tokens = 0  # of all processes, in this run of the program
        self._since = (time.perf_counter(), 0)
        self._whole: dict[str, Tensor] | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=order.rows,
            eval_dataset=order.rows
            if held_out or samples
            else None,  # only tells that there is something to do
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # by num_items_in_batch, always
        self._last_saved = 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, but that warmup begins with the first step's share instead of with 0."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and isinstance(scheduler, LambdaLR):
            shapes = [_warmed(shape, warmup) for shape in scheduler.lr_lambdas]
            scheduler = self.lr_scheduler = LambdaLR(scheduler.optimizer, shapes)
        return scheduler

    # --- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        return RowLoader(self.order)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Predicted tokens of all processes in one optimizer step, or the sum of their weights; 1 where it is 0."""
        predicted = sum(_weight(batch) for batch in batch_samples)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batch_samples)
        counts = torch.tensor([predicted, tokens], dtype=torch.float64, device=device)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
            counts /= self.run.context_parallel  # a context that is shared is in each of its processes
        self.tokens += int(counts[1])
        return torch.where(counts[0] > 0, counts[0], 1)

    # --- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        continues = inputs.pop("continues", None)
        if continues is not None:
            inputs["state"] = self._start(continues)
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        if continues is not None:
            self.carried = output.state.detach()
        self._note(output.report or {})
        loss = output.loss
        if not self.run.shard_model and not (inputs["labels"] != -100).any():
            # Nothing predicted: data-parallel reduction still waits for a gradient of every parameter.
            parameters = [p for p in model.parameters() if p.requires_grad]
            loss = loss + sum((0.0 * p.sum() for p in parameters), torch.zeros_like(loss))
        # gradients are averaged over processes, the loss is already divided; of a shared context each process has as
        # many times its own as share it
        loss = loss * (self.args.world_size // self.run.context_parallel)
        return (loss, output) if return_outputs else loss

    def _start(self, continues: Tensor) -> ModelState:
        """The state each slot begins with: carried where its row continues a document, else initial."""
        fresh = apart(self.model, lambda: language_model(self.model).initial_state(len(continues)))
        if self.carried is None:
            return fresh
        chosen = [
            torch.where(continues.view(1, -1, *[1] * (new.dim() - 2)), old.to(new.device), new)
            for old, new in zip(self.carried.tensors(), fresh.tensors(), strict=True)
        ]
        return type(fresh)(*chosen)

    def _note(self, report: dict[str, Any]) -> None:
        tape = max(int(report.get("tape_bytes", 0)), int(self.report.get("tape_bytes", 0)))
        self.report = {**report, "tape_bytes": tape}

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # of sharded gradients older accelerates give a part
        return norm.full_tensor() if is_sharded(norm) else norm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only; decays, bonuses, mixes, norms and initial states keep their size."""
        return [n for n, p in model.named_parameters() if p.dim() == 2 and n.endswith(".weight")]

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if self.run.shard_model:
            return Sharded(model, self.accelerator.autocast)
        return super()._wrap_model(model, *args, **kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.run.shard_model:  # else it is there
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.run.shard_optimizer and self.args.world_size > 1:
            self.optimizer = optimizer = ShardedOptimizer(optimizer)
        return optimizer

    @property
    def optimizer_bytes(self) -> int:
        """State of the optimizer in this process."""
        return state_bytes(self.optimizer)

    # --- log ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            then, before = self._since
            logs["tokens_per_second"] = (self.tokens - before) / max(now - then, 1e-9)
            logs["tokens"] = self.tokens - before
            logs["seconds"] = now - then
            self._since = (now, self.tokens)
            logs["tape_bytes"] = self.report.get("tape_bytes", 0)
            logs["memory_bytes"] = self.memory.peak
            self.report = {}
        super().log(logs, start_time)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        began = time.perf_counter()
        result, metrics, step = None, {}, self.state.global_step
        if self.held_out is not None:
            store, token_bytes = self.held_out
            model = self.accelerator.unwrap_model(self.model)
            read = partial(
                evaluate_documents,
                context_length=self.run.context_length,
                batch_size=self.run.batch_size,
                max_tokens=self.run.eval_tokens,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                progress=self.progress,
            )
            result = apart(model, lambda: read(model, store, token_bytes))
            metrics = {
                f"{metric_key_prefix}_loss": result.total.nats_per_token,
                f"{metric_key_prefix}_bits_per_byte": result.total.bits_per_byte,
                f"{metric_key_prefix}_tokens": result.total.tokens,
            }
            self.log(dict(metrics))
        samples = [] if self.samples is None else self.samples.take(step, self.args.process_index == 0)
        show(self.callback_handler.callbacks, self.args, self.state, result, samples)
        self._since = (self._since[0] + time.perf_counter() - began, self._since[1])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none: written into a hidden folder by all processes, then renamed by the first."""
        began = time.perf_counter()
        root = self.run.working_directory
        hidden = root / WRITING
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        self._barrier()
        self.args.output_dir = str(hidden)
        # by every process, which transformers below 5.23 does not call `_save` in
        self._whole = whole_weights(self.model) if self.run.shard_model else None
        try:
            super()._save_checkpoint(model, trial)
            self._save_ours(hidden / name)
            self._barrier()
            if self.args.should_save:
                seal(hidden / name)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)  # a full disk gets its room back
            raise
        finally:
            self.args.output_dir, self._whole = str(root), None
        if self.args.should_save:
            if (root / name).exists():
                refuse_foreign(root)
                discard(root / name)  # damaged, or of a run resumed from an earlier one
            (hidden / name).rename(root / name)
            shutil.rmtree(hidden, ignore_errors=True)
            past = [path for path in checkpoints(root) if step_of(path) <= self.state.global_step]
            best = best_step(self.state.log_history) if self.run.keep_best else None
            for old in past[: -self.run.save_total]:
                if step_of(old) != best and not foreign_in(old):  # else somebody keeps something there
                    discard(old)
        self._barrier()
        self._since = (self._since[0] + time.perf_counter() - began, self._since[1])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.run.shard_model:
            state = whole_state(self.optimizer)
            if self.args.should_save and self.lr_scheduler is not None:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            return None
        sharded = getattr(self.optimizer, "optimizer", None)
        if not isinstance(sharded, ShardedOptimizer):
            return super()._save_optimizer_and_scheduler(output_dir)
        sharded.gather()
        super()._save_optimizer_and_scheduler(output_dir)
        sharded.release()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        sharded = isinstance(getattr(self.optimizer, "optimizer", None), ShardedOptimizer)
        # mapped, not read: the device gets this process's share alone
        in_parts = sharded or self.run.shard_model
        # the device of several processes on a CPU is called cpu:0, which torch does not load onto
        on_cpu = in_parts or self.args.world_size == 1 or self.args.device.type == "cpu"
        place, folder = "cpu" if on_cpu else self.args.device, Path(checkpoint)
        saved = torch.load(folder / OPTIMIZER_NAME, map_location=place, mmap=in_parts, weights_only=True)
        if self.run.shard_model:
            take_state(self.optimizer, saved)
        else:
            self.optimizer.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _save_ours(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.carried is not None:
            named = zip(self.carried.names(), self.carried.tensors(), strict=True)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in named}
            save_file(tensors, folder / CARRIED_NAME.format(rank=self.args.process_index))
        if self.args.should_save:
            run = {
                "identity": self.identity,
                "held_out": held_out_identity(self.run, self.held_out[0] if self.held_out else None),
                "world_size": self.args.world_size,
                "config": self.run.to_dict(),
            }
            (folder / RUN_NAME).write_text(json.dumps(run, indent=1), "utf-8")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.run.shard_model:
            state_dict = self._whole
        if self.run.tune != "state":
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return None
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        trained = state_dict or {
            n: p.detach().cpu().contiguous()
            for n, p in language_model(self.model).named_parameters()
            if p.requires_grad
        }
        save_file(trained, folder / TUNED_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.run.tune == "state" or self.run.shard_model:
            take_weights(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.order.rows.carry_state:
            path = folder / CARRIED_NAME.format(rank=self.args.process_index)
            if not path.is_file():
                raise CheckpointError(
                    f"{folder} has no carried state of process {self.args.process_index}; "
                    "resume with as many processes as it was saved by"
                )
            kind = language_model(self.model).config.architecture.state_kind
            self.carried = kind(**load_file(path))

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


def _weight(batch: dict[str, Tensor]) -> float:
    """What the predicted tokens of a batch weigh: 1 each where nothing else is said."""
    counts = batch["labels"][:, 1:] != -100
    if "loss_weights" not in batch:
        return float(counts.sum())
    return float(batch["loss_weights"][:, 1:][counts].sum(dtype=torch.float64))


def _warmed(shape: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """A factor of the learning rate by step, from 0, whose ``warmup`` steps each take the share of the next one."""
    return lambda step: shape(step + 1 if step < warmup else step)
