"""What the model writes to some prompts at each evaluation (``sample_prompt``), so that people can read how it changes.

A text begins, as every document does, with the model's initial state, the tuned one where that is trained, and is what
``generate`` makes of the same weights with the same seed. Sampling leaves no trace in training: the random generators
are set back, and so is what was in training mode. Of several processes the first alone samples; the others wait for it
in their next step. Where they share the weights, all of them sample the same.
"""

import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv_rev.arguments import expanded
from rwkv_rev.continuation import TOP_P, continued
from rwkv_rev.conversation import Chat
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.loading import load_tokenizer
from rwkv_rev.printable import printable, shortened
from rwkv_rev.progress import beside_bars
from rwkv_rev.random_state import capture, restore
from rwkv_rev.sampling import Sampling
from rwkv_rev.tables import WIDTH
from rwkv_rev.tokenization.chat_template import read_template
from rwkv_rev.training.callbacks import read_log
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.sharded_model import apart
from rwkv_rev.training.tuning import language_model

SAMPLES_NAME = "samples.jsonl"
_MARGIN = "  | "


def read_prompts(given: list[str]) -> list[str]:
    """The texts of ``sample_prompt``: ``@FILE`` is what the file holds, without its last line end; ``@@`` is an @.

    Raises:
        ConfigError: for a file that cannot be read as text.
    """
    prompts = []
    for text in given:
        if text.startswith("@@"):
            text = text[1:]
        elif text.startswith("@"):
            text = _read(text[1:])
        prompts.append(text)
    return prompts


def _read(name: str) -> str:
    try:
        return Path(expanded(name)).read_text("utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        why = "is no UTF-8 text" if isinstance(error, UnicodeError) else f"cannot be read: {_reason(error)}"
        raise ConfigError(
            f"--sample-prompt @{shortened(name)}: the file {why}; @@ begins a prompt with an @"
        ) from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def run_tokenizer(config: FinetuneConfig) -> Any:
    """The model's tokenizer with the chat template of the run."""
    tokenizer = load_tokenizer(config.model)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    return tokenizer


def encoded_prompts(config: FinetuneConfig, tokenizer: Any, vocab_size: int) -> list[tuple[str, list[int]]]:
    """The prompts with their tokens.

    Raises:
        ConfigError, DataError: for a prompt without tokens, or with one that the model has no embedding for.
    """
    found = []
    for text in read_prompts(config.sample_prompt):
        ids = tokenizer(text)["input_ids"]
        if not ids or (not text.strip() and config.sample_chat):
            raise ConfigError("--sample-prompt holds no tokens; give at least one character")
        if max(ids) >= vocab_size:
            raise DataError(
                f"token id {max(ids)} of --sample-prompt {shortened(repr(text))} is outside the model's vocabulary of "
                f"{vocab_size}"
            )
        found.append((text, ids))
    return found


class Samples:
    """Samples of one run, kept in a file.

    Args:
        model: that is trained, or peft's wrapper of it.
        tokenizer: its own, with the chat template of the run.
        config: of the run.
        path: of the file, a JSON object a line: ``step``, ``prompt`` and ``text``, what was written after it.
        notify: takes one line at a time.

    Attributes:
        step: of the last samples; None before the first.

    Raises:
        ConfigError, DataError: for unusable prompts, and a chat template that chats cannot be held with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: FinetuneConfig,
        path: Path,
        notify: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.path, self.notify = path, notify
        self.step: int | None = None
        self._prompts = encoded_prompts(config, tokenizer, language_model(model).config.vocab_size)
        self._sampling = Sampling(config.sample_temperature, TOP_P)
        if config.sample_chat:
            Chat(language_model(model), tokenizer)  # refuses its template before the first step

    def begin(self, step: int) -> None:
        """Drop what was sampled after ``step``, which a run goes on from."""
        self._write([row for row in read_log(self.path) if row["step"] <= step])

    def take(self, step: int, first_process: bool) -> list[dict[str, Any]]:
        """The rows of one evaluation, which are written and told; none but in the first process."""
        self.step = step
        if not (first_process or self.config.shard_model):
            return []
        prompts, texts = [prompt for prompt, _ in self._prompts], apart(self.model, self._sampled)
        if not first_process:
            return []
        rows = [
            {"step": step, "prompt": prompt, "text": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        self._write([*(row for row in read_log(self.path) if row["step"] < step), *rows])
        with beside_bars():
            for number, row in enumerate(rows, 1):
                self.notify(f"step {step}, sample {number} of {len(rows)}:")
                for line in quoted(
                    f"{row['prompt']}{' -> ' if self.config.sample_chat else ''}{row['text']}"
                ):
                    self.notify(line)
        return rows

    def _sampled(self) -> list[str]:
        """What the model writes after each prompt, in evaluation mode; all else is left as it was."""
        lm = language_model(self.model)
        modes = [(module, module.training) for module in self.model.modules()]
        before = capture({parameter.device for parameter in lm.parameters()})
        self.model.eval()
        try:
            return [self._text(lm, prompt, ids) for prompt, ids in self._prompts]
        finally:
            restore(before)
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _text(self, lm: Any, prompt: str, ids: list[int]) -> str:
        torch.manual_seed(self.config.seed)
        most = self.config.sample_tokens
        if self.config.sample_chat:
            return Chat(lm, self.tokenizer).say(prompt, self._sampling, max_new_tokens=most)
        prompt_ids = torch.tensor([ids], device=next(lm.parameters()).device)
        tokens = continued(lm, self.tokenizer, prompt_ids, self._sampling, most)
        return str(self.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """All rows anew, beside the file and then in its place: a kill leaves one or the other."""
        fresh = self.path.with_name(f".{self.path.name}")
        with fresh.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


def quoted(text: str) -> list[str]:
    """Every character of a text in lines that fit a terminal, set off from messages; control characters escaped."""
    lines = []
    for line in text.split("\n"):
        pieces = textwrap.wrap(
            printable(line), WIDTH - len(_MARGIN), drop_whitespace=False, break_on_hyphens=False
        )
        lines += [f"{_MARGIN}{piece}" for piece in pieces or [""]]
    return lines
