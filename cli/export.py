"""``rwkv-rev export``: back to the layouts of other tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rwkv_rev.arguments import expanded
from rwkv_rev.cli import output as out
from rwkv_rev.cli.options import refuse_both_prints, shard_size
from rwkv_rev.cli.stopping import telling_if_stopped
from rwkv_rev.folders.folder import refuse_no_model
from rwkv_rev.folders.safe_output import check_output
from rwkv_rev.printable import counted, printable


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    output: Annotated[Path, typer.Option(help="The .pth file (blinkdl) or the folder (hf, fla) to make.")],
    to: Annotated[
        Literal["blinkdl", "hf", "fla"],
        typer.Option(
            help="blinkdl: one .pth for the rwkv package. hf: transformers' RWKV-4, the published v5 and v6 "
            "repositories, or flash-linear-attention's RWKV-7. fla: flash-linear-attention's, of RWKV-6 and 7."
        ),
    ] = "blinkdl",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of a folder.  [5GB]", callback=shard_size)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output, at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the path.")] = False,
) -> None:
    """Write a converted model back in its original layout, bit for bit.

    Names, shapes, values and dtypes are those of the checkpoint the model was converted from, or those of the
    fine-tuned model.

    Examples:

      rwkv-rev export my-model --output my-model.pth

      rwkv-rev export my-model --to hf --output my-model-hf
    """
    refuse_both_prints(as_json, quiet)
    output = expanded(output)
    refuse_no_model(directory)  # before anything heavy is imported
    check_output(output.absolute(), force=force, directory=to != "blinkdl", reads=directory)
    from rwkv_rev.converters.export import export as run

    with telling_if_stopped(output):
        result = run(directory, output, to=to, force=force, max_shard_size=max_shard_size)
    if result.note:
        out.note(f"note: {result.note}")
    if result.not_finite:
        more = f" and {counted(len(result.not_finite) - 1, 'more tensor')}" if result.not_finite[1:] else ""
        out.note(
            f"warning: {result.not_finite[0]}{more}: NaN or infinity, written as it is; training diverged?"
        )
    if as_json:
        out.print_json(result.to_dict())
    elif quiet:
        out.print_path(result.path)
    else:
        size = out.human_bytes(result.nbytes)
        out.print_text(
            f"{printable(str(result.path))}: {result.tensors} tensors, {size}, layout {result.layout}"
        )
