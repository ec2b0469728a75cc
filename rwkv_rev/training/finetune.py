"""Fine-tune a converted model: from a configuration to a model folder, whole or not at all.

:func:`~rwkv_rev.training.planning.plan` finds out everything that can be known before the first step; :func:`run`
trains. Checkpoints and the log lie in ``OUTPUT.training`` meanwhile; ``OUTPUT`` appears at the end by a rename and
``OUTPUT.training`` goes.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerState, set_seed

from rwkv_rev.arguments import check_kinds, checked
from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.chunk_length import shortest_of_all
from rwkv_rev.folders.publish import publish
from rwkv_rev.loading import load_model, load_quantised
from rwkv_rev.training.best import KeepBest, Patience, best_checkpoint, best_step, never_better
from rwkv_rev.training.callbacks import Bar, Log, NothingLeft, StopAtBadLoss, StopWhenNothingIsLeft, read_log
from rwkv_rev.training.checkpoints import step_of
from rwkv_rev.training.config import FinetuneConfig, build_config
from rwkv_rev.training.evaluate import count_token_bytes
from rwkv_rev.training.launch import first_process, share_contexts
from rwkv_rev.training.memory import MemoryInUse
from rwkv_rev.training.planning import Plan, plan
from rwkv_rev.training.samples import SAMPLES_NAME, Samples, run_tokenizer
from rwkv_rev.training.saving import HISTORY, save_finetuned
from rwkv_rev.training.sharded_model import shard, whole_weights
from rwkv_rev.training.shortage import Whereabouts, told_in_one_line
from rwkv_rev.training.trainer import RwkvRevTrainer
from rwkv_rev.training.training_arguments import training_arguments
from rwkv_rev.training.tuning import apply_tuning, count_parameters
from rwkv_rev.training.working_folder import LOG_NAME, empty, lock, named, remove, sweep

__all__ = ["FinetuneResult", "Plan", "plan", "run"]
Notify = Callable[[str], object]
Sources = str | Path | Sequence[str | Path]


@dataclass
class FinetuneResult:
    """What a run did. Losses in nats per token; ``held_out`` bits per byte before and after, where there is any.

    ``steps`` of ``planned_steps`` were trained, all on the same rows with ``same_rows``; ``best_step`` is the one whose
    weights ``output`` holds, with ``keep_best``; ``samples`` the file of samples, where there were prompts.
    ``adapter_only``: whether ``output`` holds the low-rank additions, to be used with the model they were trained on.

    Of the first process: ``memory_bytes``, the most it took beyond the loaded program, which a plan forecasts as
    ``memory.device``; ``process_bytes``, the most host memory it had, the program included; ``optimizer_bytes``.
    """

    output: Path
    tune: str
    steps: int
    first_loss: float
    last_loss: float
    held_out: tuple[float, float] | None
    tokens: int
    seconds: float
    tape_bytes: int
    memory_bytes: int
    process_bytes: int
    optimizer_bytes: int
    trainable_parameters: int
    parameters: int
    planned_steps: int | None = None
    same_rows: bool = False
    best_step: int | None = None
    samples: Path | None = None
    address: str | None = None
    adapter_only: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dict(self.__dict__) | {
            "output": str(self.output),
            "samples": None if self.samples is None else str(self.samples),
            "tokens_per_second": self.tokens_per_second,
        }
        if self.held_out is not None:
            values["held_out"] = dict(zip(("before", "after"), self.held_out, strict=True))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], output: Path) -> "FinetuneResult":
        """What :meth:`to_dict` gave, read back from the summary in ``output``."""
        own: dict[str, Any] = {item.name: values.get(item.name) for item in fields(cls)}
        own["output"] = output
        own["samples"] = None if own["samples"] is None else output / HISTORY / SAMPLES_NAME
        if own["held_out"] is not None:
            scores = (own["held_out"]["before"], own["held_out"]["after"])
            own["held_out"] = tuple(math.nan if score is None else score for score in scores)
        return cls(**own)


def _with_settings(function: Callable[..., FinetuneResult]) -> Callable[..., FinetuneResult]:
    """Put the settings that it takes by name into its signature and its help."""
    defaults = FinetuneConfig()
    signature = inspect.signature(function)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    settings = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(defaults, item.name),
            annotation=item.type,
        )
        for item in fields(FinetuneConfig)
        if item.name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
    explained = inspect.cleandoc(FinetuneConfig.__doc__ or "").partition("Attributes:\n")[2]
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nSettings:\n{explained}"
    return function


@_with_settings
@checked
def finetune(
    model: str | Path,
    data: Sources,
    output: str | Path,
    *,
    notify: Notify | None = None,
    quiet: bool = True,
    **settings: Any,
) -> FinetuneResult:
    """:func:`run` without a configuration object: ``finetune("model", "book.txt", "out", context_length=65536)``.

    Args:
        model: a converted or fine-tuned model folder.
        data: one source of training data, or several.
        output: the folder to make.
        notify: takes one line at a time that people should see, warnings too.
        quiet: no progress bar.

    Raises:
        ConfigError: for a setting that does not exist, naming the nearest one. Otherwise as :func:`run`.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    check_kinds(_KINDS, settings)
    given = {"model": model, "data": data, "output": output} | settings
    return run(build_config(options={n: _plain(n, v) for n, v in given.items()}), notify=notify, quiet=quiet)


