"""``rwkv-rev adapter``: a LoRA in the layout of RWKV-PEFT or peft."""

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


def adapter(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The converted model that was adapted.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="RWKV-PEFT's .pth, or peft's folder.")],
    output: Annotated[Path, typer.Option(help="The .pth (rwkv-peft) or the folder (peft) to make.")],
    to: Annotated[
        Literal["rwkv-peft", "peft"],
        typer.Option(help="rwkv-peft: a .pth for its merge script. peft: for PeftModel.from_pretrained."),
    ] = "rwkv-peft",
    alpha: Annotated[
        float | None,
        typer.Option(
            parser=number(), metavar="X", help="lora_alpha of the training, for files that do not say it."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing .pth, at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the path.")] = False,
) -> None:
    """Write a LoRA for RWKV-PEFT or for peft, bit for bit.

    finetune --tune lora leaves one in the folder adapter of its output. RWKV-PEFT has room for the large maps alone:
    with others, which RWKV-6 and 7 have, it is refused.

    Examples:

      rwkv-rev adapter my-model tuned/adapter --output lora.pth

      rwkv-rev adapter my-model rwkv-0.pth --alpha 32 --to peft --output lora
    """
    refuse_both_prints(as_json, quiet)
    refuse_no_model(base)  # before anything heavy is imported
    output = expanded(output)
    check_output(
        output.absolute(),
        force=force,
        directory=to == "peft",
        reads=base if to == "peft" else None,
        inputs=[base, adapter],
    )
    from rwkv_rev.converters.adapter_export import save_adapter

    with telling_if_stopped(output):
        made = save_adapter(base, adapter, output, to=to, alpha=alpha, force=force)
    if as_json:
        out.print_json(made.to_dict())
    elif quiet:
        out.print_path(made.path)
    else:
        size = f"{counted(made.weights, 'linear map')} of rank {made.rank}"
        out.print_text(
            f"{printable(str(made.path))}: {size}, lora_alpha {made.alpha:g}, layout {made.layout}"
        )
