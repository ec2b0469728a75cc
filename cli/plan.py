"""``rwkv-rev plan``: what training over many GPUs would take, before any is rented."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import count, number, whole
from rwkv_rev.cli.options import refuse_meaningless

if TYPE_CHECKING:
    from rwkv_rev.simulation.combinations import Combinations


def plan(
    ctx: typer.Context,
    context: Annotated[
        int, typer.Option(parser=count, metavar="T", help="Tokens of a row; 64k is 65536, 4m is 4194304.")
    ],
    gpus: Annotated[
        int, typer.Option(parser=whole(1, 65536), metavar="N", help="How many GPUs there are, up to 65536.")
    ],
    gpu: Annotated[str, typer.Option(help="Of which kind: h100 or h200, which were measured.")] = "h100",
    params: Annotated[
        str | None,
        typer.Option(help="Size of a published model: 0.1b, 1.5b, 3b, 7b, 14b; the nearest one within 10 %."),
    ] = None,
    generation: Annotated[Literal["4", "5.2", "6", "7"], typer.Option(help="Of --params: which RWKV.")] = "7",
    shape: Annotated[
        str | None, typer.Option(help="A shape by its name, as bench has them, in the place of --params.")
    ] = None,
    tune: Annotated[
        Literal["full", "lora"], typer.Option(help="All weights with AdamW, or low-rank additions.")
    ] = "full",
    lora_rank: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Rank of the additions.")] = 16,
    batch_size: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Rows at once of each group of GPUs.")
    ] = 1,
    most_rows: Annotated[
        int | None,
        typer.Option(
            parser=whole(1),
            metavar="N",
            help="Rows of a step at most, over all groups: fewer, larger groups take less time for one.  [any]",
        ),
    ] = None,
    per_host: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="GPUs of a machine, joined by NVLink.")
    ] = 8,
    between: Annotated[
        float,
        typer.Option(
            parser=number(1e-3),
            metavar="X",
            help="GB/s per GPU between machines: 50 assumes 400 Gbit/s each.",
        ),
    ] = 50.0,
    host_memory: Annotated[
        str, typer.Option(help="Memory of a machine for the tapes of its GPUs; the default is an assumption.")
    ] = "1000GB",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, seconds by what they go for.")
    ] = False,
) -> None:
    r"""Tell memory, speed and tape of a training run over many GPUs; needs none.

    dp groups of GPUs take rows of their own, the cp GPUs of a group share each row (--context-parallel); weights are
    whole on every GPU, or spread over some of them block by block (FSDP2). Of each combination the fastest chunk length
    that fits is shown. The first three are the fastest; below stands what starts them. Tokens/s are those of all GPUs.

    Rates were measured on, and fitted to, runs on one and two GPUs of one machine, which are met within 20 % but for
    those that docs/finetuning.md names. More GPUs, and what joins machines (--between), are extrapolated.

    Examples:

      rwkv-rev plan --params 7b --context 256k --gpus 8

      rwkv-rev plan --params 14b --context 4m --gpus 64 --gpu h100 \
        --most-rows 4

      rwkv-rev plan --params 14b --context 1m --gpus 16 --tune lora
    """
    if shape is not None:
        refuse_meaningless(ctx, ("params", "generation"), "with --shape, which says both")
    elif params is None:
        raise typer.BadParameter("name a size, such as 7b, or a --shape", param_hint="--params")
    if tune == "full":
        refuse_meaningless(ctx, ("lora_rank",), "without --tune lora")
    from rwkv_rev.simulation.combinations import combine

    found = combine(
        params,
        context=context,
        gpus=gpus,
        gpu=gpu,
        generation=generation,
        shape=shape,
        tune=tune,
        lora_rank=lora_rank,
        batch_size=batch_size,
        most_rows=most_rows,
        per_host=per_host,
        between=between,
        host_memory=host_memory,
    )
    if as_json:
        out.print_json(found.to_dict())
        return
    _print(found, context)


def _print(found: "Combinations", context: int) -> None:
    from rwkv_rev.simulation.combinations import is_run, loop, start

    layout, config = found.layout, found.sizes.config
    out.print_table(
        f"{config.architecture.called}, {found.sizes.parameters / 1e9:.2f} billion weights ({found.shape}), rows of "
        f"{context:,} tokens,\n{layout.cards} x {layout.card.title} in {layout.hosts} "
        f"machine{'s' if layout.hosts > 1 else ''}",
        ("", ">dp", ">cp", ">part", ">chunk", ">tokens/s", ">s/step", ">sent", ">GPU", ">tape"),
        [
            (
                number,
                one.layout.dp,
                one.layout.cp,
                "all" if one.layout.shards == 1 else f"1/{one.layout.shards}",
                _tokens(one.step.chunk),
                f"{one.tokens_per_second:,.0f}",
                f"{one.total:,.1f}" if one.total < 1000 else f"{one.total:,.0f}",
                f"{100 * one.communication:.0f} %",
                out.human_bytes(one.reserved),
                out.human_bytes(one.tape_of_a_host),
            )
            for number, one in enumerate(found.found, 1)
        ],
    )
    out.print_prose(
        "dp: groups with rows of their own; cp: GPUs that share them; part: of weights and moments that a GPU keeps; "
        "chunk: tokens of a group's chunk; sent: share of the time that exchanges take; GPU: memory that it must have; "
        "tape: at most, in a machine's memory."
    )
    for one in found.best():
        out.print_prose(
            f"{found.found.index(one) + 1}. dp = {one.layout.dp}, cp = {one.layout.cp}; tape in all "
            f"{out.human_bytes(one.tape * one.layout.cards)}."
            + ("" if is_run(one) else f" Not by finetune, but in a loop of your own: {loop(one)}")
        )
        out.print_text(_folded(start(one)) + "\n")
    scans = {where: ranks for where in ("within", "between") if (ranks := found.scan_from(where)) is not None}
    told = " and ".join(f"from cp = {ranks:,} on {where} machines" for where, ranks in scans.items())
    out.print_prose(
        "GPUs of a group gather what each other's tokens do to the state; handing it from one to the next (ZeCO) would "
        f"be faster {told or 'for no cp'}."
    )


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def _folded(words: list[str]) -> str:
    """A command over several lines, to be pasted."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 76:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return " \\\n".join(lines)
