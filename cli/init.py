"""``rwkv-rev init``: a freshly initialised model folder."""

from pathlib import Path
from typing import Annotated

import typer

from rwkv_rev.architectures.registry import ARCHITECTURES
from rwkv_rev.arguments import expanded
from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import whole
from rwkv_rev.cli.stopping import telling_if_stopped
from rwkv_rev.counts import is_plain, number
from rwkv_rev.printable import printable


def init(
    architecture: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(ARCHITECTURES)}.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the configuration; may be repeated."),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="byte, world, neox, a path or a Hub id.")] = "byte",
    seed: Annotated[int, typer.Option(parser=whole(0), metavar="N", help="Of the weights.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing model folder, only when all is done.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the folder's path.")] = False,
) -> None:
    r"""Make a freshly initialised model, to be trained from scratch.

    Of every architecture that there is; sizes follow from hidden_size, the vocabulary from the tokenizer. The folder
    is like a converted one: finetune, eval, generate, inspect and verify take it.

    Examples:

      rwkv-rev init --architecture linear-attention --output my-model

      rwkv-rev init --architecture 5.2 --output my-model \
        --set hidden_size=256 --set num_hidden_layers=6
    """
    from rwkv_rev.fresh import init as run
    from rwkv_rev.training.plain_yaml import parse_yaml

    settings = {}
    for pair in set_ or ():
        name, mark, value = pair.partition("=")
        try:
            if not mark:
                raise ValueError
            read = parse_yaml(value)
            text = type(read) is str and is_plain(read)  # YAML reads 1e-4, without a dot, as one
            settings[name.strip()] = number(read) if text else read
        except ValueError:
            raise typer.BadParameter(f"{printable(pair)} is not FIELD=VALUE", param_hint="--set") from None
    with telling_if_stopped(expanded(output)):
        made = run(
            architecture, expanded(output), settings=settings, tokenizer=tokenizer, seed=seed, force=force
        )
    if as_json:
        out.print_json(made.to_dict())
    elif quiet:
        out.print_path(made.directory)
    else:
        config = made.config
        fields: dict[str, object] = {
            "architecture": config.architecture.called,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
            **config.architecture.facts(config),
            "parameters": f"{made.parameters:,}",
        }
        out.print_fields("Fresh model", fields)
        out.print_text(f"\nwrote {printable(str(made.directory))}")
