"""The ``rwkv-rev`` command line: thin wrappers that parse, call the library and print.

One row of :data:`COMMANDS` and one file ``cli/<name>.py`` with a function of the same name make a command, with a
``typer.Typer`` of that name several under one.
Only the file of the command that is asked for is imported, and such a file imports PyTorch in its
function's body, so that ``rwkv-rev --help`` stays instant. typer itself is imported once :func:`main` hears signals.
"""

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rwkv_rev.cli import output
from rwkv_rev.cli.stopping import exit_code, install_handlers, tell
from rwkv_rev.errors import RwkvRevError, options_in_messages

if TYPE_CHECKING:
    import typer

# name, one line of help; the function is rwkv_rev.cli.<name>.<name>
COMMANDS = (
    ("inspect", "Show version, sizes, tokenizer and forgetting of a checkpoint."),
    ("convert", "Rewrite a checkpoint as a verified Hugging Face model folder."),
    ("init", "Make a freshly initialised model, to be trained from scratch."),
    ("verify", "Prove that a converted model computes what its original computes."),
    ("export", "Write a converted model back in the original layouts, bit for bit."),
    ("state", "Tuned initial states as files: out of a model folder, into one, summed."),
    ("merge", "Merge an adapter of RWKV-PEFT or peft into the model it was trained on."),
    ("adapter", "Write a LoRA in the layout of RWKV-PEFT or peft."),
    ("publish", "Upload a model folder to the Hub, without the paths of this machine."),
    ("generate", "Continue a text with a converted model."),
    ("chat", "Talk with a model in the terminal."),
    ("finetune", "Train a model on your data, with the exact gradient of the whole context."),
    ("plan", "Memory, speed and tape of training over many GPUs, without any."),
    ("eval", "Bits per byte and perplexity by position in the context."),
    ("bench", "Measure speed, memory and tape on this machine."),
)

WRITE_NOTHING = ("inspect", "verify", "generate", "chat", "plan", "eval", "bench")
"""Of these it goes without saying that nothing was written when they were stopped; a chat saves what it is told to."""
PLOT = "--plot"
"""With which they do write something, at their end."""

HELP = """Convert pretrained RWKV-4 to 7 checkpoints to reversible cells and prove that nothing changed.

Start here: rwkv-rev convert bundled:rwkv-5.2 --output my-model

Exit codes: 0 done, 1 something it names or needs does not do, 2 the command
line or a setting is wrong by itself, 3 verification failed.
RWKV_REV_TRACEBACK=1 shows where an error came from.
"""


def build_app(requested: str | None = None) -> "typer.Typer":
    """The typer application; only ``requested`` is imported if given, the others are names with a help."""
    import typer

    from rwkv_rev.cli.usage import Command

    def options(
        version: bool = typer.Option(
            False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ) -> None:
        """Options of the program itself."""

    app = typer.Typer(
        name="rwkv-rev", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    app.callback(help=HELP)(options)
    for name, summary in COMMANDS:
        function = _load(name) if requested is None or name == requested else _not_loaded
        if isinstance(function, typer.Typer):  # a command of several, with a help of their own
            for each in function.registered_commands:
                each.help = _help(each.callback)
            app.add_typer(function, name=name, help=_help(function.info), short_help=summary)
        else:
            app.command(name, cls=Command, help=_help(function), short_help=summary)(function)
    return app


@options_in_messages()
def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code.

    Args:
        argv: arguments without the program's name; those of the process when None.
    """
    install_handlers()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _main(arguments)
    except BaseException as error:
        if (code := exit_code(error)) is not None:
            # unless the command told of more
            plots = any(argument.partition("=")[0] == PLOT for argument in arguments)
            tell(None if _requested(arguments) in WRITE_NOTHING and not plots else "nothing was written")
            raise SystemExit(code) from None
        if isinstance(error, Exception):
            _fail(error)
        raise


def _main(arguments: list[str]) -> NoReturn:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    output.write_anything()
    _quiet_libraries()
    warnings.showwarning = _show_warning
    completing = "_RWKV_REV_COMPLETE" in os.environ
    app = build_app(None if completing else _requested(arguments))
    import typer

    left = typer.main.get_command(app).main(arguments, prog_name="rwkv-rev", standalone_mode=False)
    raise SystemExit(left or 0)


def _requested(arguments: Sequence[str]) -> str:
    """The command's name."""
    return next((word for word in arguments if not word.startswith("-")), "")


def _quiet_libraries() -> None:
    """No chatter of the libraries, and no progress bars of theirs unless somebody watches them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr.isatty():
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # it has read the environment already
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _print_version(wanted: bool) -> None:
    if wanted:
        import typer

        from rwkv_rev.version import __version__

        output.write(f"{__version__}\n")
        raise typer.Exit()


def _help(function: Any) -> str:
    """The docstring (of several commands the help), its examples with the line ends that they have there: they are
    pasted."""
    written = getattr(function, "help", None) or function.__doc__ or ""
    text, mark, examples = cleandoc(written).partition("Examples:\n\n")
    kept = "\b\n"  # click's mark of a paragraph that is not to be wrapped
    return text + mark + "\n\n".join(kept + example for example in examples.split("\n\n") if example)


def _load(name: str) -> Any:
    return getattr(importlib.import_module(f"rwkv_rev.cli.{name}"), name)


def _not_loaded() -> None:
    raise AssertionError("only the requested command is loaded")


def _fail(error: Exception) -> NoReturn:
    from rwkv_rev.cli.usage import UsageError, told
    from rwkv_rev.printable import one_message, shortened

    if os.environ.get("RWKV_REV_TRACEBACK") == "1":
        raise error
    if isinstance(error, UsageError):
        if not str(error).startswith("Usage:"):
            output.note(f"error: {told(error)}")
        else:  # of no words at all: the help
            sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    if isinstance(error, RwkvRevError):
        output.note(f"error: {one_message(error)}")
        raise SystemExit(error.exit_code) from None
    full = (errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
    if isinstance(error, OSError) and error.errno in full:
        name = shortened(error.filename) if error.filename else "a file"
        output.note(f"error: {name} cannot be written: {error.strerror}; make room on its disk")
        raise SystemExit(1) from None
    kind, hint = type(error).__name__, "RWKV_REV_TRACEBACK=1 shows where it came from"
    output.note(f"error: unexpected {kind}: {one_message(error)} ({hint})")
    raise SystemExit(1) from None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    from rwkv_rev.printable import one_message

    output.note(f"warning: {one_message(message)}")
