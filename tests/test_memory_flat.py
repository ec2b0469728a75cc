"""Peak memory of ``reversible`` on the CPU does not grow with the context, beyond the tape's own bytes.

Each length runs in a process of its own. What is measured is the peak of its anonymous memory: the high-water mark of
the resident set less the mapped files' part (libraries). glibc is told to give freed blocks back at once and to use
one arena, so that the mark is what the program held and not what the allocator kept. The tape is a stack in the same
memory, largest at the end of the forward sweep; its bytes are subtracted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LENGTHS = [2**12, 2**13, 2**14, 2**15, 2**16]
CHUNK = 512
MOST_GROWTH = 0.02
"""Of the peak at the first length."""

PROGRAM = """
import json, sys
import torch
from rwkv_rev import RwkvRevForCausalLM

def kibibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

torch.set_num_threads(1)
folder, strategy, length, chunk = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = RwkvRevForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
model.set_bptt(strategy, chunk_length=chunk)
tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))

def step():
    model.zero_grad()
    output = model(tokens, labels=tokens)
    output.loss.backward()
    return output.report

# the same shapes once: gradients, kernels' workspaces and lazily made modules exist before the measurement
warm = tokens
tokens = warm[:, : 3 * chunk]
step()
tokens = warm
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
report = step()
files = kibibytes("RssFile") + kibibytes("RssShmem")
print(json.dumps({"peak": (kibibytes("VmHWM") - files) * 1024, "tape": report.get("tape_bytes", 0)}))
"""


def measure(folder: Path, strategy: str, length: int, chunk: int = CHUNK) -> tuple[int, int]:
    """Peak anonymous bytes of a forward and backward pass, and the tape's bytes."""
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), strategy, str(length), str(chunk)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["tape"]


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own accounts")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_peak_memory_is_flat(bundled: dict[str, Path], version: str) -> None:
    """T = 4k to 64k at C = 512."""
    measured = {length: measure(bundled[version], "reversible", length) for length in LENGTHS}
    first_peak, first_tape = measured[LENGTHS[0]]
    table = {
        length: (round(peak / 2**20, 2), round(tape / 2**20, 2)) for length, (peak, tape) in measured.items()
    }
    print(f"peak and tape, MiB, by length: {table}")
    for peak, tape in measured.values():
        growth = (peak - tape) - (first_peak - first_tape)
        assert growth <= MOST_GROWTH * first_peak, table


@linux
@pytest.mark.slow
def test_the_measurement_sees_growth(bundled: dict[str, Path]) -> None:
    """``full`` at 2k and 4k: the graph doubles (the rest, some 270 MiB, does not), and the measurement says so."""
    small, _ = measure(bundled["5.2"], "full", 2048)
    large, _ = measure(bundled["5.2"], "full", 4096)
    assert large > 1.3 * small
