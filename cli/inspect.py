"""``rwkv-rev inspect``: what a checkpoint is, without loading its weights whole."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.cli import output
from rwkv_rev.cli.counts import count, length, whole
from rwkv_rev.cli.options import refuse_meaningless
from rwkv_rev.folders.source import parse_source

if TYPE_CHECKING:
    from rwkv_rev.equivalence.forgetting import Forgetting

TOKENS = 4096


def inspect(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Hub id, .pth file, folder, bundled:rwkv-4, -5.2, -6 or -7."),
    ],
    file: Annotated[
        str | None, typer.Option(help="Which .pth of a repository that holds several: a name or a glob.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="T",
            help="Forecast the memory of training on contexts of T tokens, or 16k, 1m.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=whole(1), metavar="B", help="Rows of the forecast.")] = 1,
    chunk_length: Annotated[
        Any,
        typer.Option(
            parser=length,
            metavar="C",
            help="Of both; auto: 64, 256 and 1,024 for --text, and for the forecast as in training with AdamW, "
            "by the memory that is free here.",
        ),
    ] = AUTO,
    device: Annotated[str, typer.Option(help="Of both: cpu, cuda; auto is cuda if there is a GPU.")] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text: measure what reversal must keep of it, by layer and chunk length.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(parser=count, metavar="T", help="How many tokens of it are read: 4096, 16k.")
    ] = TOKENS,
    numerics: Annotated[
        bool, typer.Option("--numerics", help="How long each floating-point format lasts on these decays.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    r"""Show the version, sizes, dtype, tokenizer and forgetting of a checkpoint.

    Works on any SOURCE that convert takes, and on converted folders. Only headers and the decays are read.
    The bits a layer forgets per step and state element, log2(1/w), are what an exact reversal has to store. Where
    they follow from the text (RWKV-6), or are what a transition destroys (RWKV-7), --text measures them: the model is
    loaded and reads the first T tokens of FILE, once for each chunk length.

    With --context-length, forecasts device and tape memory of every gradient strategy (float32, all weights trained,
    optimizer not included). With --numerics, shows after how many updates half of a format's mantissa is gone.

    Examples:

      rwkv-rev inspect bundled:rwkv-5.2

      rwkv-rev inspect bundled:rwkv-5.2 \
        --context-length 1000000 --chunk-length 512

      rwkv-rev inspect bundled:rwkv-6 --text book.txt

      rwkv-rev inspect BlinkDL/rwkv-4-pile-169m --file '*8023.pth'
    """
    if context_length is None:
        refuse_meaningless(ctx, ("batch_size",), "without --context-length")
        if text is None:
            refuse_meaningless(ctx, ("chunk_length", "device"), "without --context-length and --text")
    if text is None:
        refuse_meaningless(ctx, ("tokens",), "without --text")
    # a wrong one is told of before anything heavy is imported
    parse_source(source, file=file, revision=revision)
    import torch

    from rwkv_rev.converters.inspection import inspect_source
    from rwkv_rev.device import choose_device, named_device
    from rwkv_rev.errors import RwkvRevError

    kind = named_device(device).type
    if kind not in ("cpu", "cuda"):
        raise RwkvRevError(f"device = {device}: forecasts are for cpu and cuda")

    content = None
    if text is not None:
        from rwkv_rev.equivalence.text import read_text

        choose_device(device)
        content = read_text(text)
    found = inspect_source(source, file=file, revision=revision, progress=True)
    for note in found.notes:
        output.note(f"note: {note}")
    forecasts, lifted, limits, measured = None, None, None, chunk_length
    if context_length is not None:
        from rwkv_rev.forecast import STRATEGIES, forecast_memory

        on_gpu = kind == "cuda"

        def forecast(
            context: int, chunk: int, names: Sequence[str] = STRATEGIES, *, lifted: bool = False
        ) -> tuple[Any, ...]:
            return forecast_memory(
                found.config,
                found.log_decays,
                found.parameters,
                context_length=context,
                batch_size=batch_size,
                chunk_length=chunk,
                fused=on_gpu,
                recorded=on_gpu,
                strategies=names,
                lifted=lifted,
            )

        if chunk_length == AUTO:
            chunk_length = _chosen(kind, found.parameters, forecast)
        forecasts = forecast(context_length, chunk_length)
        if found.config.architecture.cost.lifted is not None:
            (lifted,) = forecast(context_length, chunk_length, ("reversible",), lifted=True)
    if numerics and not found.log_decays:
        raise RwkvRevError(
            f"--numerics is about decays that are constants: {found.fields()['version']} has none"
        )
    if numerics:
        from rwkv_rev.numerics import format_limits

        limits = format_limits(torch.cat([log_decay.flatten() for log_decay in found.log_decays]))
    forgetting = None
    if content is not None:
        from rwkv_rev.equivalence.forgetting import measure_source

        forgetting = measure_source(
            source,
            content,
            file=file,
            revision=revision,
            tokens=tokens,
            chunk_length=None if measured == AUTO else measured,
            device=str(named_device(device)),
            progress=True,
        )
    if as_json:
        document = found.to_dict()
        if forecasts is not None:
            document["memory_forecast"] = [forecast.to_dict() for forecast in forecasts]
        if lifted is not None:
            document["lifted_forecast"] = lifted.to_dict()
        if forgetting is not None:
            document["forgetting"] = forgetting.to_dict()
        if limits is not None:
            document["numerics"] = [limit.to_dict() for limit in limits]
        output.print_json(document)
        return
    output.print_fields(found.source, found.fields())
    output.print_text("")
    if found.bits_forgotten and not any(map(any, found.bits_forgotten)):
        output.print_prose("No step forgets anything.")
    elif found.bits_forgotten:
        output.print_table(
            "Bits forgotten per step and state element",
            ["layer", *(f">{name}" for name in found.quantile_names)],
            [[layer, *(f"{bits:.3g}" for bits in row)] for layer, row in enumerate(found.bits_forgotten)],
        )
    if forgetting is not None:
        _print_forgetting(forgetting)
    size = output.human_bytes
    if forecasts is not None:
        chunk = min(chunk_length, context_length or 1)
        output.print_table(
            f"Memory of a gradient: {context_length:,} tokens x {batch_size}, chunks of {chunk:,}, float32, "
            + ("CUDA kernels" if on_gpu else "CPU"),
            ["strategy", ">weights", ">gradients", ">graph", ">states", ">device peak", ">tape"],
            [
                [
                    f"{f.strategy}, lifted" if f.lifted else f.strategy,
                    *(size(n) for n in (f.parameters, f.gradients, f.graph, f.states, f.device)),
                    f"about {size(f.tape)}" if f.lifted and f.tape else size(f.tape),
                ]
                for f in (*forecasts, *([] if lifted is None else [lifted]))
            ],
        )
        output.print_prose(
            "The peak is no sum: gradients come while the graph goes; logits and workspace are in it. The tape lies "
            "where --tape of finetune says, in host memory unless told otherwise. The optimizer is not included "
            f"(AdamW: {size(8 * found.parameters)})."
        )
        if lifted is not None:
            output.print_prose(
                "lifted: with --remnants lifted. How much that keeps follows from weights and text; the estimate is "
                "by a trained model that forgets much, whole states are the most, and --text FILE measures it."
                + _chosen_remnants(kind, found.config, min(chunk_length, context_length or 1))
            )
        elif not found.bits_forgotten and any(f.tape for f in forecasts):
            output.print_prose(
                "How much the states forget follows from the text: the tape of reversible is at most that, and "
                "--text FILE measures it."
            )
        recorded = [f"{size(f.reserved)} ({f.strategy})" for f in forecasts if f.recordings]
        if recorded:
            output.print_prose(
                f"With recordings of launches, which are kept over steps where there is room, a GPU must have "
                f"{' or '.join(recorded)}."
            )
    if limits is not None:
        output.print_table(
            "States that only grow: additions until half of the mantissa is gone",
            ["format", ">mantissa bits", ">NUHMC", ">counted"],
            [
                [limit.format, limit.mantissa_bits, f"{limit.nuhmc:,}", f"{limit.counted:,}"]
                for limit in limits
            ],
        )
        output.print_prose(
            "NUHMC: number of updates at half mantissa capacity, 2^floor(bits / 2). counted: the same, by adding up."
        )
        if not limits[0].division:
            return
        output.print_table(
            "Plain division back: steps until half of the mantissa is noise, in channels by how fast they forget "
            "(formula / measured)",
            ["format", *(f">{name}" for name in limits[0].division)],
            [
                [
                    limit.format,
                    *(
                        f"{formula:,.0f} / {_steps(measured)}"
                        for formula, measured in limit.division.values()
                    ),
                ]
                for limit in limits
            ],
        )
        output.print_prose("formula: bits / 2, divided by what the channel forgets per step.")


def _print_forgetting(found: "Forgetting") -> None:
    """What a text took: bits by layer, and bytes on the tape."""
    known = any(layer.theory is not None for chunk in found.chunks for layer in chunk.layers)
    names = [str(layer) for layer in range(len(found.chunks[0].layers))]
    columns, rows = ["layer"], [[name] for name in (*names, "all")]
    for chunk in found.chunks:
        columns += [f">C = {chunk.chunk:,}", *([">theory"] if known else [])]
        for row, kept in zip(rows, (*chunk.layers, chunk.total), strict=True):
            for bits in (kept.remnants, *([kept.theory] if known else [])):
                each = kept.per_step(bits)
                row.append("-" if each is None else f"{each:.4f}")
    output.print_table(
        "Bits that reversal keeps of memories, per step and element, by chunk length", columns, rows
    )
    output.print_table(
        "The tape, in bytes per token",
        ["chunk", ">tape", ">remnants", ">token shifts", ">whole states", ">remnants / whole"],
        [
            [
                f"{chunk.chunk:,}",
                f"{chunk.tape_bytes / chunk.counted:,.0f}",
                f"{chunk.total.remnants / 8 / chunk.counted:,.0f}",
                f"{chunk.total.shifts / chunk.counted:,.0f}",
                f"{chunk.total.whole / 8 / chunk.counted:,.0f}",
                f"{100 * chunk.total.remnants / chunk.total.whole:.1f} %" if chunk.total.whole else "-",
            ]
            for chunk in found.chunks
        ],
    )
    total = found.chunks[0].total
    theory = " theory: log2(1/w) of its decays, at most 32 bits per element and chunk." if known else ""
    if found.lifted:
        theory = (
            " theory: log2 of 1 over the singular values of its transitions, each from 0 to 32 bits per element and "
            "chunk; remnants may be below it, as few numbers of a state have 32 bits. They are those of "
            "--remnants lifted, the default where docs/lifting.md says so; else whole states are kept."
        )
    if total.whole and total.remnants == total.whole:
        theory += " Remnants are whole states here: no factor is divided out."
    output.print_prose(
        f"Measured on the first {found.tokens:,} tokens of the text (--tokens), but for the first chunk, of which "
        f"nothing is kept. Whole states are what checkpoint keeps.{theory}"
    )


def _chosen(kind: str, parameters: int, forecast: Callable[..., tuple[Any, ...]]) -> int:
    """What ``auto`` would be in training with AdamW on this machine."""
    import torch

    from rwkv_rev.bptt_settings import CHUNK_LENGTH
    from rwkv_rev.chunk_length import choose
    from rwkv_rev.device import is_here

    if not is_here(device := torch.device(kind)):
        return CHUNK_LENGTH

    def need(chunk: int) -> int:
        each = (*forecast(chunk, chunk, ("full",)), *forecast(2 * chunk, chunk, ("reversible",)))
        return max(one.reserved for one in each) + 8 * parameters

    return choose("auto", device, need).tokens


def _chosen_remnants(kind: str, config: Any, chunk: int) -> str:
    """What ``--remnants auto`` would be in training all weights on this machine."""
    import torch

    from rwkv_rev.device import is_here
    from rwkv_rev.remnants import choose_remnants

    if not is_here(device := torch.device(kind)):
        return ""
    chosen = choose_remnants("auto", "reversible", config, chunk=chunk, device=device, trains_all=True)
    return f" By default remnants are {chosen.kind} here: {chosen.why}."


def _steps(measured: float) -> str:
    """A measured number of steps; longer than was looked at when infinite."""
    from rwkv_rev.numerics import LONGEST_MEASURED

    return f"{measured:,.0f}" if measured <= LONGEST_MEASURED else f"> {LONGEST_MEASURED:,}"
