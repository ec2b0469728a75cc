"""``rwkv-rev state``: tuned initial states as files of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rwkv_rev.arguments import expanded
from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import counts, number
from rwkv_rev.cli.options import refuse_both_prints
from rwkv_rev.cli.stopping import telling_if_stopped
from rwkv_rev.cli.usage import Command
from rwkv_rev.folders.folder import refuse_no_model
from rwkv_rev.folders.safe_output import check_output
from rwkv_rev.printable import counted, printable

if TYPE_CHECKING:
    from rwkv_rev.converters.tuned_states import StateFile

state = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Tuned initial states as files of their own: out of a model folder, into one, and summed.

    A state is what a context begins with, [H, N, N] in each layer (RWKV-5, 6 and 7): finetune --tune state makes one.
    Files: RWKV-LM's and RWKV-PEFT's .pth, and web-rwkv's .safetensors, which has float16 and the other order of
    indices. Both are known by their format, whatever they are called.

    Examples:

      rwkv-rev state save my-model --output poet.pth

      rwkv-rev state load my-model poet.pth --output my-poet

      rwkv-rev state merge poet.pth cook.pth --weights 0.7,0.3 --output both.pth
    """,
)

To = Annotated[
    Literal["rwkv-lm", "web-rwkv"],
    typer.Option(
        help="rwkv-lm: a .pth for RWKV-LM, RWKV-PEFT and the rwkv package, every bit. web-rwkv: safetensors for "
        "web-rwkv, Ai00 and RWKV Runner, rounded to float16."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output, at the end.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the path.")]


@state.command("save", cls=Command)
def save(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A model folder with a tuned state, or a state file.")
    ],
    output: Annotated[Path, typer.Option(help="The file to make.")],
    to: To = "rwkv-lm",
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model's tuned initial state as a file of its own.

    Of a state file it makes one in the other layout.

    Examples:

      rwkv-rev state save my-model --output poet.pth

      rwkv-rev state save poet.pth --to web-rwkv --output poet.st
    """
    refuse_both_prints(as_json, quiet)
    source, output = expanded(source), expanded(output)
    if source.is_dir():
        refuse_no_model(source)  # before anything heavy is imported
    check_output(output.absolute(), force=force, directory=False, inputs=[source])
    from rwkv_rev.converters.tuned_states import save_state

    with telling_if_stopped(output):
        made = save_state(source, output, to=to, force=force)
    _print_file(made, as_json, quiet)


@state.command("load", cls=Command)
def load(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    file: Annotated[
        Path, typer.Argument(metavar="STATE", help="A state file, or a folder with a tuned state.")
    ],
    output: Annotated[Path, typer.Option(help="The model folder to make.")],
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model folder whose contexts begin with a state.

    Every weight stays as it is; a state that DIR has is replaced. Without a new folder: generate --state.

    Examples:

      rwkv-rev state load my-model poet.pth --output my-poet
    """
    refuse_both_prints(as_json, quiet)
    refuse_no_model(directory)
    output = expanded(output)
    check_output(output.absolute(), force=force, directory=True, reads=directory, inputs=[expanded(file)])
    from rwkv_rev.converters.tuned_states import load_state

    with telling_if_stopped(output):
        made = load_state(directory, expanded(file), output, force=force)
    if as_json:
        out.print_json({"path": str(made)})
    elif quiet:
        out.print_path(made)
    else:
        out.print_text(f"wrote {printable(str(made))}: contexts begin with {printable(str(file))}")


@state.command("merge", cls=Command)
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="STATE", help="State files, or folders with a tuned state.")
    ],
    output: Annotated[Path, typer.Option(help="The file to make.")],
    weights: Annotated[
        str | None, typer.Option(metavar="X,X", help="One for each state, of any sign.  [the mean]")
    ] = None,
    to: To = "rwkv-lm",
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the weighted sum of several states, as float32.

    They have one shape, number of layers and generation.

    Examples:

      rwkv-rev state merge poet.pth cook.pth --weights 0.7,0.3 --output both.pth
    """
    refuse_both_prints(as_json, quiet)
    shares = None if weights is None else counts(weights, "--weights", number())
    output = expanded(output)
    check_output(output.absolute(), force=force, directory=False, inputs=map(expanded, sources))
    from rwkv_rev.converters.tuned_states import merge_states

    with telling_if_stopped(output):
        made = merge_states(
            [expanded(source) for source in sources], output, weights=shares, to=to, force=force
        )
    _print_file(made, as_json, quiet)


def _print_file(made: "StateFile", as_json: bool, quiet: bool) -> None:
    if made.note:
        out.note(f"note: {made.note}")
    if as_json:
        out.print_json(made.to_dict())
    elif quiet:
        out.print_path(made.path)
    else:
        sizes = f"{counted(made.layers, 'layer')} of {counted(made.heads, 'head')} of {made.head_size}"
        out.print_text(f"{printable(str(made.path))}: {sizes}, {made.dtype}, layout {made.layout}")
