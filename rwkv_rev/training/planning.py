"""What a fine-tuning run will do, found out before the first step; what cannot work is refused here.

Empty data, token ids that the model has not, a chunk that does not fit into memory, an output that is in use, a damaged
checkpoint: each is one line. Nothing is written but the cache of tokenised data.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.base_model import RwkvRevModel
from rwkv_rev.bptt import choose_strategy
from rwkv_rev.bptt.reversible_lossy import divided
from rwkv_rev.bptt_settings import AUTO, CHUNK_LENGTH
from rwkv_rev.chunk_length import ChosenLength
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.distributed.agreement import refuse_cells
from rwkv_rev.errors import ConfigError, OutputError
from rwkv_rev.folders.folder import refuse_links
from rwkv_rev.folders.publish import refuse_unpublishable
from rwkv_rev.foreign.quantised import refuse_unusable, stays
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.remnants import ChosenRemnants, choose_remnants, refuse_lifting
from rwkv_rev.training.batches import BatchOrder
from rwkv_rev.training.best import held_out_identity, refuse_other_evaluations
from rwkv_rev.training.callbacks import refuse_missing_reporter
from rwkv_rev.training.checkpoints import RUN_NAME
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.identity import model_fingerprint, refuse_other_run
from rwkv_rev.training.launch import (
    choose_dtype,
    context_ranks,
    own_device,
    refuse_launch,
    shards_model,
    training_device,
)
from rwkv_rev.training.lora_targets import refuse_lora_targets
from rwkv_rev.training.memory import MemoryForecast, choose_length, forecast_memory, refuse_too_large
from rwkv_rev.training.objectives.objectives import objectives_of
from rwkv_rev.training.overlap import shared_documents
from rwkv_rev.training.records import Fields
from rwkv_rev.training.rows import RowDataset, RowStatistics
from rwkv_rev.training.samples import encoded_prompts, run_tokenizer
from rwkv_rev.training.sharding_settings import refuse_sharding
from rwkv_rev.training.sources import find_sources
from rwkv_rev.training.token_cache import load_tokens
from rwkv_rev.training.token_store import TokenStore
from rwkv_rev.training.tokenise import token_ids
from rwkv_rev.training.tuning import count_trained, refuse_state_tuning
from rwkv_rev.training.working_folder import finished_run, may_be_finished, refuse_output, resume_from


@dataclass
class Plan:
    """What a run will do: ``steps`` of the optimizer, ``tokens_per_step`` without masked ones, on average.

    ``config`` has the chunk length that was chosen, if it was, and ``length_is`` says why. ``remnants`` are what the
    setting of that name came to. ``identity`` is what a
    checkpoint must agree with to be resumed, and an output to be this run's; ``made`` is the outcome where this very
    run has been finished before.
    """

    config: FinetuneConfig
    model_config: RwkvRevConfig
    device: str
    dtype: str
    world_size: int
    statistics: RowStatistics
    steps: int
    tokens_per_step: float
    memory: MemoryForecast
    length_is: str
    remnants: ChosenRemnants
    resume_from: Path | None
    notes: tuple[str, ...]
    order: BatchOrder = field(repr=False)
    held_out: TokenStore | None = field(repr=False)
    identity: dict[str, Any] = field(repr=False)
    made: dict[str, Any] | None = field(repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain values, with what ``auto`` came to."""
        chosen = {"lr": self.config.learning_rate, "device": self.device, "dtype": self.dtype}
        return self.config.to_dict() | chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        statistics = dict(self.statistics.__dict__)
        statistics |= {name: list(statistics[name]) for name in ("notes", "warnings")}
        return {
            "settings": self.settings,
            "model": f"{self.model_config.architecture.called}, {self.model_config.num_hidden_layers} layers of "
            f"{self.model_config.hidden_size}",
            "processes": self.world_size,
            "data": statistics,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "chunk_length_is": self.length_is,
            "remnants": self.remnants.kind if self.remnants.why else None,
            "remnants_are": self.remnants.why,
            "memory": self.memory.to_dict(),
            "finished": self.made is not None,
            "resume_from": None if self.resume_from is None else str(self.resume_from),
            "notes": list(self.notes),
        }


