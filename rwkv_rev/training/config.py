"""Everything a fine-tuning run can be told, as one dataclass.

Values come from, in rising order: the defaults, a YAML file, and what is given beside it, as ``key=value`` pairs or as
options, but not twice. A key that does not exist is an error that names the nearest one.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_rev.arguments import expanded, named_fields
from rwkv_rev.bptt_settings import AUTO, BPTT_STRATEGIES, REMNANTS, TAPES
from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import shortened
from rwkv_rev.training.evaluation_settings import refuse_evaluations
from rwkv_rev.training.objectives.objectives import objectives_of
from rwkv_rev.training.plain_yaml import NotPlain, parse_yaml, read_yaml
from rwkv_rev.training.records import FORMATS, TRAIN_ON, refuse_half_named
from rwkv_rev.training.setting_bounds import LEAST, MOST
from rwkv_rev.training.setting_types import as_type, described
from rwkv_rev.training.sharding_settings import refuse_sharding

TUNE = ("full", "lora", "state")
QUANTISE = ("nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_min_lr", "inverse_sqrt", "polynomial")
DEFAULT_LR = {"full": 1e-4, "lora": 5e-4, "state": 0.1}

_ELSEWHERE = {  # transformers' names for the same, to know what was meant
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule",
    "gradient_accumulation_steps": "grad_accum",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "warmup_steps": "warmup",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "keep": "save_total",  # ours, once
    "save_total_limit": "save_total",
    "early_stopping_patience": "patience",
    "early_stopping_threshold": "min_delta",
    "load_best_model_at_end": "keep_best",
    "resume_from_checkpoint": "resume",
}


@partial(named_fields, elsewhere=_ELSEWHERE)
@dataclass
class FinetuneConfig:
    """Settings of one fine-tuning run; lengths in tokens, ``*_every`` in optimizer steps.

    Attributes:
        model: a converted or fine-tuned model folder.
        data: files, folders, globs or dataset ids (:mod:`rwkv_rev.training.documents`).
        output: model folder to make. Checkpoints and the log lie in ``OUTPUT.training`` until it is there.
        text_field: field of the text in records; ``text`` is found without it.
        prompt_field: field of the prompt, on which there is no loss; ``prompt`` is found without it.
        completion_field: field of the completion; ``completion`` is found without it.
        messages_field: field of a list of turns in records; ``messages`` and ``conversations`` are found without it.
        data_format: what records are read as: ``auto`` (their fields tell), ``text``, ``completion``, ``messages``,
            ``instruction``, or ``chosen``, of preference pairs the chosen answer (docs/data.md).
        train_on: what has loss: ``assistant`` (its turns, and completions), ``last`` (its last turn) or ``all``; when
            None the assistant's turns of conversations and everything of texts.
        chat_template: file with the template that makes a text of a conversation, saved with the model; when None the
            tokenizer's own, which is RWKV World's ``User:`` and ``Assistant:``.
        end_token: put after every document: ``auto`` is the tokenizer's own (for models of bytes the byte 0, and only
            after conversations and completions), ``none`` no token, or an id.
        objective: what is asked of a context: ``next-token``, ``position-weighted``, ``second-pass``, ``recall``,
            ``adapt``, or several, each with settings of its own: ``recall:span=64,position-weighted``.
        pack: lay several documents into one row, by best fit; state starts anew in each.
        carry_state: begin the next row of a long document with the state of the row before (gradient cut there).
        context_length: T, the most tokens that one gradient goes through.
        chunk_length: C, tokens per chunk; ``auto`` is chosen once, before the first step, by the memory that is free.
        bptt: gradient strategy; ``auto`` is exact at every length.
        tape: where remnants are kept, ``host``, ``device`` or ``disk``.
        tape_dir: folder of a tape on disk; the system's temporary one when None.
        remnants: what the tape keeps of RWKV-7's states: ``whole`` ones, ``lifted`` ones, or ``auto``, which lifts
            where that pays (docs/lifting.md).
        batch_size: rows at once per process.
        grad_accum: batches per optimizer step.
        lr: highest learning rate; when None 1e-4 for ``full``, 5e-4 for ``lora``, 0.1 for ``state``.
        lr_schedule: shape of the learning rate after the warmup.
        warmup: steps of linear warmup; below 1, a share of all steps.
        weight_decay: of matrices; mixes, decays, norms and states are never decayed.
        max_grad_norm: gradients are clipped to it; 0 does not clip.
        max_steps: optimizer steps; ``epochs`` passes over the data when None.
        epochs: passes over the data, where ``max_steps`` is None.
        dtype: of the arithmetic; ``auto`` is bfloat16 where a GPU has it, else float32. Weights are trained in
            float32 whatever this is.
        save_dtype: of changed tensors in the output. ``auto`` is float32, which loses nothing.
        tune: ``full`` (everything), ``lora`` (low-rank additions, merged at the end) or ``state`` (RWKV-5 to 7: the
            initial state alone).
        quantise: of the frozen linear maps, for ``lora`` and ``state``: ``nf4`` (4 bits) or ``int8``, through
            bitsandbytes (:mod:`rwkv_rev.foreign.quantised`). With ``lora`` the output is the adapter alone.
        lora_rank: rank of the additions.
        lora_alpha: their scale, divided by the rank; twice the rank when None.
        lora_dropout: share of their inputs that is dropped in training.
        lora_targets: linear maps that get an addition, by name; all but the head when empty.
        shard_optimizer: with several processes, each keeps its share of the optimizer's state (ZeRO stage 1).
        shard_model: with several processes, each keeps its part of every weight, of its gradient and of the optimizer's
            state (FSDP2, block by block); so does accelerate's FSDP plugin of version 2.
        context_parallel: W, processes that share every row: each has a W-th of every chunk's tokens, of which
            ``chunk_length`` counts all. Several such groups take rows of their own.
        checkpoint_blocks: keep only each block's input inside a chunk: less memory, a third more time.
        seed: of the order of the data, of new parameters and of dropout.
        eval_data: held-out data; read whole every ``eval_every`` steps, before the first and after the last.
        eval_every: steps between evaluations, and samples; 0 for none but the first and the last.
        eval_tokens: at most so many tokens of the held-out data; 0 for all.
        save_every: steps between checkpoints; 0 for none.
        save_total: how many newest checkpoints stay; with ``keep_best`` the best one, too.
        keep_best: OUTPUT holds the weights of the evaluation with the lowest held-out loss, not the last; a checkpoint
            is written at each that is the lowest so far.
        patience: end the run after so many evaluations in a row without a lower held-out loss; None for never.
        min_delta: nats per token by which the loss must fall for ``patience`` to begin anew.
        sample_prompt: texts that the model continues at each evaluation, for people to read; ``@FILE`` is the text of a
            file, ``@@`` an @ at the beginning.
        sample_tokens: most tokens of a sample.
        sample_temperature: 0 takes the likeliest token, else as in ``generate``, with top-p 0.7, every time from
            ``seed``.
        sample_chat: a prompt is what the user says, put into the chat template; the sample is the answer.
        resume: ``auto`` (newest checkpoint of OUTPUT.training, if any), the path of one, or None.
        log_every: steps between log rows.
        report_to: a further place for them: ``tensorboard``, ``wandb`` or ``trackio``.
        device: ``auto``, ``cpu``, ``cuda``.
        force: replace OUTPUT, and throw away an unfinished run of that name.
        push_to_hub: repository to upload the result to.
        cache_dir: of tokenised data; ``tokens`` in the user's cache when None.
        num_workers: processes that tokenise; by the size of the data when None.
    """

    model: str = ""
    data: list[str] = field(default_factory=list)
    output: str = ""
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    data_format: str = "auto"
    train_on: str | None = None
    chat_template: str | None = None
    end_token: str | int = "auto"
    objective: str = "next-token"
    pack: bool = False
    carry_state: bool = False
    context_length: int = 16384
    chunk_length: int | str = AUTO
    bptt: str = "auto"
    tape: str = "host"
    tape_dir: str | None = None
    remnants: str = "auto"
    batch_size: int = 1
    grad_accum: int = 1
    lr: float | None = None
    lr_schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_steps: int | None = None
    epochs: float = 1.0
    dtype: str = "auto"
    save_dtype: str = "auto"
    tune: str = "full"
    quantise: str | None = None
    lora_rank: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=list)
    shard_optimizer: bool = False
    shard_model: bool = False
    context_parallel: int = 1
    checkpoint_blocks: bool = False
    seed: int = 0
    eval_data: list[str] = field(default_factory=list)
    eval_every: int = 0
    eval_tokens: int = 0
    save_every: int = 100
    save_total: int = 2
    keep_best: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    sample_prompt: list[str] = field(default_factory=list)
    sample_tokens: int = 64
    sample_temperature: float = 1.0
    sample_chat: bool = False
    resume: str | None = None
    log_every: int = 1
    report_to: str = "none"
    device: str = "auto"
    force: bool = False
    push_to_hub: str | None = None
    cache_dir: str | None = None
    num_workers: int | None = None

    @property
    def learning_rate(self) -> float:
        """The learning rate, chosen by ``tune`` when none was given."""
        return DEFAULT_LR[self.tune] if self.lr is None else self.lr

    @property
    def working_directory(self) -> Path:
        """Where checkpoints and the log lie while the run lasts."""
        output = Path(self.output)
        return output.with_name(output.name + ".training")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Refuse values that do not exist or do not go together.

        Raises:
            ConfigError: naming the setting and what would work.
        """
        for name, value in vars(self).items():
            typed = _typed(name, value)
            if typed != value and typed == typed:  # from Python: a text that in a file would be a number
                raise ConfigError(
                    f"{name} = {value!r} must be {described(_TYPES[name], length=name in _LENGTHS)}"
                )
        for name, allowed in (
            ("tune", TUNE),
            ("quantise", (None, *QUANTISE)),
            ("dtype", DTYPES),
            ("save_dtype", DTYPES),
            ("bptt", BPTT_STRATEGIES),
            ("tape", TAPES),
            ("remnants", REMNANTS),
            ("lr_schedule", SCHEDULES),
            ("report_to", REPORTERS),
            ("data_format", FORMATS),
            ("train_on", (None, *TRAIN_ON)),
        ):
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise ConfigError(f"{name} = {value!r} does not exist; choose one of {choices}")
        if not self.model:
            raise ConfigError(
                "the model is missing: name its folder, DIR in rwkv-rev finetune DIR (`model` in a file of settings)"
            )
        for name in ("data", "output"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing (`{name}` in a file of settings)")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} = {value} must be a finite number")
        for name, most in MOST.items():
            number = getattr(self, name)
            if number is not None and number != AUTO and number > most:
                raise ConfigError(f"{name} = {number} must be at most {most}")
        for name, least in LEAST.items():
            number = getattr(self, name)
            if number is not None and number != AUTO and number < least:
                raise ConfigError(f"{name} = {number} must be at least {least}")
        for name in ("lr", "epochs", "lora_alpha"):
            if (number := getattr(self, name)) is not None and number <= 0:
                raise ConfigError(f"{name} = {number} must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout = {self.lora_dropout} must be at least 0 and below 1")
        for name in ("data", "eval_data", "sample_prompt"):
            if "" in getattr(self, name):
                raise ConfigError(f"{name} holds an empty text; leave it out")
        if self.pack and self.carry_state:
            raise ConfigError(
                "--pack and --carry-state exclude each other: a packed row begins every document anew"
            )
        if self.context_parallel > 1 and self.remnants == "lifted":
            raise ConfigError(
                "--remnants lifted undoes a chunk that one process has whole, and --context-parallel shares each: use "
                "--remnants whole"
            )
        objectives_of(self.objective).refuse_layout(pack=self.pack, carry_state=self.carry_state)
        if self.context_parallel > 1 and self.bptt == "full":
            raise ConfigError(
                "--context-parallel splits every chunk, and --bptt full has none: leave --bptt out, or use reversible"
            )
        refuse_half_named(self.text_field, self.prompt_field, self.completion_field, self.messages_field)
        refuse_evaluations(self)
        refuse_sharding(self)
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ConfigError(f"warmup = {self.warmup} must be a whole number of steps, or a share below 1")
        if self.quantise is not None and self.tune == "full":
            raise ConfigError(
                f"quantise = {self.quantise} belongs to --tune lora and state: weights of so few bits cannot be "
                "trained themselves"
            )
        if self.quantise is not None and self.tune == "lora" and self.push_to_hub:
            raise ConfigError(
                "push_to_hub takes model folders, and --quantise with --tune lora makes an adapter: merge it with "
                "rwkv-rev merge, then rwkv-rev publish"
            )
        if self.quantise is not None and self.tune == "lora" and self.save_dtype != "auto":
            raise ConfigError(
                "save_dtype is of a model folder, and --quantise with --tune lora makes an adapter"
            )
        for name in ("lora_targets", "lora_rank", "lora_alpha", "lora_dropout"):
            if self.tune != "lora" and getattr(self, name) != getattr(_DEFAULTS, name):
                raise ConfigError(f"{name} belongs to --tune lora; this run has tune = {self.tune}")
        for name in (
            "text_field",
            "prompt_field",
            "completion_field",
            "messages_field",
            "chat_template",
            "tape_dir",
            "cache_dir",
            "resume",
            "push_to_hub",
        ):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; leave it out")
        if self.tape_dir is not None and self.tape != "disk":
            raise ConfigError(f"tape_dir belongs to --tape disk; this run has tape = {self.tape}")
        if self.tape_dir is not None and not Path(self.tape_dir).is_dir():
            raise ConfigError(f"tape_dir = {self.tape_dir!r} is no folder; make it, or leave tape_dir out")
        if isinstance(self.end_token, int) and self.end_token < 0:
            raise ConfigError(f"end_token = {self.end_token} must be a token id, from 0 on")
        if isinstance(self.end_token, str) and self.end_token not in ("auto", "none"):
            raise ConfigError(f"end_token = {self.end_token!r} must be auto, none or a token id")


