"""Tokens per second of ``rwkv-rev finetune`` over one and several processes of one host.

    python -m rwkv_rev.benchmark.several_gpus --shape 5.2-1.5b --processes 1,2 --chunk-length 16384

Makes a model folder of a published shape with the official initialisation and a text for its bytes, then fine-tunes it
under ``torchrun`` with each number of processes, plain and with ``--shard-optimizer``. Each process takes one row, so
the tokens of a step grow with the processes. A row is the median of the steps after the first two, by the run's log.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from rwkv_rev.benchmark.models import SHAPES, benchmark_model
from rwkv_rev.conversion import convert
from rwkv_rev.device import choose_device
from rwkv_rev.json_text import json_text

SKIPPED = 2  # steps in which kernels are compiled and memory is reserved


def make_model(shape: str, folder: Path, device: str) -> None:
    """A folder that ``finetune`` takes: random weights, the byte tokenizer (whose ids any vocabulary has)."""
    bytes_model = folder.with_name("bytes")
    convert("bundled:rwkv-5.2", bytes_model)
    model = benchmark_model(shape, choose_device(device), torch.float32)
    model.save_pretrained(str(folder), max_shard_size="5GB")
    for file in bytes_model.iterdir():
        if not file.name.startswith(("model", "config.json")):
            shutil.copyfile(file, folder / file.name)


def measure(
    model: Path, data: Path, processes: int, args: argparse.Namespace, *, sharded: bool
) -> dict[str, object]:
    """One run: its processes, speed and what a process held."""
    output = model.with_name(f"tuned-{processes}-{sharded}")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *(sys.executable, "-m", *launch, "-m", "rwkv_rev.cli", "finetune", str(model)),
        *("--data", str(data), "--output", str(output), "--cache-dir", str(model.with_name("cache"))),
        *("--context-length", str(args.context_length), "--chunk-length", str(args.chunk_length)),
        *("--max-steps", str(args.steps), "--save-every", "0", "--lr", "1e-6", "--device", args.device),
        *("--tune", args.tune, "--json", *(["--shard-optimizer"] if sharded else [])),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{processes} processes failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout[done.stdout.index("{") :])
    rows = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "loss" in row][SKIPPED:]
    shutil.rmtree(output)
    return {
        "processes": processes,
        "sharded_optimizer": sharded,
        "tokens_per_second": round(statistics.median(speeds)),
        "memory_bytes": result["memory_bytes"],
        "optimizer_bytes": result["optimizer_bytes"],
        "last_loss": result["last_loss"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row of JSON for each number of processes; ``arguments`` are those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="5.2-1.5b")
    parser.add_argument("--processes", default="1,2", help="numbers of processes, comma-separated")
    parser.add_argument("--context-length", type=int, default=65536)
    parser.add_argument("--chunk-length", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tune", choices=("full", "lora"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    counts = [int(text) for text in args.processes.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder, data = Path(scratch, "model"), Path(scratch, "data.txt")
        make_model(args.shape, folder, args.device)
        needed = args.context_length * args.steps * max(counts)
        sentence = "The same sentence, over and over, is as good as any other text for measuring speed. "
        data.write_text(sentence * (needed // len(sentence) + 1), "utf-8")
        for count in counts:
            for sharded in (False, True) if count > 1 else (False,):
                print(json_text(measure(folder, data, count, args, sharded=sharded)), flush=True)


if __name__ == "__main__":
    main()