def plan(config: FinetuneConfig, *, progress: bool = False, keep_cache: bool = True) -> Plan:
    """Read the model's headers and the data, and refuse what cannot work.

    ``keep_cache`` False leaves no trace: data that is not in the cache of tokens yet does not go there either.

    Raises:
        ConfigError, SourceError, CheckpointError, DataError, OutputError, StrategyError: one line each.
    """
    config.check()
    objectives = objectives_of(config.objective)
    config = replace(config, objective=str(objectives))  # with what its settings are
    refuse_launch()
    config = replace(config, shard_model=shards_model(config.shard_model))  # before its variables are gone
    config = replace(config, context_parallel=context_ranks(config.context_parallel))
    config.check()
    refuse_links(config.model)
    with ConvertedModel(config.model) as source:
        model_config = source.config
        shapes = {name: source.shape(name) for name in source.names()}
    refuse_lifting(config.remnants, model_config, ConfigError)
    if config.tune == "state":
        refuse_state_tuning(model_config.rwkv_version)
    small = (
        _small_block(model_config)
        if config.bptt == "reversible-lossy" or config.context_parallel > 1
        else None
    )
    if small is not None and config.bptt == "reversible-lossy":
        _refuse_undividable(small)
    if small is not None and config.context_parallel > 1:
        refuse_cells(small.typed_blocks()[0].cells)
    if config.tune == "lora":
        refuse_lora_targets(config.lora_targets, model_config.tie_word_embeddings, shapes)
    if isinstance(config.end_token, int) and config.end_token >= model_config.vocab_size:
        raise ConfigError(
            f"end_token = {config.end_token} is outside the vocabulary: ids go to {model_config.vocab_size - 1}"
        )
    notes = []
    if config.carry_state and config.tune == "state":
        notes.append(
            "carried states keep what the initial state did; only rows that begin a document tune it"
        )
    if not (finished := may_be_finished(config)):
        refuse_output(config)
    if config.push_to_hub:
        refuse_unpublishable(config.push_to_hub)
    refuse_missing_reporter(config.report_to)
    device = training_device(config.device)
    dtype = choose_dtype(config.dtype, torch.device(device))
    refuse_sharding(replace(config, dtype=dtype))
    if config.quantise is not None:
        refuse_unusable(config.quantise, torch.device(device))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = run_tokenizer(config)
    encoded_prompts(config, tokenizer, model_config.vocab_size)
    objectives = objectives.read_by(partial(token_ids, tokenizer))
    objectives.room(config.context_length)  # refuses what has no room, before the data are read
    store, held_out = _load_data(config, model_config.vocab_size, progress, keep_cache)
    notes += store.notes
    if held_out is not None:
        notes += [*held_out.notes, *shared_documents(store, held_out)]
    rows = RowDataset(
        store,
        config.context_length,
        pack=config.pack,
        carry_state=config.carry_state,
        vocab_size=model_config.vocab_size,
        seed=config.seed,
        objectives=objectives,
    )
    ranks = config.context_parallel
    rank, groups = int(os.environ.get("RANK", "0")) // ranks, world_size // ranks
    order = BatchOrder(rows, config.batch_size, seed=config.seed, rank=rank, world_size=groups)
    statistics = order.statistics()
    per_epoch = -(-len(order) // config.grad_accum)
    steps = config.max_steps or max(1, int(-(-config.epochs * per_epoch // 1)))
    identity = _identity(config, order, steps, dtype)
    made, went_on, passed_over = None, None, list[str]()
    if finished:
        made = finished_run(config, identity)
        if made is None:
            refuse_output(config)
        elif config.resume is None:
            raise OutputError(
                f"{config.output} is finished already: this very run has made it, nothing is left to train (--resume "
                "auto takes it as it is); choose another --output to train once more"
            )
    if made is None:  # else whatever a kill has left of its checkpoints
        went_on, passed_over = resume_from(config)
        if went_on is not None:
            refuse_other_run(went_on, identity)
            if config.keep_best or config.patience:
                refuse_other_evaluations(went_on, held_out_identity(config, held_out))
    facts, longest = inspect_source(config.model), -(-int(rows.lengths().max()) // ranks)  # of each process
    trained = count_trained(config, model_config, shapes)

    def remnants(chunk: int, longest: int) -> ChosenRemnants:
        return choose_remnants(
            config.remnants,
            choose_strategy(config.bptt, longest, chunk_length=chunk).name,
            model_config,
            chunk=chunk,
            device=own_device(device),
            trains_all=config.tune == "full",
            shared=ranks > 1,
        )

    def forecast(chunk: int, longest: int) -> MemoryForecast:
        return forecast_memory(
            model_config,
            facts.log_decays,
            replace(config, chunk_length=chunk),
            parameters=facts.parameters,
            quantised=_quantised(shapes) if config.quantise is not None else (),
            trained=trained,
            longest=longest,
            device=str(own_device(device)),
            dtype=dtype,
            world_size=world_size,
            pieces=rows.most_pieces,
            lifted=remnants(chunk, longest).kind == "lifted",
        )

    length = _chunk_length(config, went_on)
    if length is None:
        length = choose_length(config, own_device(device), forecast, longest, trained)
        length = replace(length, tokens=length.tokens * ranks)
    config = replace(config, chunk_length=length.tokens)
    memory = forecast(-(-length.tokens // ranks), longest)
    kept = remnants(-(-length.tokens // ranks), longest)
    notes += refuse_too_large(memory, own_device(device), config)
    if config.shard_optimizer and world_size == 1:
        notes.append("shard_optimizer needs several processes; this one keeps the whole state")
    if config.shard_model and world_size == 1:
        notes.append("shard_model needs several processes; this one keeps the whole model")
        config = replace(config, shard_model=False)
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
        length.why,
        kept,
        went_on,
        (*statistics.warnings, *notes, *passed_over),
        order,
        held_out,
        identity,
        made,
    )


def _small_block(config: RwkvRevConfig) -> RwkvRevModel:
    """A small model of the architecture, by whose cells can be told what they can do."""
    small = RwkvRevConfig(
        rwkv_version=config.rwkv_version,
        vocab_size=8,
        hidden_size=64,
        num_hidden_layers=1,
        **config.architecture.sizes(64),
    )
    with torch.random.fork_rng(devices=[]):
        return RwkvRevForCausalLM(small).model


def _refuse_undividable(model: RwkvRevModel) -> None:
    """Refuse what ``reversible-lossy`` cannot divide back."""
    (block,), state = model.typed_blocks(), model.initial_state(1)
    divided([block.cells], [block.exact(state.layer(0))])


def _chunk_length(config: FinetuneConfig, checkpoint: Path | None) -> ChosenLength | None:
    """The chunk length that was set, or that a run began with which goes on; None where it is to be chosen."""
    if not isinstance(config.chunk_length, str):
        return ChosenLength(config.chunk_length, "as set")
    if checkpoint is None:
        return None
    began = json.loads((checkpoint / RUN_NAME).read_text("utf-8"))["config"]["chunk_length"]
    return ChosenLength(int(began), f"what {checkpoint.name} was trained with")


def _quantised(shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """Shapes of the linear maps that ``quantise`` makes small."""
    found = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if ".blocks." in name and module != name and len(shape) == 2 and not stays(module):
            found.append((shape[0], shape[1]))
    return found


def _identity(config: FinetuneConfig, order: BatchOrder, steps: int, dtype: str) -> dict[str, Any]:
    """Everything that losses and weights depend on."""
    names = ["tune", "grad_accum", "lr_schedule", "warmup", "weight_decay", "max_grad_norm"]
    if config.tune == "lora":
        names += ["lora_rank", "lora_alpha", "lora_dropout"]
    identity = {name: getattr(config, name) for name in names} | {
        "model": model_fingerprint(Path(config.model)),
        "lr": config.learning_rate,
        "steps": steps,
        "dtype": dtype,
        "order": order.state_dict(0),
    }
    if config.quantise is not None:
        identity["quantise"] = config.quantise
    if config.tune == "lora":
        identity["lora_targets"] = sorted(config.lora_targets)
    if config.bptt in (
        "truncated",
        "reversible-lossy",
    ):  # exact strategies give the same gradient, whatever the chunks
        length = CHUNK_LENGTH if config.chunk_length == AUTO else config.chunk_length
        identity |= {"bptt": config.bptt, "chunk_length": length}
    return identity


def _load_data(
    config: FinetuneConfig, vocab_size: int, progress: bool, keep: bool
) -> tuple[TokenStore, TokenStore | None]:
    """The documents to train on and those held out, which get no end token; all ids have an embedding."""

    fields = Fields(
        config.text_field,
        config.prompt_field,
        config.completion_field,
        config.messages_field,
        config.data_format,
        config.train_on,
    )
    tokenizer = run_tokenizer(config)

    def load(data: list[str], end: Any) -> TokenStore:
        return load_tokens(
            list(data),
            tokenizer,
            fields=fields,
            end_token=end,
            vocab_size=vocab_size,
            cache_dir=config.cache_dir,
            num_workers=config.num_workers,
            progress=progress,
            keep=keep,
        )

    fields.refuse_unused(source.kind for source in find_sources([*config.data, *config.eval_data]))
    end = None if config.end_token == "none" else config.end_token
    return load(config.data, end), load(config.eval_data, None) if config.eval_data else None
