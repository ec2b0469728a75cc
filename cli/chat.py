"""``rwkv-rev chat``: a conversation in the terminal, with the state carried from turn to turn."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import whole
from rwkv_rev.cli.sampling import (
    Device,
    FrequencyPenalty,
    PenaltyDecay,
    PresencePenalty,
    Temperature,
    TopK,
    top_p_option,
)
from rwkv_rev.errors import DataError, RwkvRevError
from rwkv_rev.folders.folder import refuse_no_model

HELP = """/reset       forget the conversation
/save FILE   write the state, which holds all that was said
/load FILE   go on from a saved state
/help        this
/exit        end the chat, as /quit and Ctrl-D do
Ctrl-C stops an answer."""
PROMPT = "> "


def chat(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    system: Annotated[str | None, typer.Option(help="Said before the first turn.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Most tokens of one answer.")
    ] = 2048,
    temperature: Temperature = 1.0,
    top_p: Annotated[float | None, top_p_option(0.3)] = None,
    top_k: TopK = 0,
    presence_penalty: PresencePenalty = 0.5,
    frequency_penalty: FrequencyPenalty = 0.5,
    penalty_decay: PenaltyDecay = 0.996,
    seed: Annotated[
        int | None, typer.Option(parser=whole(), metavar="N", help="Makes the answers repeatable.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another template than the tokenizer's.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Talk with a model in the terminal.

    Each line is a turn; the answer comes as it is made, until the model ends its turn. The model's state holds what was
    said, so nothing is read twice, however long the chat.

    Lines that begin with / are commands: /reset forgets the conversation, /save FILE writes the state, /load FILE goes
    on from one, /exit or /quit ends the chat, /help lists them. Ctrl-C stops an answer but not the chat; Ctrl-D ends
    the chat. From a pipe each line is a turn, too, answers go to stdout, and what cannot be done ends the chat, in an
    error.

    Examples:

      rwkv-rev chat my-model

      rwkv-rev chat my-model --system "Answer in one sentence." --temperature 0

      rwkv-rev chat my-model --top-p 0.5 < questions.txt
    """
    refuse_no_model(directory)  # before anything heavy is imported
    from rwkv_rev.continuation import refuse_without_effect
    from rwkv_rev.conversation import RWKV_SAMPLING
    from rwkv_rev.conversation import chat as opened
    from rwkv_rev.random_state import refuse_seed
    from rwkv_rev.sampling import Sampling

    refuse_without_effect(temperature, top_p, top_k)
    refuse_seed(seed)
    sampling = Sampling(
        temperature,
        RWKV_SAMPLING.top_p if top_p is None else top_p,
        top_k,
        presence_penalty,
        frequency_penalty,
        penalty_decay,
    )
    talk = opened(directory, system=system, chat_template=chat_template, device=device)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    asked = sys.stdin.isatty()
    if asked:
        out.note("/help lists the commands, /exit or Ctrl-D ends the chat")
    for line in _lines(asked):
        if line.rstrip() in ("/exit", "/quit"):
            return
        try:
            if line.startswith("/"):
                _command(talk, line)
            elif line.strip():
                _answer(talk, line, sampling, max_new_tokens)
        except RwkvRevError as error:
            if not asked:
                raise
            out.note(f"error: {error}")


def _answer(talk: Any, line: str, sampling: Any, max_new_tokens: int) -> None:
    with _interruptible() as stopped:
        talk.say(line, sampling, max_new_tokens=max_new_tokens, shown=_show, stop=stopped.is_set)
    _show("\n")


def _show(text: str) -> None:
    out.write(text)  # as it is: this is the model's own


def _command(talk: Any, line: str) -> None:
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/reset" and not rest:
        talk.reset()
        out.note("the conversation is forgotten")
    elif name == "/save" and rest:
        talk.save(rest)
        out.note(f"the state is in {rest}")
    elif name == "/load" and rest:
        talk.load(rest)
        out.note(f"the conversation goes on from {rest}")
    elif name == "/help" and not rest:
        for text in HELP.splitlines():
            out.note(text)
    elif name in ("/save", "/load"):
        raise DataError(f"{name} needs a file: {name} FILE")
    else:
        raise DataError(f"{name} is no command of the chat as it stands there; /help lists them")


def _lines(asked: bool) -> Iterator[str]:
    """What the user says, line by line, until the end of input."""
    if asked:
        with suppress(ImportError):  # arrow keys and history; not on Windows
            import readline  # noqa: F401
    with _keyboard(asked):
        while True:
            try:
                line = input(PROMPT) if asked else sys.stdin.readline()
            except EOFError:  # Ctrl-D
                out.note("")
                return
            except KeyboardInterrupt:
                if not asked:
                    raise
                out.note("")
                continue
            except UnicodeDecodeError as error:
                raise DataError(
                    f"what comes on stdin is no text in {error.encoding}: its byte {error.start} is none"
                ) from None
            if not asked and not line:
                return
            yield line.rstrip("\r\n")


@contextmanager
def _keyboard(asked: bool) -> Iterator[None]:
    """Ctrl-C, while the user types, clears the line."""
    before = signal.getsignal(signal.SIGINT)
    if not asked or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Ctrl-C sets the event instead of ending the program; a token is then finished, and the state whole."""
    stopped = Event()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a program in the background, told to ignore it
        yield stopped
        return
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
