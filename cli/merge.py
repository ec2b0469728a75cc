"""``rwkv-rev merge``: an adapter into the weights of its base."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rwkv_rev.arguments import expanded
from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import number
from rwkv_rev.cli.options import refuse_both_prints
from rwkv_rev.cli.stopping import telling_if_stopped
from rwkv_rev.folders.folder import refuse_no_model
from rwkv_rev.folders.safe_output import check_output
from rwkv_rev.printable import counted, printable


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The converted model that was adapted.")],
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="RWKV-PEFT's .pth (LoRA, PiSSA, DiSHA) or peft's folder (LoRA)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The model folder to make.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            parser=number(),
            metavar="X",
            help="lora_alpha of a LoRA's training, for files that do not say it.",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="init_pissa.pth of the training: the adapter is a PiSSA."),
    ] = None,
    save_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Stored dtype of the weights that change; auto is float32."),
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing model folder, only when all is done.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the folder's path.")] = False,
) -> None:
    r"""Merge an adapter into the model that it was trained on.

    LoRA: W + alpha / rank B A. PiSSA: W - B0 A0 + B A, with what training began with. DiSHA (bone, bat) as RWKV-PEFT
    has it. Ranks and targets are read from the file; so is alpha, where the file has it: RWKV-PEFT's have not. A PiSSA
    looks like a LoRA in its file, and is merged as one, wrongly, if --alpha is given in the place of --init. An adapter
    of other shapes or layers is refused, and one that says that it is of another generation: RWKV-PEFT's do not say.
    Weights that do not change keep every bit. Other methods of peft, and their variants, merge by peft's
    merge_and_unload.

    Examples:

      rwkv-rev merge my-model tuned/adapter --output merged

      rwkv-rev merge my-model rwkv-0.pth --alpha 32 --output merged

      rwkv-rev merge my-model rwkv-0.pth --init init_pissa.pth \
        --output merged
    """
    refuse_both_prints(as_json, quiet)
    refuse_no_model(base)  # before anything heavy is imported
    output = expanded(output)
    check_output(output.absolute(), force=force, directory=True, reads=base, inputs=[adapter, init])
    from rwkv_rev.converters.merging import merge as run

    with telling_if_stopped(output):
        made = run(base, adapter, output, alpha=alpha, init=init, save_dtype=save_dtype, force=force)
    if as_json:
        out.print_json(made.to_dict())
    elif quiet:
        out.print_path(made.path)
    else:
        fields: dict[str, object] = {
            "adapter": f"{made.kind} of {', '.join(made.targets)}",
            "rank": ", ".join(map(str, made.ranks)),
        }
        if made.kind == "LoRA":
            fields["alpha"] = ", ".join(f"{value:g}" for value in made.alphas)
        fields["changed"] = counted(made.weights, "linear map") + (
            f", {counted(made.replaced, 'whole tensor')}" if made.replaced else ""
        )
        out.print_fields("Merged model", fields)
        out.print_text(f"\nwrote {printable(str(made.path))}")