_KINDS = {item.name: item.type for item in fields(FinetuneConfig)}
_KINDS |= {"eval_data": Sources, "lora_targets": Sequence[str], "sample_prompt": str | Sequence[str]}


def _plain(name: str, value: Any) -> Any:
    """An argument as it would stand in a file of settings: paths as texts, numpy's numbers as Python's."""
    if name in ("data", "eval_data"):
        return [str(source) for source in ([value] if isinstance(value, str | Path) else value)]
    if isinstance(value, Path):
        return str(value)
    if name in ("lora_targets", "sample_prompt"):
        return [value] if isinstance(value, str) else list(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def run(config: FinetuneConfig, *, notify: Notify | None = None, quiet: bool = False) -> FinetuneResult:
    """Fine-tune, and write the model folder.

    Under ``torchrun`` or ``accelerate launch`` every process calls this; the first one writes. With ``resume = auto``,
    an output that this very run has made is taken as it is.

    Args:
        config: of the run.
        notify: takes one line at a time that people should see.
        quiet: no progress bar.

    Raises:
        RwkvRevError: for everything :func:`plan` refuses, a loss that is not finite, and memory or a disk that ran out.
    """
    notify = notify or (lambda text: None)
    planned = plan(config, progress=not quiet)
    working = config.working_directory
    asked, made = (
        config.chunk_length,
        None if planned.made is None else FinetuneResult.from_dict(planned.made, Path(config.output)),
    )
    args = None if made else training_arguments(config, working, device=planned.device, dtype=planned.dtype)
    if args is not None:  # by now the processes can talk to each other
        length = shortest_of_all(int(planned.config.chunk_length), args.device)
        if length != planned.config.chunk_length:
            planned.length_is = "the shortest of all processes"
        config = planned.config = replace(planned.config, chunk_length=length)
    first = first_process()
    if first:
        for note in (*planned.statistics.notes, *(f"warning: {note}" for note in planned.notes)):
            notify(note)
    if first and made is None and asked == AUTO:
        notify(f"chunks of {planned.config.chunk_length:,} tokens: {planned.length_is}")
    chosen = planned.remnants
    if first and made is None and config.remnants == AUTO and chosen.why and planned.memory.gradient.tape:
        notify(f"the tape keeps {chosen.kind} states: {chosen.why}")
    if first and config.resume == "auto" and made is None and planned.resume_from is None:
        notify("no checkpoint to go on from: the run begins with step 1")
    taken = lock(working) if first else None
    try:
        if first and planned.resume_from is None and config.force:
            empty(working)
        elif first:
            sweep(working)
        _barrier()
        if made is None:
            where = Whereabouts()
            with told_in_one_line(config, where):
                made = _train(planned, args, where, notify, quiet)
        else:
            notify(f"{config.output} is whole already: nothing is left to train")
        _barrier()
        if taken is not None and (stays := remove(working, taken)):
            notify(f"warning: {working} stays: it holds {named(working, stays)}")
    finally:
        if taken is not None:
            taken.release()
    if first and config.push_to_hub:
        made = replace(made, address=publish(made.output, config.push_to_hub, kind="fine-tuned"))
    return made


def _train(planned: Plan, args: Any, where: Whereabouts, notify: Notify, quiet: bool) -> FinetuneResult:
    config, working = planned.config, planned.config.working_directory
    order, identity = planned.order, planned.identity
    if planned.resume_from is not None:
        notify(f"resuming from {planned.resume_from}")
    set_seed(config.seed)
    memory = MemoryInUse(args.device)
    weights = torch.float32
    if config.tune != "full" and planned.dtype != "float32":
        weights = getattr(torch, planned.dtype)  # frozen weights need no more than the arithmetic
    if config.quantise is None:
        model = load_model(config.model, "cpu", weights)
    else:
        model = load_quantised(config.model, args.device, weights, config.quantise)
    model.set_bptt(
        config.bptt,
        chunk_length=config.chunk_length,
        tape=config.tape,
        tape_dir=config.tape_dir,
        remnants=planned.remnants.kind,
    )
    if config.context_parallel > 1:
        share_contexts(model, config.context_parallel, args.device.type)
    tuned = apply_tuning(model, config)
    trainable, total = count_parameters(tuned)
    if config.checkpoint_blocks:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    if config.shard_model:
        shard(tuned, model.blocks, args.device.type)
    held_out, samples, watchers = None, None, list[TrainerCallback]()
    if planned.held_out is not None:
        token_bytes = count_token_bytes(run_tokenizer(config), model.config.vocab_size)
        held_out = (planned.held_out, token_bytes)
    if config.sample_prompt:
        samples = Samples(tuned, run_tokenizer(config), config, working / SAMPLES_NAME, notify)
        if args.process_index == 0:
            samples.begin(0 if planned.resume_from is None else step_of(planned.resume_from))
    if config.keep_best:
        watchers.append(KeepBest())
    if config.patience is not None:
        watchers.append(Patience(config.patience, config.min_delta, config.save_every > 0, notify))
    args.eval_on_start = (held_out or samples) is not None and planned.resume_from is None
    log = working / LOG_NAME
    bar = Bar(quiet)
    trainer = RwkvRevTrainer(
        tuned,
        args,
        order,
        config,
        identity,
        held_out,
        samples,
        [where, Log(log, notify), StopAtBadLoss(), bar, StopWhenNothingIsLeft(), *watchers],
        memory=memory,
        progress=not quiet and args.process_index == 0,
    )
    began = time.perf_counter()
    # the checkpoint's weights are loaded by then
    with suppress(NothingLeft), closing(bar):
        trainer.train(
            resume_from_checkpoint=None if planned.resume_from is None else str(planned.resume_from)
        )
    seconds = time.perf_counter() - began
    if held_out is not None:
        evaluated = _evaluated(trainer.state)
    else:
        evaluated = samples is None or samples.step == trainer.state.global_step
    if not evaluated:
        trainer.evaluate()
    rows = read_log(log) if args.process_index == 0 else trainer.state.log_history
    best = _load_best(trainer, planned, notify) if config.keep_best else None
    result = _result(
        planned, rows, seconds, trainable, total, trainer.optimizer_bytes, memory.process, trainer.state, best
    )
    where.now = f"while {config.output} was written"
    if config.shard_model:
        found = whole_weights(tuned)
        if args.process_index == 0:
            tuned = apply_tuning(load_model(config.model, "cpu", weights), config)
            assert not tuned.load_state_dict(found, strict=False).unexpected_keys
    if args.process_index == 0:
        save_finetuned(tuned, planned.to_dict() | {"identity": identity}, result.to_dict(), rows, config)
    return result


def _result(
    planned: Plan,
    rows: list[dict[str, Any]],
    seconds: float,
    trainable: int,
    total: int,
    optimizer_bytes: int,
    process_bytes: int,
    state: TrainerState,
    best: int | None,
) -> FinetuneResult:
    losses = [row for row in rows if "loss" in row]
    scores = [(row["step"], row["eval_bits_per_byte"]) for row in rows if "eval_bits_per_byte" in row]
    after = [score for step, score in scores if best in (None, step)]
    spent = sum(row.get("seconds", 0.0) for row in losses)
    return FinetuneResult(
        output=Path(planned.config.output),
        tune=planned.config.tune,
        steps=state.global_step,
        first_loss=losses[0]["loss"] if losses else float("nan"),
        last_loss=losses[-1]["loss"] if losses else float("nan"),
        held_out=(scores[0][1], after[-1]) if scores else None,
        tokens=sum(int(row.get("tokens", 0)) for row in losses),
        seconds=spent or seconds,
        tape_bytes=max((int(row.get("tape_bytes", 0)) for row in losses), default=0),
        memory_bytes=max((int(row.get("memory_bytes", 0)) for row in losses), default=0),
        process_bytes=process_bytes,
        optimizer_bytes=optimizer_bytes,
        trainable_parameters=trainable,
        parameters=total,
        planned_steps=planned.steps,
        same_rows=len(planned.order) <= planned.config.grad_accum,
        best_step=best,
        samples=Path(planned.config.output) / HISTORY / SAMPLES_NAME
        if planned.config.sample_prompt
        else None,
        adapter_only=planned.config.tune == "lora" and planned.config.quantise is not None,
    )


def _load_best(trainer: RwkvRevTrainer, planned: Plan, notify: Notify) -> int:
    """Give the model the weights of the lowest held-out loss; the step that they are of.

    Where it is not sharded, the first process's model alone gets them.
    """
    history, step = trainer.state.log_history, trainer.state.global_step
    first, sharded = trainer.args.process_index == 0, planned.config.shard_model
    if not (first or sharded):
        return best_step(history) or step
    checkpoint = None
    if first:
        step, checkpoint, warning = best_checkpoint(
            history, step, planned.config.working_directory, planned.resume_from, planned.identity
        )
        for line in (warning, never_better(history)):
            if line is not None:
                notify(f"warning: {line}")
    if sharded:
        told: list[Any] = [step, checkpoint]
        dist.broadcast_object_list(told)
        step, checkpoint = told
    if checkpoint is not None:
        trainer._load_from_checkpoint(str(checkpoint))
    return step


def _evaluated(state: Any) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
