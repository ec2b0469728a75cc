"""``rwkv-rev convert``: a checkpoint becomes a verified model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rwkv_rev.arguments import expanded
from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import number
from rwkv_rev.cli.options import DEFAULT_SHARD_SIZE, refuse_both_prints, shard_size
from rwkv_rev.cli.stopping import telling_if_stopped
from rwkv_rev.folders.source import parse_source
from rwkv_rev.printable import printable
from rwkv_rev.tables import of_width

if TYPE_CHECKING:
    from rwkv_rev.conversion import Conversion


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Hub id, .pth file, folder, bundled:rwkv-4, -5.2, -6 or -7."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to make (default: the source's name with -rev).")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Which .pth of a repository that holds several: a name or a glob.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Stored dtype; auto keeps every tensor's own."),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, such as 200MB or 512MiB.", callback=shard_size)
    ] = DEFAULT_SHARD_SIZE,
    group_norm_eps: Annotated[
        float | None,
        typer.Option(
            parser=number(),
            metavar="X",
            help="GroupNorm eps of RWKV-5: 1e-5 if it was trained without the division by 8.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="world, byte, neox, a path or a Hub id; none leaves it out (default: by vocabulary)."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare logits with the original over 256 tokens before the folder appears.")
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List files, sizes, shards and config; download and write nothing."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing model folder, only when all is done.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="Upload the folder to this Hub repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the folder's path.")] = False,
) -> None:
    """Rewrite a checkpoint as a Hugging Face model folder and prove that nothing changed.

    Weights are streamed: a checkpoint larger than memory converts. The folder appears whole or not at all; if
    verification fails it is not kept and the exit code is 3.

    Examples:

      rwkv-rev convert bundled:rwkv-5.2 --output my-model

      rwkv-rev convert BlinkDL/rwkv-4-pile-169m --file '*8023.pth'

      rwkv-rev convert RWKV/v5-Eagle-7B-HF --max-shard-size 2GB --dry-run
    """
    refuse_both_prints(as_json, quiet)
    output = None if output is None else expanded(output)
    # a wrong one is told of before anything heavy is imported
    parse_source(source, file=file, revision=revision)
    if push_to_hub is not None and not dry_run:
        from rwkv_rev.folders.publish import refuse_unpublishable

        refuse_unpublishable(push_to_hub)
    from rwkv_rev.conversion import ConversionDiffers
    from rwkv_rev.conversion import convert as run

    try:
        with telling_if_stopped(output):
            result = run(
                source,
                output,
                file=file,
                revision=revision,
                dtype=dtype,
                group_norm_eps=group_norm_eps,
                verify=verify,
                force=force,
                max_shard_size=max_shard_size,
                tokenizer=tokenizer,
                progress=not quiet,
                dry_run=dry_run,
            )
    except ConversionDiffers as error:
        if as_json:
            out.print_json({"written": False, "verification": error.report.to_dict()})
        else:
            with of_width(out.width()):
                out.print_text(str(error.report.table()))
        raise
    for note in result.notes:
        out.note(f"note: {note}")
    if push_to_hub is not None and not dry_run:
        from rwkv_rev.folders.publish import publish

        out.note(f"uploaded to {publish(result.directory, push_to_hub)}")
    if as_json:
        out.print_json(result.to_dict())
    elif quiet:
        out.print_path(result.directory)
    else:
        _print(result)


def _print(result: "Conversion") -> None:
    size = out.human_bytes
    if not result.written:
        rows = [[name, "?" if count is None else size(count)] for name, count in result.files]
        out.print_table("Source files", ["file", ">size"], rows)
    if result.config is None:
        out.note("note: the config and the shards are known once these files are in the cache")
    if result.shards:
        rows = [[s.filename, size(s.nbytes), f"{len(s.entries)}"] for s in result.shards]
        out.print_table(f"Weights of {result.directory}", ["file", ">size", ">tensors"], rows)
    if result.config is not None:
        config = result.config
        fields: dict[str, object] = {
            "version": config.architecture.called,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "channel mix width": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "dtype": str(config.dtype).removeprefix("torch."),
        }
        out.print_fields("Config", fields | config.architecture.facts(config))
    if result.verification is not None:
        with of_width(out.width()):
            out.print_text("\n" + str(result.verification.table()))
    name = printable(str(result.directory))
    out.print_text(f"\n{'wrote' if result.written else 'would write'} {name}")
