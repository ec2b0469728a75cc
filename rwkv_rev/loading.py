"""Configuration, model and tokenizer of a folder through transformers, with one line for whatever it cannot load.

Over damaged files the library raises all kinds, in many lines, and logs what it read; and it asks whether it may run
code that a folder brings. Here every failure names the folder, nothing is logged, and no code is run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import CheckpointError, ConfigError, RwkvRevError, SourceError
from rwkv_rev.folders.safe_input import read_object, refuse_special_inside
from rwkv_rev.foreign.quantised import quantise, refuse_unusable, told_to_peft
from rwkv_rev.printable import shortened


def load_config(directory: str | Path) -> RwkvRevConfig:
    """The configuration of a model folder.

    Raises:
        SourceError, CheckpointError: if config.json cannot be read, or says what no model can be.
    """
    path = Path(directory) / "config.json"
    read_object(path)
    with damaged(f"{path} is damaged"):
        config = RwkvRevConfig.from_pretrained(str(directory))
    if config.dtype is not None and not getattr(config.dtype, "is_floating_point", False):
        raise CheckpointError(f"{path} is damaged: dtype = {shortened(config.dtype)}, which no weights have")
    return config


def load_model(directory: str | Path, device: torch.device | str, dtype: torch.dtype | str) -> Any:
    """The model of a folder whose tensors are known to fit its configuration (``ConvertedModel``).

    Args:
        device: where it is to be; it is read on the CPU.
        dtype: of its weights; ``auto`` for the stored one.

    Raises:
        CheckpointError: if a file beside the weights is damaged.
    """
    from rwkv_rev.modeling import RwkvRevForCausalLM

    with damaged(f"{directory} cannot be loaded"):
        model: Any = RwkvRevForCausalLM.from_pretrained(str(directory), dtype=dtype)
        _check_generation(model)
    return model.to(device)


def load_quantised(directory: str | Path, device: torch.device, dtype: torch.dtype, kind: str) -> Any:
    """The model of a folder, linear maps frozen as a kind of :mod:`rwkv_rev.foreign.quantised`, all else in ``dtype``.

    The maps are made from the stored values, one after another on ``device``.

    Raises:
        RwkvRevError: where that kind cannot be had. CheckpointError: as :func:`load_model`.
    """
    refuse_unusable(kind, device)
    model = load_model(directory, "cpu", "auto")
    quantise(model, kind, dtype, device)
    told_to_peft(model, kind)
    kept = model._keep_in_fp32_modules_strict
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers within."""
    from transformers.utils import logging as progress

    bars = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            progress.enable_progress_bar()


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        SourceError: if there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from rwkv_rev.token_fields import refuse_unknown_fields

    refuse_special_inside(Path(name))
    if (missing := missing_tokenizer(name)) is not None:
        raise SourceError(missing)
    with damaged(f"no tokenizer can be loaded from {name}: name one with convert --tokenizer", SourceError):
        refuse_unknown_fields(Path(name))
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise ValueError(f"model_max_length = {longest!r}")
        return tokenizer


def missing_tokenizer(directory: str | Path) -> str | None:
    """What is wrong with a model folder that holds no tokenizer; None for whatever else."""
    folder = Path(directory)
    if (folder / "tokenizer_config.json").is_file() or not (folder / "config.json").is_file():
        return None
    return f"no tokenizer in {directory}; save it there: tokenizer.save_pretrained({str(directory)!r})"


def _check_generation(model: Any) -> None:
    """ValueError for a generation_config.json that could not be used, or not be saved again after a whole training."""
    settings = model.generation_config
    if settings is None:
        return
    settings.validate(strict=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(settings, name)
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if type(token) is not int or not 0 <= token < model.config.vocab_size:
                raise ValueError(f"generation_config.json: {name} = {shortened(repr(given))} is no token id")


@contextmanager
def damaged(what: str, kind: type[RwkvRevError] = CheckpointError) -> Iterator[None]:
    """Say ``what`` and the library's reason, in one line, and keep its log to itself."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError | RwkvRevError) and not isinstance(error, ConfigError):
            raise  # of a file, which it names; a setting here is one that a file has
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what} ({shortened(reason, 300)})") from error
    finally:
        log.setLevel(level)
