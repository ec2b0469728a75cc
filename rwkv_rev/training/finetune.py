"""Fine-tune a converted model: from a configuration to a model folder, whole or not at all.

:func:`plan` finds out everything that can be known before the first step, and refuses what cannot work: empty data,
a chunk that does not fit into memory, an output that is in use, a checkpoint of another model. It writes nothing but
the cache of tokenised data. :func:`run` trains. Checkpoints and the log lie in ``OUTPUT.training`` meanwhile;
``OUTPUT`` appears at the end by a rename and ``OUTPUT.training`` goes.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from transformers import set_seed

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.converters.publish import publish, refuse_unpublishable
from rwkv_rev.converters.safe_output import check_output
from rwkv_rev.errors import CheckpointError, OutputError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.training.batches import BatchOrder
from rwkv_rev.training.callbacks import (
    Bar,
    Log,
    NothingLeft,
    StopAtBadLoss,
    StopWhenNothingIsLeft,
    read_log,
    refuse_missing_reporter,
)
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.documents import Fields
from rwkv_rev.training.evaluate import count_token_bytes
from rwkv_rev.training.identity import model_fingerprint, refuse_other_run
from rwkv_rev.training.launch import choose_device, load_tokenizer, own_device, refuse_launch
from rwkv_rev.training.memory import MemoryForecast, forecast_memory, refuse_too_large
from rwkv_rev.training.rows import RowDataset, RowStatistics
from rwkv_rev.training.saving import save_finetuned
from rwkv_rev.training.token_cache import load_tokens
from rwkv_rev.training.token_store import TokenStore
from rwkv_rev.training.trainer import RwkvRevTrainer, checkpoints, training_arguments
from rwkv_rev.training.tuning import apply_tuning, count_parameters, count_trained, refuse_state_tuning

LOG_NAME = "log.jsonl"
LOCK_NAME = ".lock"
Notify = Callable[[str], object]


@dataclass
class Plan:
    """What a run will do: ``steps`` of the optimizer, ``tokens_per_step`` without masked ones, on average."""

    config: FinetuneConfig
    model_config: RwkvRevConfig
    device: str
    dtype: str
    world_size: int
    statistics: RowStatistics
    steps: int
    tokens_per_step: float
    memory: MemoryForecast
    resume_from: Path | None
    notes: tuple[str, ...]
    order: BatchOrder = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        statistics = dict(self.statistics.__dict__)
        statistics["warnings"] = list(statistics["warnings"])
        settings = self.config.to_dict() | {
            "lr": self.config.learning_rate,
            "device": self.device,
            "dtype": self.dtype,
        }
        return {
            "settings": settings,
            "model": f"RWKV-{self.model_config.rwkv_version}, {self.model_config.num_hidden_layers} layers of "
            f"{self.model_config.hidden_size}",
            "processes": self.world_size,
            "data": statistics,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "memory": self.memory.to_dict(),
            "resume_from": None if self.resume_from is None else str(self.resume_from),
            "notes": list(self.notes),
        }


@dataclass
class FinetuneResult:
    """What a run did. Losses in nats per token; ``held_out`` bits per byte before and after, where there is any.

    ``memory_bytes`` (its peak) and ``optimizer_bytes`` are those of the first process.
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
    optimizer_bytes: int
    trainable_parameters: int
    parameters: int
    address: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dict(self.__dict__) | {
            "output": str(self.output),
            "tokens_per_second": self.tokens_per_second,
        }
        if self.held_out is not None:
            values["held_out"] = dict(zip(("before", "after"), self.held_out, strict=True))
        return values


