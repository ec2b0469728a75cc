"""Tokens per second of one context on one card and over several: context parallelism at the same chunk per card.

    torchrun --standalone --nproc-per-node 2 -m rwkv_rev.benchmark.context_parallel --shape 5.2-1.5b \\
        --context-length 262144 --chunk-length 8192,16384

One *step* is ``model(ids, labels=ids).loss.backward()`` of one row. The first process measures one card alone while the
others wait; then all share every chunk, W times as long as that of one card. A row is the median of the timed steps
behind the first two (in which kernels are compiled, and launches are recorded; ``RWKV_REV_CUDA_GRAPHS=0`` goes without,
so that ``peak_bytes`` are all that a step takes: what recordings run in is in ``reserved_bytes`` alone).
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rwkv_rev.benchmark.models import SHAPES, benchmark_model
from rwkv_rev.benchmark.training import random_tokens, step
from rwkv_rev.bptt import lasting
from rwkv_rev.json_text import json_text
from rwkv_rev.training.launch import own_device

SKIPPED = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(model: Any, length: int, chunk: int, *, repeats: int, tape: str) -> dict[str, Any]:
    """Seconds, peak memory and tape of steps in chunks of so many tokens."""
    ids = random_tokens(model, 1, length)
    if ids.is_cuda:
        torch.cuda.empty_cache()
    times: list[float] = []
    report: dict[str, Any] = {}
    with model.set_bptt("reversible", chunk_length=chunk, tape=tape):
        for turn in range(SKIPPED + repeats):
            if ids.is_cuda and turn == SKIPPED:
                torch.cuda.reset_peak_memory_stats()
            seconds, report = step(model, ids)
            if turn >= SKIPPED:
                times.append(seconds)
    median = statistics.median(times)
    row = {"seconds": median, "tokens_per_second": round(length / median)}
    if ids.is_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return row | {"tape_bytes": report["tape_bytes"], "loss": report["loss"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row of JSON for one card and for all, at each chunk length; ``arguments`` are the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="5.2-1.5b")
    parser.add_argument("--context-length", type=int, default=262144)
    parser.add_argument(
        "--chunk-length", default="8192", help="tokens of a chunk on each card, comma-separated"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tape", choices=("host", "device", "disk"), default="host")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--alone", action=argparse.BooleanOptionalAction, default=True, help="measure one card, too"
    )
    args = parser.parse_args(arguments)
    device = own_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    waiting = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    model = benchmark_model(args.shape, device, DTYPES[args.dtype])

    def told(row: dict[str, Any]) -> None:
        if first:
            card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            print(
                json_text({"shape": args.shape, "tokens": args.context_length, **row, "card": card}),
                flush=True,
            )

    for chunk in map(int, args.chunk_length.split(",")):
        alone: dict[str, Any] = {}
        settings = {"repeats": args.repeats, "tape": args.tape}
        if args.alone and first:
            alone = measure(model, args.context_length, chunk, **settings)
            told({"cards": 1, "chunk_per_card": chunk, **alone})
            lasting.drop_all()  # or their memory would count as that of the next row
            torch.cuda.empty_cache()
        dist.barrier(waiting)
        model.set_context_parallel(dist.group.WORLD)
        row = measure(model, args.context_length, chunk * ranks, **settings)
        model.set_context_parallel(None)
        if alone:
            row["speedup"] = round(alone["seconds"] / row["seconds"], 3)
        told({"cards": ranks, "chunk_per_card": chunk, **row})
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
