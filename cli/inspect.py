"""``rwkv-rev inspect``: what a checkpoint is, without loading its weights whole."""

from typing import Annotated

import typer

from rwkv_rev.cli import output


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Hub id, .pth file, folder, bundled:rwkv-4 or bundled:rwkv-5.2."
        ),
    ],
    file: Annotated[
        str | None, typer.Option(help="Which .pth of a repository that holds several: a name or a glob.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the version, sizes, dtype, tokenizer and forgetting of a checkpoint.

    Works on any SOURCE that convert takes, and on converted folders. Only headers and the decays are read.
    The bits a layer forgets per step and state element, log2(1/w), are what an exact reversal has to store.

    Examples:

      rwkv-rev inspect bundled:rwkv-5.2

      rwkv-rev inspect BlinkDL/rwkv-4-pile-169m --file '*8023.pth'
    """
    from rwkv_rev.converters.inspection import inspect_source

    found = inspect_source(source, file=file, revision=revision, progress=True)
    if as_json:
        output.print_json(found.to_dict())
        return
    output.print_fields(found.source, found.fields())
    output.print_text("")
    output.print_table(
        "Bits forgotten per step and state element",
        ["layer", *(f">{name}" for name in found.quantile_names)],
        [[layer, *(f"{bits:.3g}" for bits in row)] for layer, row in enumerate(found.bits_forgotten)],
    )
