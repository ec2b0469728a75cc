"""Options of ``generate`` and ``chat``: how the next token is chosen (:mod:`rwkv_rev.sampling`), and where."""

from typing import Annotated

import typer

from rwkv_rev.cli.counts import number, whole

Temperature = Annotated[
    float,
    typer.Option(
        parser=number(0),
        metavar="X",
        help="0 takes the likeliest token; higher is more random. Applied last, to what --top-p and --top-k leave.",
    ),
]
TopK = Annotated[
    int, typer.Option(parser=whole(0), metavar="N", help="Sample from so many likeliest tokens; 0: all.")
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        parser=number(0),
        metavar="X",
        help="Off the logits of tokens that were said already, the prompt apart.",
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        parser=number(0),
        metavar="X",
        help="The same for each time they were said; not for blanks and digits.",
    ),
]
PenaltyDecay = Annotated[
    float,
    typer.Option(
        parser=number(0, 1), metavar="X", help="What was said counts less, token by token, by this factor."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]


def top_p_option(default: float) -> typer.models.OptionInfo:
    """``--top-p``, of which ``default`` is what None stands for."""
    option: typer.models.OptionInfo = typer.Option(
        parser=number(0, 1),
        metavar="X",
        help=f"Sample from the likeliest tokens of this total probability.  [{default}]",
    )
    return option
