"""Peak memory of one step of each trainer by the length of the context, under ``reversible`` and ``full``.

    python examples/trl/memory.py [--device cuda] [--model bundled:rwkv-7] [--contexts 2048,8192,32768] ...

Each point runs in a process of its own: a short step first, which loads what is loaded late, then the measured one. SFT
reads a text of T tokens. DPO reads a prompt and two answers of 64 tokens, T together with either. GRPO samples two
answers of 64 tokens to a prompt, T together, and trains on both. On CUDA the peak is
``torch.cuda.max_memory_allocated``, weights included; on a CPU (Linux) the most anonymous memory beyond what was there
before the step, the tape included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from typing import Any

import dpo
import grpo
import sft
import torch
from shared import STRATEGIES, StepMemory, loaded, options, text_of_python, write

ANSWER = 64
TRAINERS = ("sft", "dpo", "grpo")
LIKE_TENSORS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
}
"""glibc gives freed blocks back at once, so that what is resident is what the program holds."""


def trainer(name: str, model: Any, tokenizer: Any, tokens: int, output: str) -> Any:
    """Of one step over ``tokens`` tokens of context."""
    text = text_of_python()
    text *= -(-(tokens + 2 * ANSWER) // len(text))
    prompt, rest = text[: tokens - ANSWER], text[tokens - ANSWER :]
    common = {"max_steps": 1, "gradient_checkpointing": False}
    if name == "sft":
        rows: Any = [{"text": text[:tokens]}]
        return sft.trainer(
            model, tokenizer, rows, output, max_length=tokens, per_device_train_batch_size=1, **common
        )
    if name == "dpo":
        rows = [{"prompt": prompt, "chosen": rest[:ANSWER], "rejected": rest[ANSWER : 2 * ANSWER]}]
        return dpo.trainer(
            model, tokenizer, rows, output, max_length=tokens + 1, per_device_train_batch_size=1, **common
        )
    return grpo.trainer(
        model,
        tokenizer,
        [prompt],
        output,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=ANSWER,
        **common,
    )


def measure(chosen: argparse.Namespace, name: str, tokens: int) -> int:
    """Bytes, in this process."""
    torch.set_num_threads(1)
    with loaded(chosen) as (model, tokenizer), tempfile.TemporaryDirectory() as output:
        for length in (min(tokens, 3 * chosen.chunk_length), tokens):
            made, memory = trainer(name, model, tokenizer, length, output), StepMemory()
            made.add_callback(memory)
            made.train()
            model = made.model.unload() if name == "dpo" else made.model
            vars(model).pop("peft_config", None)  # which peft 0.18 leaves there
    return memory.peak


def in_a_process(chosen: argparse.Namespace, name: str, strategy: str, tokens: int) -> dict[str, Any]:
    """A point; ``error`` where it fails."""
    named = ["--model", chosen.model, "--device", chosen.device, "--chunk-length", str(chosen.chunk_length)]
    command = [sys.executable, "-W", "ignore", __file__, *named, "--strategy", strategy]
    done = subprocess.run(
        [*command, "--point", name, str(tokens)],
        capture_output=True,
        text=True,
        env=os.environ | LIKE_TENSORS,
    )
    found: dict[str, Any] = {"trainer": name, "strategy": strategy, "tokens": tokens}
    if done.returncode:
        return found | {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return found | {"peak_bytes": int(done.stdout.splitlines()[-1])}


def table(points: list[dict[str, Any]]) -> str:
    """MiB, a column for each trainer and strategy."""
    columns = list(dict.fromkeys((point["trainer"], point["strategy"]) for point in points))
    by_place = {(p["trainer"], p["strategy"], p["tokens"]): p for p in points}
    lines = [
        f"| context | {' | '.join(f'{name}, `{strategy}`' for name, strategy in columns)} |",
        f"|---:|{'---:|' * len(columns)}",
    ]
    for tokens in sorted({point["tokens"] for point in points}):
        cells = []
        for column in columns:
            point = by_place.get((*column, tokens), {})
            peak = point.get("peak_bytes")
            cells.append(point.get("error", "") if peak is None else f"{peak / 2**20:,.0f}")
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = options(__doc__ or "", steps=1, chunk_length=512)
    parser.add_argument("--contexts", type=numbers, default=[2048, 4096, 8192, 16384], help="T, tokens")
    parser.add_argument("--longest-full", type=int, default=8192, help="above it `full` is not measured")
    parser.add_argument("--trainers", type=lambda text: text.split(","), default=list(TRAINERS))
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(given)
    if chosen.point:
        print(measure(chosen, chosen.point[0], int(chosen.point[1])))
        return []
    points = []
    for name in chosen.trainers:
        for strategy in STRATEGIES:
            for tokens in chosen.contexts:
                if strategy != "full" or tokens <= chosen.longest_full:
                    points.append(in_a_process(chosen, name, strategy, tokens))
                    print(points[-1], file=sys.stderr, flush=True)
    print(table(points))
    write(
        chosen,
        f"memory, {chosen.device}",
        {"model": chosen.model, "chunk_length": chosen.chunk_length, "points": points},
    )
    return points


if __name__ == "__main__":
    main()
