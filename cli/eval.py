"""``rwkv-rev eval``: does a long context help?"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import count, whole
from rwkv_rev.cli.options import Adapter, Quantise
from rwkv_rev.folders.folder import refuse_no_model
from rwkv_rev.training.records import refuse_half_named
from rwkv_rev.training.sources import find_sources

if TYPE_CHECKING:
    from rwkv_rev.training.evaluate import Evaluation


def at_least_two(text: str | int) -> int:
    """Tokens of a row: one alone predicts nothing."""
    if (number := count(text)) < 2:
        raise typer.BadParameter(f"{number} is too short: a row needs at least 2 tokens")
    return number


def eval(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Files, folders, globs or hf:owner/name, of the kinds that finetune reads; repeatable.",
            show_default=False,
        ),
    ],
    context_length: Annotated[
        int,
        typer.Option(parser=at_least_two, metavar="T", help="Tokens per row, or 16k; every row begins anew."),
    ] = 16384,
    batch_size: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Rows at once.")] = 1,
    max_tokens: Annotated[
        int, typer.Option(parser=whole(0), metavar="N", help="Read at most about so many tokens; 0 for all.")
    ] = 0,
    text_field: Annotated[str | None, typer.Option(help="Field of the text in records.  [text]")] = None,
    prompt_field: Annotated[
        str | None, typer.Option(help="Field of the prompt; not scored.  [prompt]")
    ] = None,
    completion_field: Annotated[
        str | None, typer.Option(help="Field of the completion.  [completion]")
    ] = None,
    messages_field: Annotated[str | None, typer.Option(help="Field of a list of turns.  [messages]")] = None,
    data_format: Annotated[
        str, typer.Option(help="auto, text, completion, messages, instruction or chosen.")
    ] = "auto",
    train_on: Annotated[
        Literal["assistant", "all", "last"] | None,
        typer.Option(help="What is scored, as in finetune.  [the assistant's turns]", show_default=False),
    ] = None,
    adapter: Adapter = None,
    quantise: Quantise = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw bits per byte by position.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
    cache_dir: Annotated[
        str | None,
        typer.Option(
            help="Where tokenised data is kept (default: tokens in $RWKV_REV_CACHE, else in rwkv-rev under $HF_HOME)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    r"""Bits per byte and perplexity of a model on a text, by position in the context.

    If the numbers fall from bucket to bucket, the model uses what lies that far back. Streaming: memory does not
    grow with --context-length.

    Examples:

      rwkv-rev eval my-model --data book.txt --context-length 65536

      rwkv-rev eval my-book --data book.txt \
        --context-length 1048576 --plot positions.png
    """
    refuse_half_named(
        text_field, prompt_field, completion_field, messages_field
    )  # before anything heavy is imported
    refuse_no_model(directory)
    find_sources(data)
    from rwkv_rev.training.evaluate import evaluate_directory
    from rwkv_rev.training.plots import plot_buckets, refuse_plot

    if plot is not None:
        refuse_plot(plot)
    result = evaluate_directory(
        directory,
        data,
        context_length=context_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        text_field=text_field,
        prompt_field=prompt_field,
        completion_field=completion_field,
        messages_field=messages_field,
        data_format=data_format,
        train_on=train_on,
        dtype=dtype,
        device=device,
        cache_dir=cache_dir,
        adapter=adapter,
        quantise=quantise,
        progress=True,
    )
    for text in result.notes:
        out.note(f"warning: {text}")
    if not math.isfinite(result.total.nats):
        where = ", ".join(bucket.name for bucket in result.buckets if not math.isfinite(bucket.nats))
        out.note(
            f"warning: the score is not finite at positions {where}: weights of the model hold NaN or infinity, or its "
            "training diverged"
        )
    if as_json:
        out.print_json(result.to_dict())
    else:
        _print(result, directory, context_length)
    if plot is not None:  # last: what was measured is told even where it cannot be drawn
        curve = [bucket.bits_per_byte for bucket in result.buckets]
        names = [bucket.name for bucket in result.buckets]
        plot_buckets(names, {directory.name: curve}, plot, "Bits per byte by position", "bits per byte")


def _print(result: "Evaluation", directory: Path, context_length: int) -> None:
    rows = [
        [name, f"{b.tokens:,}", f"{b.bits_per_byte:.4f}", f"{b.bits_per_token:.4f}", f"{b.perplexity:.4f}"]
        for name, b in [*((bucket.name, bucket) for bucket in result.buckets), ("all", result.total)]
    ]
    out.print_table(
        f"{directory}: context of {context_length:,} tokens",
        ["position", ">tokens", ">bits/byte", ">bits/token", ">perplexity"],
        rows,
    )
