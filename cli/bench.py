"""``rwkv-rev bench``: the code behind every figure in docs/benchmarks.md."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.cli import output as out
from rwkv_rev.cli.counts import count, counts, length, whole
from rwkv_rev.cli.options import refuse_meaningless

COLUMNS = {
    "training": (
        "setting", "tokens", "seconds", "tokens_per_second", "ratio_to_full", "cpu_seconds",
        "cpu_ratio_to_full", "matmul_utilisation", "peak_bytes", "reserved_bytes", "tape_bytes", "error",
    ),
    "memory": (
        "setting", "tokens", "peak_bytes", "reserved_bytes", "tape_bytes", "tokens_per_second", "limit_bytes", "error",
    ),
    "cpu": ("setting", "tokens", "seconds", "peer_seconds", "ratio", "matmul_share", "others"),
    "convert": (
        "setting", "bytes", "convert_bytes_per_second", "copy_bytes_per_second", "convert_to_copy",
        "sha256_bytes_per_second", "check_bytes_per_second",
    ),
    "kernels": (
        "function", "size", "dtype", "kernel", "first_call_s", "forward_ms", "forward_backward_ms", "least_traffic_gb",
        "peak_extra_gb", "errors",
    ),
    "fits": (
        "setting", "time_exponent", "cpu_time_exponent", "tape_exponent", "memory_exponent",
        "tape_bytes_per_token", "bytes_per_token", "runs_out_at",
    ),
}  # fmt: skip


def bench(
    ctx: typer.Context,
    what: Annotated[
        Literal["kernels", "training", "memory", "cpu", "convert"],
        typer.Argument(
            metavar="[kernels|training|memory|cpu|convert]",
            help="The recurrences alone; training steps; peak memory; other implementations; conversion.",
        ),
    ] = "training",
    shape: Annotated[
        str | None,
        typer.Option(
            help="5.2-15m, 5.2-0.1b, 5.2-1.5b, 5.2-7b, 6-1.5b, 6-3b, 6-7b, 6-14b, 7-0.1b, 7-1.5b, 7-3b, "
            "7-7b, 7-13b, 4-0.1b, 4-0.4b, bundled:NAME or a model folder."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of weights and arithmetic; auto is bfloat16 on a GPU, else float32."),
    ] = "auto",
    lengths: Annotated[
        str | None, typer.Option(help="Context lengths in tokens, comma-separated; 16k is 16384.")
    ] = None,
    chunk_length: Annotated[
        str | None, typer.Option(help="Tokens per chunk or auto, comma-separated.")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="full, checkpoint, reversible, reversible-lossy, truncated; comma-separated.")
    ] = "full,reversible",
    tape: Annotated[
        str | None,
        typer.Option(help="host, device, disk; comma-separated.  [host; disk for memory on the CPU]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Rows at once.")] = 1,
    lora_rank: Annotated[
        int,
        typer.Option(
            parser=whole(0), metavar="N", help="Train low-rank additions of this rank; 0: all weights."
        ),
    ] = 0,
    quantise: Annotated[
        Literal["nf4", "int8"] | None,
        typer.Option(help="Frozen weights in 4 or 8 bits, under low-rank additions; needs bitsandbytes."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            parser=whole(1), metavar="N", help="Timed runs of each point; the median counts.  [3; quick 1]"
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="memory on the CPU: most that one point may take.  [half of what is free]"),
    ] = None,
    threads: Annotated[
        int, typer.Option(parser=whole(0, 4096), metavar="N", help="CPU threads; 0: PyTorch's choice.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw memory and speed by context as PNG files.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Show or draw the rows of an earlier --json run; measure nothing."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A bundled model and short contexts: a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document: a list of rows.")] = False,
) -> None:
    r"""Measure this machine. Every row names hardware, versions, dtype and command.

    training: seconds, tokens/s and tape of a loss with its gradients, settings in turns, and how they grow with the
    context. memory: peak of the same, and where it runs out. cpu: against the rwkv package and transformers, and the
    share of time in matrix products. convert: bytes/s against a copy on the disk of the current folder.

    Examples:

      rwkv-rev bench training --quick

      rwkv-rev bench memory --lengths 1k,4k,16k,64k \
        --memory-limit 4GB --plot plots

      rwkv-rev bench training --shape 5.2-1.5b --lengths 16k,64k,256k,1024k \
        --chunk-length 4096 --json > rows.json
    """
    _refuse_meaningless(ctx, what, strategies)
    from rwkv_rev.benchmark.plots import MEMORY_PLOT, SPEED_PLOT, plot_rows, refuse_plot

    if plot is not None:
        for name in (MEMORY_PLOT, SPEED_PLOT):
            refuse_plot(plot / name)
    if rows is not None:
        from rwkv_rev.folders.safe_input import read_json

        found = read_json(rows)
    else:
        import torch

        from rwkv_rev.benchmark.run import run_benchmark
        from rwkv_rev.benchmark.settings import DTYPES, BenchSettings
        from rwkv_rev.converters.rewriter import parse_size
        from rwkv_rev.device import choose_device

        if threads:
            torch.set_num_threads(threads)
        chosen = choose_device(device)
        cuda = chosen.type == "cuda"
        if cuda:
            refuse_meaningless(ctx, ("memory_limit",), "on a GPU, whose memory is the limit")
        settings = BenchSettings(
            shape=shape or _default_shape(what, cuda, quick),
            device=chosen,
            dtype=DTYPES[
                ("bfloat16" if cuda or what == "convert" else "float32") if dtype == "auto" else dtype
            ],
            lengths=counts(lengths or _default_lengths(what, cuda, quick), "--lengths", count),
            chunk_lengths=counts(
                chunk_length or (AUTO if cuda and not quick else "512"), "--chunk-length", length
            ),
            strategies=tuple(strategies.split(",")),
            tapes=tuple((tape or ("disk" if what == "memory" and not cuda else "host")).split(",")),
            repeats=repeats or (1 if quick else 3),
            batch_size=batch_size,
            lora_rank=lora_rank,
            quantise=quantise,
            memory_limit=None if memory_limit is None else parse_size(memory_limit),
            command=shlex.join(["rwkv-rev", *sys.argv[1:]]),
        )
        found = run_benchmark(what, settings, lambda row: out.note(_line(row)))
    if plot is not None:
        for path in plot_rows(found, plot):
            out.note(f"wrote {path}")
    if as_json:
        out.print_json(found)
        return
    _print(found)


_OF_KIND = {
    "kernels": (),
    "training": (
        *(
            "shape",
            "dtype",
            "lengths",
            "chunk_length",
            "strategies",
            "tape",
            "batch_size",
            "lora_rank",
            "quantise",
            "repeats",
        ),
        *("plot", "quick"),
    ),
    "memory": (
        *("shape", "dtype", "lengths", "chunk_length", "strategies", "tape", "batch_size", "lora_rank"),
        *("quantise", "memory_limit", "plot", "quick"),
    ),
    "cpu": (
        *(
            "shape",
            "dtype",
            "lengths",
            "chunk_length",
            "strategies",
            "tape",
            "batch_size",
            "repeats",
            "quick",
        ),
    ),
    "convert": ("shape", "dtype", "repeats", "quick"),
}
"""Options of a benchmark, beside those of all."""


def _refuse_meaningless(ctx: typer.Context, what: str, strategies: str) -> None:
    """Raise BadParameter for an option that this benchmark has no use for."""
    everything = {name for names in _OF_KIND.values() for name in names}
    if ctx.params["rows"] is not None:
        refuse_meaningless(
            ctx, everything - {"plot"} | {"device", "threads"}, "with --rows, which measures nothing"
        )
        return
    refuse_meaningless(ctx, everything - set(_OF_KIND[what]), f"on bench {what}")
    names = strategies.split(",")
    if all(name == "full" for name in names):
        refuse_meaningless(ctx, ("chunk_length",), "on full, which has no chunks")
    if all(name in ("full", "truncated") for name in names):
        refuse_meaningless(ctx, ("tape",), f"on {strategies}, which has none")


def _default_shape(what: str, cuda: bool, quick: bool) -> str:
    if quick:
        return "bundled:rwkv-4" if what == "cpu" else "bundled:rwkv-5.2"
    if what == "cpu":
        return "bundled:rwkv-5.2"
    if what == "convert":
        return "5.2-0.1b"
    return "5.2-1.5b" if cuda else "5.2-15m"


def _default_lengths(what: str, cuda: bool, quick: bool) -> str:
    if what == "cpu":
        return "256" if quick else "1k"
    if quick:
        return "1k,2k,4k"
    if cuda:
        return "16k,64k,256k,1024k"
    return "1k,2k,4k,8k,16k" if what == "memory" else "1k,2k,4k"


def _line(row: dict[str, Any]) -> str:
    names = {name for columns in COLUMNS.values() for name in columns}
    return "  ".join(f"{name} {_cell(name, value)}" for name, value in row.items() if name in names and value)


def _print(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        out.print_text("no rows")
        return
    first = found[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    dtype = "" if first["bench"] == "kernels" else f", {first['dtype']}"
    out.print_text(f"{first['shape']}{dtype} on {first['hardware']}; {versions}\n{first['command']}\n")
    for title, columns, rows in (
        (first["bench"], COLUMNS[first["bench"]], [row for row in found if not row.get("fit")]),
        ("fits over the context T", COLUMNS["fits"], [row for row in found if row.get("fit")]),
    ):
        shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
        if shown:
            heads = [
                name if name in ("setting", "error", "others", "errors") else f">{name}" for name in shown
            ]
            cells = [[_cell(name, row.get(name)) for name in shown] for row in rows]
            out.print_table(
                title, [head.replace("_", " ") for head in heads], cells, keys=1 + ("tokens" in shown)
            )


def _cell(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if name.endswith("bytes_per_second"):
        return f"{out.human_bytes(value)}/s"
    if name.endswith("bytes") or name.endswith("bytes_per_token"):
        return out.human_bytes(value)
    if isinstance(value, dict):
        return " ".join(f"{key.removeprefix('aten::')} {part}" for key, part in value.items())
    if isinstance(value, list):
        return "x".join(map(str, value))
    if name == "tokens_per_second" or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