_LENGTHS = ("context_length", "chunk_length", "eval_tokens")
"""Taken as ``16k`` or ``1m``, too."""
_PATHS = ("model", "output", "tape_dir", "cache_dir", "resume", "chat_template")
_DEFAULTS = FinetuneConfig()
_TYPES = typing.get_type_hints(FinetuneConfig)


def build_config(
    *,
    file: str | Path | None = None,
    pairs: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> FinetuneConfig:
    """A configuration from a YAML file, over which ``key=value`` pairs and options (those not None) win.

    Raises:
        ConfigError: for a key that does not exist, a setting that is given twice beside the file, a value of the wrong
            type, or an unreadable file.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values |= {_known(key): value for key, value in _read_yaml(Path(file)).items()}
    given = {_known(key): value for key, value in (options or {}).items() if value is not None}
    paired: set[str] = set()
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ConfigError(f"{shortened(repr(pair))} is not key=value")
        name = _known(key.strip())
        if name in paired or name in given:
            other = "another --set" if name in paired else f"--set {name}=VALUE and by its own option"
            raise ConfigError(f"{name} is given twice, by {other}; give it once")
        paired.add(name)
        try:
            values[name] = parse_yaml(text)
        except NotPlain as error:
            raise ConfigError(f"{shortened(repr(pair))}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{shortened(repr(pair))}: the value is not valid YAML") from error
    values |= given
    typed = {key: _typed(key, value) for key, value in values.items()}
    typed |= {key: expanded(typed[key]) for key in _PATHS if key in typed}
    return FinetuneConfig(**typed)


def _read_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    for key in values:
        try:
            _known(key)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return values


def _known(key: Any) -> str:
    """``key`` itself if it is a setting; dashes are as good as underscores."""
    name = str(key).replace("-", "_")
    if name in _TYPES:
        return name
    (near,) = difflib.get_close_matches(name, [*_TYPES, *_ELSEWHERE], n=1, cutoff=0.0)
    raise ConfigError(f"{shortened(key)} is not a setting; did you mean {_ELSEWHERE.get(near, near)}?")


def _typed(key: str, value: Any) -> Any:
    """``value`` as the type of the field ``key``."""
    name = _known(key)
    return as_type(key, value, _TYPES[name], length=name in _LENGTHS)
