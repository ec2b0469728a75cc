"""``rwkv-rev verify``: a converted model against the original implementation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import count
from rwkv_rev.folders.folder import refuse_no_model
from rwkv_rev.tables import of_width


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model folder.")],
    original: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What to compare with; DIR itself for its own values. Default: what it was converted from.",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="With --original: which checkpoint of several, a name or a glob.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="With --original: branch, tag or commit of a Hub repository.")
    ] = None,
    oracle: Annotated[
        Literal["auto", "rwkv", "transformers", "naive"],
        typer.Option(help="Original implementation; auto runs every one that can run."),
    ] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to read. Default: Python's language reference."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(parser=count, metavar="T", help="How many tokens of it: 1024, 16k, 1m.")
    ] = 1024,
    reversal: Annotated[
        bool | None,
        typer.Option(
            "--reversal/--no-reversal",
            help="Run states backwards and compare bits.  [default: below 50M parameters]",
        ),
    ] = None,
    gradients: Annotated[
        bool | None,
        typer.Option(
            "--gradients/--no-gradients",
            help="Compare every gradient strategy with float64.  [default: below 50M parameters]",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="T",
            help="Tokens for these two checks.  [default: 4096 for reversal, 512 for gradients]",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="C",
            help="Their chunk length.  [default: 256 for reversal, 96 for gradients]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    r"""Prove that a converted model computes what its original computes.

    Compares every stored value, and the logits over real text, with the rwkv package, with transformers
    (RWKV-4) and with a float64 scan; where float32's rounding is in question, both in float64. The first layer
    that differs is named. Then runs states backwards over a text
    and compares every gradient strategy with float64 back-propagation. Exit code 3 if anything fails.

    Examples:

      rwkv-rev verify my-model

      rwkv-rev verify my-model --oracle rwkv --tokens 4096 --text book.txt

      rwkv-rev verify my-model --reversal --gradients --context 4096 --chunk 256

      rwkv-rev verify my-model \
        --original BlinkDL/rwkv-4-pile-169m --file '*8023.pth'
    """
    refuse_no_model(directory)  # before anything heavy is imported
    from rwkv_rev.equivalence.verification import verify_directory
    from rwkv_rev.errors import VerificationFailed

    report = verify_directory(
        directory,
        original=original,
        file=file,
        revision=revision,
        oracle=oracle,
        text=text,
        tokens=tokens,
        reversal=reversal,
        gradients=gradients,
        context=context,
        chunk=chunk,
        progress=True,
    )
    if as_json:
        out.print_json(report.to_dict())
    else:
        with of_width(out.width()):
            out.print_text(report.table())
    if not report.passed:
        raise VerificationFailed(report.summary)
