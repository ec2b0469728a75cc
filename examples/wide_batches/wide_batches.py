"""Tokens per second and memory by chunk length C and rows B: what one timestep at a time costs, what wide batches buy.

    python examples/wide_batches/wide_batches.py [--model bundled:rwkv-5.2] [--device cuda] [--json FILE] ...

A point that is forecast to take more than ``--most-gigabytes`` is not run, and says so.

One *point* is one loss and its gradient, ``reversible``, in a process of its own. On a CPU tokens are counted per
second of processor time of one thread, so that other programs do not count, and memory is the peak of the process
beyond what it was before. On a GPU they are those of the clock and of the allocator, in the third step, when launches
are recorded.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.benchmark.settings import measured_model
from rwkv_rev.benchmark.training import random_tokens, step
from rwkv_rev.device import choose_device
from rwkv_rev.forecast import forecast_memory, runs_fused

MEGABYTE = 1 << 20
SHORTEST, LONGEST, TOKENS = 256, 1024, 2**15


def length_for(arguments: argparse.Namespace, rows: int) -> int:
    """Tokens of context: as set, or so that a point takes seconds."""
    return arguments.tokens or min(LONGEST, max(SHORTEST, TOKENS // rows))


def needed(model: Any, device: torch.device, chunk: int, rows: int, length: int) -> int:
    """Forecast of memory, bytes; whatever decays forget, the tape is no larger than that of ``checkpoint``."""
    (found,) = forecast_memory(
        model.config,
        (),
        model.num_parameters(),
        context_length=length,
        batch_size=rows,
        chunk_length=chunk,
        fused=runs_fused(model.config, device),
        strategies=("checkpoint",),
    )
    return found.device + found.tape


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most so far; None where nothing tells them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(arguments: argparse.Namespace, chunk: int, rows: int) -> dict[str, Any]:
    """A point, in this process."""
    torch.set_num_threads(1)
    device, length = choose_device(arguments.device), length_for(arguments, rows)
    model = measured_model(arguments.model, device, torch.float32)
    gigabytes = needed(model, device, chunk, rows, length) / 1e9
    if gigabytes > arguments.most_gigabytes:
        return {
            "chunk_length": chunk,
            "rows": rows,
            "tokens": length,
            "error": f"{gigabytes:.0f} GB forecast: not run",
        }
    ids = random_tokens(model, rows, length)
    with model.set_bptt("reversible", chunk_length=chunk):
        step(model, ids[:1, :64])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = peak_memory(device)
        best = math.inf
        for _ in range(3 if device.type == "cuda" else arguments.repeats):
            start = time.process_time()
            seconds, report = step(model, ids)
            best = min(best, time.process_time() - start)
    peak = peak_memory(device)
    return {
        "chunk_length": chunk,
        "rows": rows,
        "tokens": length,
        "at_once": report["chunk_length"],
        "tokens_per_second": ids.numel() / (seconds if device.type == "cuda" else best),
        "memory": None if peak is None or before is None else peak - before,
        "tape": report["tape_bytes"],
    }


def in_a_process(arguments: argparse.Namespace, chunk: int, rows: int) -> dict[str, Any]:
    """A point, in one of its own; ``error`` where it fails."""
    names = ("model", "device", "tokens", "repeats", "most_gigabytes")
    given = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    command = [sys.executable, __file__, *given, "--point", str(chunk), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"chunk_length": chunk, "rows": rows, "error": error}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line_of(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['rows']} | {row['chunk_length']} | {row['error']} | | | |"
    memory = "" if row["memory"] is None else f"{row['memory'] / MEGABYTE:,.0f}"
    rate, tape = f"{row['tokens_per_second']:,.0f}", f"{row['tape'] / MEGABYTE:,.1f}"
    cells = (row["rows"], row["chunk_length"], row["at_once"], rate, memory, tape)
    return f"| {' | '.join(map(str, cells))} |"


def parse(given: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="bundled:rwkv-5.2", help="or a converted folder, or a shape of bench"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--chunk-lengths", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 8, 64, 800])
    parser.add_argument("--tokens", type=int, default=0, help="of context; 0 for 256 to 1,024, by rows")
    parser.add_argument("--repeats", type=int, default=1, help="steps on a CPU, of which the fastest counts")
    parser.add_argument(
        "--most-gigabytes", type=float, default=6.0, help="a point that needs more is not run"
    )
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the table."""
    arguments = parse(given)
    if arguments.point:
        found = measure(arguments, *arguments.point)
        print(json.dumps(found))
        return [found]
    print(
        "| B | C | tokens at once | tokens/s | memory, MiB | tape, MiB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    for batch in arguments.batch_sizes:
        for chunk in arguments.chunk_lengths:
            rows.append(in_a_process(arguments, chunk, batch))
            print(line_of(rows[-1]), flush=True)
    if arguments.json:
        figures = {"torch": torch.__version__, "model": arguments.model, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
