"""Converting a checkpoint of 0.3 GB needs no more memory of its own than one shard and one tensor.

What counts is anonymous memory (RssAnon): pages of the mapped source and of written files belong to the
system's cache, which drops them when memory is short.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from processes import run_python

SHARD = 80_000_000
WORKER = """
import json, shutil, sys, threading, time
import torch
from rwkv_rev.conversion import convert

def anonymous():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0]) * 1024

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

source, output, shard, *dtypes = sys.argv[1:]
torch.set_num_threads(1)
convert("bundled:rwkv-4", output)  # whatever is imported late is imported now
shutil.rmtree(output)
for dtype in dtypes:
    peak = before = anonymous()
    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = convert(source, output, tokenizer="byte", max_shard_size=int(shard), dtype=dtype)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    shutil.rmtree(output)
    print(json.dumps({"growth": peak - before, "seconds": seconds, "shards": len(result.shards)}))
"""


def synthetic(path: Path) -> dict[str, int]:
    """A 0.3 GB RWKV-5.2 in bfloat16 as ``.pth``; zeros, which take memory only on the disk."""
    D, H, V, F, layers = 2048, 32, 24576, 7168, 1
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (V, D), "head.weight": (V, D)}
    vectors = [f"{name}.{end}" for name in ("ln1", "ln2", "att.ln_x") for end in ("weight", "bias")]
    for i in range(layers):
        b = f"blocks.{i}"
        shapes |= {f"{b}.{name}": (D,) for name in vectors}
        shapes |= {f"{b}.att.time_mix_{letter}": (1, 1, D) for letter in "kvrg"}
        shapes |= {f"{b}.att.{name}": (H, D // H) for name in ("time_decay", "time_faaaa")}
        shapes |= {f"{b}.att.{n}.weight": (D, D) for n in ("receptance", "key", "value", "output", "gate")}
        shapes |= {f"{b}.ffn.time_mix_{letter}": (1, 1, D) for letter in "kr"}
        shapes |= {f"{b}.ffn.key.weight": (F, D), f"{b}.ffn.value.weight": (D, F)}
        shapes |= {f"{b}.ffn.receptance.weight": (D, D)}
    shapes |= {f"{name}.{end}": (D,) for name in ("blocks.0.ln0", "ln_out") for end in ("weight", "bias")}
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save(state, path)
    return {name: tensor.nbytes for name, tensor in state.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory if there is room: its pages are shared memory, not anonymous."""
    shared = Path("/dev/shm")
    roomy = (
        shared.is_dir() and shutil.disk_usage(shared).free > 5e9 and psutil.virtual_memory().available > 8e9
    )
    with tempfile.TemporaryDirectory(dir=shared if roomy else tmp_path) as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_anonymous_memory_while_converting(folder: Path) -> None:
    sizes = synthetic(folder / "big.pth")
    total, largest = sum(sizes.values()), max(sizes.values())
    assert total > 3e8 and largest > 1e8
    cases = {"auto": total, "float32": 2 * total}
    done = run_python(
        [sys.executable, "-c", WORKER, folder / "big.pth", folder / "model", str(SHARD), *cases]
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for (dtype, written), found in zip(cases.items(), map(json.loads, lines), strict=True):
        growth, rate = found["growth"], written / found["seconds"]
        print(f"{dtype}: {growth / 1e6:.0f} MB, {found['shards']} shards, {rate / 1e9:.2f} GB/s written")
        assert found["shards"] > 0.6 * written / SHARD
        assert growth <= SHARD + largest  # what is promised
        assert growth <= 64e6  # what the pieces of rewriter.PIECE elements take, whatever the tensors' sizes
