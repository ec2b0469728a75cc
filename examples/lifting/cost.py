"""What lifted remnants cost: a step of RWKV-7 by each kind of remnants, in turns, and the parts of a lift.

    python examples/lifting/cost.py --shape 7-1.5b --chunk-length 256 --context 4096 --rows 1

On a CUDA device the step runs under bfloat16 autocast, by lasting recordings from the third step on. Seconds are those
of the fastest of the timed steps, in one process; the baseline is ``checkpoint`` with whole states.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.benchmark.models import benchmark_model
from rwkv_rev.device import choose_device
from rwkv_rev.reversal.lifting import KeptLifted, Lifted, LiftingPlan, Transition
from rwkv_rev.wkv import wkv7, wkv7_transition

SETTINGS = (
    ("checkpoint", "whole"),
    ("reversible", "whole"),
    ("reversible", "lifted"),
    ("checkpoint", "lifted"),
)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps(shape: str, chunk: int, context: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    """A row per setting: seconds of a step, its tape, and the time against that of the first."""
    device = choose_device("auto")
    model = benchmark_model(shape, device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, context), generator=generator).to(device)

    def step(strategy: str, remnants: str) -> tuple[float, int]:
        model.zero_grad(set_to_none=True)
        synchronize(device)
        start = time.perf_counter()
        with (
            model.set_bptt(strategy, chunk_length=chunk, remnants=remnants),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            out = model(ids, labels=ids)
            out.loss.backward()
        synchronize(device)
        return time.perf_counter() - start, out.report["tape_bytes"]

    found = []
    for strategy, remnants in SETTINGS:
        taken = [
            step(strategy, remnants) for _ in range(3 + repeats)
        ]  # compiled, noted, recorded, then as it stays
        found.append(
            {
                "strategy": strategy,
                "remnants": remnants,
                "shape": shape,
                "chunk_length": chunk,
                "context": context,
                "rows": rows,
                "seconds": min(seconds for seconds, _ in taken[3:]),
                "first_seconds": [round(seconds, 3) for seconds, _ in taken[:3]],
                "tape_bytes": taken[-1][1],
                "device_peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
            }
        )
        found[-1]["times_checkpoint"] = found[-1]["seconds"] / found[0]["seconds"]
        print(json.dumps(found[-1]), flush=True)
    return found


def parts(heads: int, size: int, chunk: int, rows: int, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of each part of a layer's chunk."""
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(rows, chunk, heads, size, generator=generator).to(device)

    r, k, v = (normal().to(dtype) for _ in range(3))
    removal = torch.nn.functional.normalize(normal(), dim=-1)
    gates = (-0.6 * torch.sigmoid(normal() - 4), removal, torch.sigmoid(normal() - 2))
    state = torch.randn(rows, heads, size, size, generator=generator).to(device)
    memory, plan = Lifted.of(state), LiftingPlan()
    transition = Transition(*wkv7_transition(r, k, v, *gates))
    after, remnant = memory.advance(transition, plan)
    size_there = remnant.size.cpu()
    kept = KeptLifted(*remnant.tensors(size_there))
    assert torch.equal(after.retreat(transition, kept).grid.mantissa, memory.grid.mantissa)

    def timed(run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start) / repeats

    found = {
        "wkv7": timed(lambda: wkv7(r, k, v, *gates, state)),
        "transition": timed(lambda: wkv7_transition(r, k, v, *gates)),
        "advance": timed(lambda: memory.advance(transition, plan)),
        "pack": timed(lambda: remnant.tensors(size_there)),
        "retreat": timed(lambda: after.retreat(transition, kept)),
    }
    if device.type == "cuda":
        from rwkv_rev.reversal.triton_lifting import eliminate

        found["eliminate"] = timed(lambda: eliminate(transition.matrix.flatten(0, 1)))
    else:
        from rwkv_rev.reversal.pivoting import factor

        matrices = transition.matrix.double().flatten(0, 1)
        found["factor"] = timed(lambda: factor(matrices))
    found["bits_per_number"] = int(size_there) / state.numel()
    return {name: round(value, 4) for name, value in found.items()}


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7-1.5b")
    parser.add_argument("--chunk-length", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--parts-alone", action="store_true")
    asked = parser.parse_args(given)
    print(
        json.dumps({"parts_ms": parts(asked.heads, asked.size, asked.chunk_length, asked.rows)}), flush=True
    )
    if not asked.parts_alone:
        steps(asked.shape, asked.chunk_length, asked.context, asked.rows, asked.repeats)


if __name__ == "__main__":
    main(sys.argv[1:])
