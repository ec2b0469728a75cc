"""Peak memory of ``reversible`` on the CPU does not grow with the context, beyond the tape's own bytes.

Each length runs in a process of its own, forked where everything is imported and nothing computed. What is measured is
the peak of its anonymous memory: the high-water mark of the resident set less the mapped files' part (libraries). glibc
is told to give freed blocks back at once and to use one arena, so that the mark is what the program held and not what
the allocator kept. The tape is a stack in the same memory, largest at the end of the forward sweep; its bytes are
subtracted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = 2
"""The first of the trained six: what grows with the context grows in each, and weighs more where few are."""
LENGTHS = [2**12, 2**13, 2**16]
CHUNK = 512
MOST_GROWTH = (LENGTHS[-1] - LENGTHS[0]) * 128 * 4 // 2
"""Half of what one float32 vector of D numbers kept for each token would take, in one layer: 15 MiB. What garbage is
not collected yet makes 8 MiB, at any length."""

PROGRAM = """
import json, os, sys
import torch
from rwkv_rev import RwkvRevForCausalLM

def kibibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

def step(tokens):
    model.zero_grad()
    output = model(tokens, labels=tokens)
    output.loss.backward()
    return output.report

def measure(length):
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    # the same shapes once: gradients, kernels' workspaces and lazily made modules exist before the measurement
    step(tokens[:, : 3 * chunk])
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    report = step(tokens)
    files = kibibytes("RssFile") + kibibytes("RssShmem")
    peak = (kibibytes("VmHWM") - files) * 1024
    print(json.dumps({"length": length, "peak": peak, "tape": report.get("tape_bytes", 0)}), flush=True)

torch.set_num_threads(1)
layers, chunk = map(int, sys.argv[1:3])
for folder, strategy, *lengths in json.loads(sys.argv[3]):
    model = RwkvRevForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=layers).train()
    model.set_bptt(strategy, chunk_length=chunk)
    for length in lengths:
        child = os.fork()
        if child == 0:
            measure(length)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"failed at {length} tokens")
"""


SEEN = [2048, 4096]
"""Lengths of the graph that must be seen to grow."""


@pytest.fixture(scope="module")
def measured(bundled: dict[str, Path]) -> list[dict[int, tuple[int, int]]]:
    """Peak anonymous bytes of a forward and backward pass, and the tape's bytes, by length.

    Of ``reversible`` for RWKV-4 and 5.2, and of ``full``, by one program: what it imports takes 3 s.
    """
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
        "MALLOC_TOP_PAD_": "0",
    }
    work = [
        (str(bundled["4"]), "reversible", *LENGTHS),
        (str(bundled["5.2"]), "reversible", *LENGTHS),
        (str(bundled["5.2"]), "full", *SEEN),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LAYERS), str(CHUNK), json.dumps(work)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["length"] for row in rows] == [*LENGTHS, *LENGTHS, *SEEN]
    found = iter(rows)
    return [
        {length: (row["peak"], row["tape"]) for length, row in zip(lengths, found, strict=False)}
        for _, _, *lengths in work
    ]


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own accounts")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_peak_memory_is_flat(measured: list[dict[int, tuple[int, int]]], version: str) -> None:
    """T = 4k to 64k at C = 512."""
    found = measured[["4", "5.2"].index(version)]
    need = {length: peak - tape for length, (peak, tape) in found.items()}
    table = {
        length: (round(peak / 2**20, 2), round(tape / 2**20, 2)) for length, (peak, tape) in found.items()
    }
    print(f"peak and tape, MiB, by length: {table}")
    assert max(need.values()) - need[LENGTHS[0]] <= MOST_GROWTH, table


@linux
@pytest.mark.slow
def test_the_measurement_sees_growth(measured: list[dict[int, tuple[int, int]]]) -> None:
    """``full`` at 2k and 4k: the graph doubles, by some 30 L D numbers per token, and the measurement says so."""
    (small, _), (large, _) = measured[2].values()
    graph = 2048 * 30 * LAYERS * 128 * 4
    assert 0.8 * graph < large - small < 1.6 * graph
