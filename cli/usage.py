"""Usage errors in one line: what is wrong with the words of a command, and what would work."""

import difflib
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of typer, whose own copy of click has no public name."""


class Command(TyperCommand):
    """One whose options are given once, those apart that take several values that way."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises BadParameter for an option that stands there twice: the last one would win in silence."""
        parsed: Any = self.make_parser(ctx).parse_args(list(args))
        for param, times in Counter(parsed[2]).items():
            if times > 1 and param.param_type_name == "option" and not getattr(param, "multiple", False):
                raise typer.BadParameter(f"it is given {times} times; give it once", ctx=ctx, param=param)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What may be given several times is shown as ``<path>``, as elsewhere, not as ``<list[Path]>``."""
        for param in self.params:
            if (shown := getattr(param, "display_type", None)) is not None:  # typer's, of some versions
                setattr(param, "display_type", partial(_of_one, shown))  # noqa: B010 (another one for this object)
        super().format_help(ctx, formatter)


def _of_one(shown: Callable[[Any], str], ctx: Any) -> str:
    return re.sub(r"list\[(\w+)\]", lambda kind: kind[1].lower(), shown(ctx))


def told(error: Any) -> str:
    """A usage error of typer in one line."""
    ctx = error.ctx
    message = str(error.format_message()).replace("Value error, ", "")
    if hasattr(error, "possibilities"):
        message = f"there is no option {error.option_name}{_nearest(error.option_name, ctx)}"
    help_ = "" if ctx is None else f" ({ctx.command_path} --help)"
    return f"{message[:1].lower()}{message[1:].rstrip('.')}{help_}"


def _nearest(name: str, ctx: Any) -> str:
    known = [] if ctx is None else [option for param in ctx.command.params for option in param.opts]
    near = difflib.get_close_matches(
        name, [option for option in known if option.startswith("-")], n=1, cutoff=0.5
    )
    return f"; did you mean {near[0]}?" if near else ""
