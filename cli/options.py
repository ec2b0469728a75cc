"""Options and checks that several commands share: a wrong value, or one without effect, is a usage error (exit 2)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

Adapter = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A LoRA of this model, in peft's layout.")
]
Quantise = Annotated[
    Literal["nf4", "int8"] | None,
    typer.Option(
        help="Linear maps in 4 or 8 bits, as finetune --quantise trains beside; needs bitsandbytes."
    ),
]

DEFAULT_SHARD_SIZE = "5GB"


def shard_size(value: str | None) -> str | None:
    """Callback of ``--max-shard-size``."""
    if value is not None and value != DEFAULT_SHARD_SIZE:
        from rwkv_rev.converters.rewriter import parse_size
        from rwkv_rev.errors import OutputError

        try:
            parse_size(value)
        except OutputError as error:
            raise typer.BadParameter(str(error)) from error
    return value


def given(ctx: typer.Context) -> set[str]:
    """Names of the arguments that were written on the command line."""
    return {
        name
        for name in ctx.params
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def refuse_meaningless(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise BadParameter for the first of ``names`` that was given, where it would be without effect."""
    written = given(ctx)
    for param in ctx.command.params:
        if param.name in written and param.name in names:
            raise typer.BadParameter(f"without effect {why}; leave it out", param_hint=param.opts[0])


def refuse_both_prints(as_json: bool, quiet: bool) -> None:
    """Raise BadParameter for two ways to print the same."""
    if as_json and quiet:
        raise typer.BadParameter("without effect beside --json; leave one of them out", param_hint="--quiet")
