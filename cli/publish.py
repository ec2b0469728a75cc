"""``rwkv-rev publish``: a model folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.cli.stopping import tell
from rwkv_rev.folders.folder import refuse_no_model


def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the Hub.")],
) -> None:
    """Upload a model folder in one commit: what convert --push-to-hub and finetune --push-to-hub do at their end.

    Hidden files, links and TensorBoard's files, which hold paths of this machine, stay here.

    Examples:

      rwkv-rev publish my-model me/my-model
    """
    refuse_no_model(directory)  # before anything heavy is imported
    from rwkv_rev.folders.publish import publish as run
    from rwkv_rev.folders.publish import refuse_unpublishable

    refuse_unpublishable(repository)
    try:
        address = run(directory, repository)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        tell("the Hub has all of this upload or nothing")
        raise
    out.print_text(address)
