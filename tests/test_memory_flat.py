"""Peak memory of ``reversible`` on the CPU does not grow with the context, beyond the tape's own bytes.

Each length runs in a process of its own, forked where everything is imported and nothing computed. What is measured is
the peak of its anonymous memory: the high-water mark of the resident set less the mapped files' part (libraries). glibc
is told to give freed blocks back at once and to use one arena, and Python to look for garbage often, so that the mark
is what the program held and not what nobody had collected yet. The tape is a stack in the same memory, largest at the
end of the forward sweep; its bytes are subtracted.
"""

import json
import sys
from pathlib import Path

import pytest
from processes import run_python

LAYERS = 2
"""The first of the trained six: what grows with the context grows in each, and weighs more where few are."""
LENGTHS = {"4": [2**12, 2**15], "5.2": [2**12, 2**13, 2**16]}
CHUNK = 512
KEPT = 128 * 4 // 2
"""Bytes for each token: half of one float32 vector of D numbers, in one layer."""

PROGRAM = """
import ctypes, gc, json, os, sys
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
    gc.collect()
    glibc.malloc_trim(0)  # also what lies between blocks in use
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    report = step(tokens)
    files = kibibytes("RssFile") + kibibytes("RssShmem")
    peak = (kibibytes("VmHWM") - files) * 1024
    print(json.dumps({"length": length, "peak": peak, "tape": report.get("tape_bytes", 0)}), flush=True)

torch.set_num_threads(1)
gc.freeze()
gc.set_threshold(200, 5, 5)
glibc = ctypes.CDLL(None)
# arenas, and where freed blocks go: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
for option, value in ((-8, 1), (-3, 2**20), (-1, 2**20), (-2, 0)):
    assert glibc.mallopt(option, value) == 1
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

    Of ``reversible`` for RWKV-4 and 5.2, and of ``full``, by one program.
    """
    work = [
        # what the collector has not come to yet adds to a peak: of RWKV-4, whose contexts are short, the least of two
        *[(str(bundled["4"]), "reversible", *LENGTHS["4"])] * 2,
        (str(bundled["5.2"]), "reversible", *LENGTHS["5.2"]),
        (str(bundled["5.2"]), "full", *SEEN),
    ]
    done = run_python([sys.executable, "-c", PROGRAM, LAYERS, CHUNK, json.dumps(work)])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["length"] for row in rows] == [length for _, _, *lengths in work for length in lengths]
    found = iter(rows)
    by_length = [
        {length: (row["peak"], row["tape"]) for length, row in zip(lengths, found, strict=False)}
        for _, _, *lengths in work
    ]
    least = {length: min(each[length] for each in by_length[:2]) for length in LENGTHS["4"]}
    return [least, *by_length[2:]]


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own accounts")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_peak_memory_is_flat(measured: list[dict[int, tuple[int, int]]], version: str) -> None:
    """T = 4k to 32k or 64k at C = 512."""
    found = measured[["4", "5.2"].index(version)]
    need = {length: peak - tape for length, (peak, tape) in found.items()}
    table = {
        length: (round(peak / 2**20, 2), round(tape / 2**20, 2)) for length, (peak, tape) in found.items()
    }
    print(f"peak and tape, MiB, by length: {table}")
    first, *_, last = LENGTHS[version]
    assert max(need.values()) - need[first] <= (last - first) * KEPT, table


@linux
@pytest.mark.slow
def test_the_measurement_sees_growth(measured: list[dict[int, tuple[int, int]]]) -> None:
    """``full`` at 2k and 4k: the graph doubles, by some 30 L D numbers per token, and the measurement says so."""
    (small, _), (large, _) = measured[2].values()
    graph = 2048 * 30 * LAYERS * 128 * 4
    assert 0.8 * graph < large - small < 1.6 * graph