def plan(config: FinetuneConfig, *, progress: bool = False, keep_cache: bool = True) -> Plan:
    """Read the model's headers and the data, and refuse what cannot work.

    ``keep_cache`` False leaves no trace: data that is not in the cache of tokens yet does not go there either.

    Raises:
        ConfigError, SourceError, CheckpointError, DataError, OutputError, StrategyError: one line each.
    """
    config.check()
    with ConvertedModel(config.model) as source:
        model_config = source.config
        shapes = {name: source.shape(name) for name in source.names()}
    if config.tune == "state":
        refuse_state_tuning(model_config.rwkv_version)
    if config.carry_state and config.tune == "state":
        notes = ["carried states keep what the initial state did; only rows that begin a document tune it"]
    else:
        notes = []
    _refuse_output(config)
    if config.push_to_hub:
        refuse_unpublishable(config.push_to_hub)
    refuse_missing_reporter(config.report_to)
    refuse_launch()
    device, dtype = choose_device(config.device, config.dtype)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rows = RowDataset(
        _load(config, config.data, progress=progress, keep=keep_cache),
        config.context_length,
        pack=config.pack,
        carry_state=config.carry_state,
        vocab_size=model_config.vocab_size,
        seed=config.seed,
    )
    rank = int(os.environ.get("RANK", "0"))
    order = BatchOrder(rows, config.batch_size, seed=config.seed, rank=rank, world_size=world_size)
    statistics = order.statistics()
    per_epoch = -(-len(order) // config.grad_accum)
    steps = config.max_steps or max(1, int(-(-config.epochs * per_epoch // 1)))
    facts = inspect_source(config.model)
    memory = forecast_memory(
        model_config,
        facts.log_decays,
        config,
        parameters=facts.parameters,
        trained=count_trained(config, model_config, shapes),
        longest=int(rows.lengths().max()),
        device=str(own_device(device)),
        dtype=dtype,
        world_size=world_size,
    )
    notes += refuse_too_large(memory, own_device(device), config)
    if config.shard_optimizer and world_size == 1:
        notes.append("shard_optimizer needs several processes; this one keeps the whole state")
    if device == "cuda" and world_size == 1 and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        notes.append(
            f"one of {count} GPUs is used; torchrun --nproc-per-node {count} -m rwkv_rev.cli uses all"
        )
    if config.bptt == "truncated":
        notes.append("bptt = truncated is not the gradient of the context; reversible is exact")
    return Plan(
        config,
        model_config,
        device,
        dtype,
        world_size,
        statistics,
        steps,
        float(rows.lengths().sum()) / max(1, per_epoch),
        memory,
        _resume_from(config),
        (*statistics.warnings, *notes),
        order,
    )


def run(config: FinetuneConfig, *, notify: Notify = lambda text: None, quiet: bool = False) -> FinetuneResult:
    """Fine-tune, and write the model folder.

    Under ``torchrun`` or ``accelerate launch`` every process calls this; the first one writes.

    Args:
        config: of the run.
        notify: takes one line at a time that people should see.
        quiet: no progress bar.

    Raises:
        RwkvRevError: for everything :func:`plan` refuses, and a loss that is not finite.
    """
    planned = plan(config, progress=not quiet)
    work = config.work_directory
    args = training_arguments(config, work, device=planned.device, dtype=planned.dtype)
    first = args.process_index == 0
    for note in planned.notes if first else ():
        notify(f"warning: {note}")
    lock = _lock(work) if first else None
    if first and planned.resume_from is None and config.force:
        _empty(work)
    _barrier()
    try:
        result = _train(planned, args, notify, quiet)
    finally:
        if lock is not None:
            lock.release()
    _barrier()
    if first:
        shutil.rmtree(work, ignore_errors=True)
        if config.push_to_hub:
            result = replace(result, address=publish(result.output, config.push_to_hub, kind="fine-tuned"))
    return result


def _train(planned: Plan, args: Any, notify: Notify, quiet: bool) -> FinetuneResult:
    config, work = planned.config, planned.config.work_directory
    order = planned.order
    fingerprint = model_fingerprint(Path(config.model))
    identity = {
        "model": fingerprint,
        "tune": config.tune,
        "grad_accum": config.grad_accum,
        "order": order.state_dict(0),
    }
    if config.tune == "lora":
        identity |= {"lora_rank": config.lora_rank, "lora_targets": sorted(config.lora_targets)}
    if planned.resume_from is not None:
        refuse_other_run(planned.resume_from, identity)
        notify(f"resuming from {planned.resume_from}")
    set_seed(config.seed)
    weights = torch.float32
    if config.tune != "full" and planned.dtype != "float32":
        weights = getattr(torch, planned.dtype)  # frozen weights need no more than the arithmetic
    model = RwkvRevForCausalLM.from_pretrained(config.model, dtype=weights)
    model.set_bptt(config.bptt, chunk_length=config.chunk_length, tape=config.tape, tape_dir=config.tape_dir)
    tuned = apply_tuning(model, config)
    trainable, total = count_parameters(tuned)
    if config.checkpoint_blocks:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    held_out = None
    if config.eval_data:
        store = _load(config, config.eval_data, held_out=True, progress=not quiet)
        held_out = (store, count_token_bytes(load_tokenizer(config.model), model.config.vocab_size))
    args.eval_on_start = held_out is not None and planned.resume_from is None
    log = work / LOG_NAME
    trainer = RwkvRevTrainer(
        tuned,
        args,
        order,
        config,
        identity,
        held_out,
        [Log(log), StopAtBadLoss(), Bar(quiet), StopWhenNothingIsLeft()],
    )
    began = time.perf_counter()
    # the checkpoint's weights are loaded by then
    with suppress(NothingLeft):
        trainer.train(
            resume_from_checkpoint=None if planned.resume_from is None else str(planned.resume_from)
        )
    seconds = time.perf_counter() - began
    if held_out is not None and not _evaluated(trainer.state):
        trainer.evaluate()
    rows = read_log(log) if args.process_index == 0 else trainer.state.log_history
    result = _result(planned, rows, seconds, trainable, total, trainer.optimizer_bytes)
    if args.process_index == 0:
        save_finetuned(tuned, planned.to_dict(), result.to_dict(), rows, config)
    return result


def _result(
    planned: Plan,
    rows: list[dict[str, Any]],
    seconds: float,
    trainable: int,
    total: int,
    optimizer_bytes: int,
) -> FinetuneResult:
    losses = [row for row in rows if "loss" in row]
    scores = [row["eval_bits_per_byte"] for row in rows if "eval_bits_per_byte" in row]
    spent = sum(row.get("seconds", 0.0) for row in losses)
    return FinetuneResult(
        output=Path(planned.config.output),
        tune=planned.config.tune,
        steps=planned.steps,
        first_loss=losses[0]["loss"] if losses else float("nan"),
        last_loss=losses[-1]["loss"] if losses else float("nan"),
        held_out=(scores[0], scores[-1]) if scores else None,
        tokens=sum(int(row.get("tokens", 0)) for row in losses),
        seconds=spent or seconds,
        tape_bytes=max((int(row.get("tape_bytes", 0)) for row in losses), default=0),
        memory_bytes=max((int(row.get("memory_bytes", 0)) for row in losses), default=0),
        optimizer_bytes=optimizer_bytes,
        trainable_parameters=trainable,
        parameters=total,
    )


def _load(
    config: FinetuneConfig,
    data: list[str],
    *,
    held_out: bool = False,
    progress: bool = False,
    keep: bool = True,
) -> TokenStore:
    fields = Fields(config.text_field, config.prompt_field, config.completion_field)
    end: Any = None if held_out or config.end_token == "none" else config.end_token
    return load_tokens(
        list(data),
        load_tokenizer(config.model),
        fields=fields,
        end_token=end,
        cache_dir=config.cache_dir,
        num_workers=config.num_workers,
        progress=progress and sys.stderr.isatty(),
        keep=keep,
    )


def _refuse_output(config: FinetuneConfig) -> None:
    output = Path(config.output).absolute()
    check_output(output, force=config.force, directory=True)
    inside = Path(config.model).resolve()
    if output.resolve() == inside or output.resolve() in inside.parents:
        raise OutputError(f"{config.output} holds the model that is fine-tuned; choose another --output")
    work = config.work_directory
    if config.resume is None and not config.force and checkpoints(work):
        raise OutputError(
            f"{work} holds an unfinished run ({checkpoints(work)[-1].name}): --resume auto goes on with it, "
            "--force throws it away"
        )


def _resume_from(config: FinetuneConfig) -> Path | None:
    if config.resume is None:
        return None
    if config.resume == "auto":
        found = checkpoints(config.work_directory)
        return found[-1] if found else None
    path = Path(config.resume)
    if path not in checkpoints(path.parent):
        raise CheckpointError(f"{path} is not a whole checkpoint of a fine-tuning run; use --resume auto")
    return path


def _lock(work: Path) -> FileLock:
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{work} is in use by another run; wait for it or choose another --output"
        ) from None
    return lock


def _empty(work: Path) -> None:
    """Remove what another run left there; the lock, which is ours now, stays."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def _evaluated(state: Any) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
