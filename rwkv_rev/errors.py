"""Errors meant for people: one line that says what is wrong and what would work.

The command line prints these without a traceback and exits with :attr:`RwkvRevError.exit_code`. Messages are written
with its options (``--force``); who calls from Python reads the arguments of the same names (``force=True``).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_FLAGS = (
    "force",
    "dry-run",
    "pack",
    "carry-state",
    "shard-optimizer",
    "shard-model",
    "checkpoint-blocks",
    "keep-best",
    "sample-chat",
    "reversal",
    "gradients",
)
_OPTION = re.compile(
    r"(?<![\w-])--(no-)?([a-z]+(?:-[a-z]+)*)(?![\w-])"
    r"(?: (?:([A-Z]+|world\|[\w|]+)|(auto|none|naive|rwkv-lm|rwkv|blinkdl|hf|disk|reversible|lora|float32))(?!\w))?"
)
_SET = re.compile(r"(?<![\w-])--set (?=\w+=)")
_COMMAND = re.compile(r"(\b(?:rwkv-rev|pip|accelerate|torchrun|hf auth) [^,;:)]*)")  # its options are its own
_on_command_line = False


@contextmanager
def options_in_messages() -> Iterator[None]:
    """Inside, messages keep the options of the command line."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def _as_arguments(text: str) -> str:
    return _OPTION.sub(_as_argument, _SET.sub("", text))


def _as_argument(option: re.Match[str]) -> str:
    negated, name, place, value = option.groups()
    argument = name.replace("-", "_")
    if negated or name in _FLAGS:
        return f"{argument}={not negated}" + (f" {place or value}" if place or value else "")
    return f"{argument}={place or repr(value)}" if place or value else argument


class RwkvRevError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        if _on_command_line:
            return text
        parts = _COMMAND.split(text)  # in between, and commands
        return "".join(part if i % 2 else _as_arguments(part) for i, part in enumerate(parts))


class ConfigError(RwkvRevError, ValueError):
    """A setting or argument that does not exist, has no usable value, or does not go with another."""

    exit_code = 2


class SourceError(RwkvRevError):
    """A ``SOURCE`` cannot be found, downloaded or told apart from several candidates."""


class CheckpointError(RwkvRevError):
    """A checkpoint file is damaged, of a foreign kind, or not an RWKV-4/5 model."""


class OutputError(RwkvRevError):
    """An output cannot be written where it was asked for."""


class DataError(RwkvRevError):
    """Training or evaluation data is empty, malformed or does not fit the model."""


class StrategyError(RwkvRevError, ValueError):
    """A gradient strategy was asked for something it cannot do; the message names one that can."""


class KernelError(RwkvRevError, ValueError):
    """A kernel was asked for by a name that does not exist, or given tensors whose shapes do not fit."""


class ContextParallelError(RwkvRevError):
    """The ranks of a context group do not do the same, or one of them has failed."""


class ReversalMismatchError(RwkvRevError):
    """A state rebuilt in the backward sweep is not the state the forward sweep left."""


class VerificationFailed(RwkvRevError):
    """A check ran to its end and the models differ."""

    exit_code = 3
