"""A reversible LSTM over contexts that double: memory, tokens per CPU second, and what division makes of its states.

    python examples/infinite_lstm/infinite_lstm.py [--most 16] [--json FILE] [--plot FILE] ...

For T = 2^12, 2^13, ... tokens one step of training on Python's own reference manual, the gradient of the whole context,
in chunks, with the tape on a disk, each context in a process of its own. Then the states of the trained cell are run
back from the end in two ways: exactly, from the bits that were kept, and as the equation says, by division through the
gates.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from rwkv_rev.architectures.registry import architecture
from rwkv_rev.cells.token_cell import TokenCell
from rwkv_rev.equivalence.text import default_text

MEGABYTE = 1 << 20
BACK = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tokens over which states are divided back."""


@dataclass(frozen=True)
class Row:
    """A step over one context.

    Attributes:
        loss: nats per token, before the step.
        tokens_per_second: of processor time, so that other programs do not count.
        memory: peak of the step, bytes beyond what was there before it, ids among it, and beyond what they predict;
            None where nothing tells it.
        given: bytes of the token ids and of what they predict, which are there whole.
        tape: bytes on the disk.
    """

    context: int
    loss: float
    tokens_per_second: float
    memory: int | None
    given: int
    tape: int


@dataclass(frozen=True)
class Drift:
    """States divided back over some tokens: relative error, None where nothing is left of them; of exact reversal the
    share of numbers that are others."""

    tokens: int
    float32: float | None
    float64: float | None
    exact: float


def own_memory(*, peak: bool) -> int | None:
    """Of this process, bytes: now, or the most since :func:`forget_peak`. On Linux what no file can give back: pages of
    libraries come and go as other programs need room."""
    if sys.platform == "linux":
        with Path("/proc/self/status").open(encoding="utf-8") as status:
            sizes = {
                name: int(rest.split()[0])
                for name, _, rest in (s.partition(":") for s in status)
                if "kB" in rest
            }
        return 1024 * (sizes["VmHWM" if peak else "VmRSS"] - sizes["RssFile"] - sizes["RssShmem"])
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def forget_peak() -> None:
    """Begin anew with the most, where the system can."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def rows_of(text: Tensor, rows: int, length: int) -> Tensor:
    """Token ids [rows, length], each row from another place, around the text's end as often as it takes."""
    ids = torch.empty(rows, length, dtype=torch.int64)
    for row in range(rows):
        turned = text.roll(-row * (len(text) // rows))
        for part in ids[row].split(len(text)):
            part.copy_(turned[: len(part)])
    return ids


def train(model: Any, text: Tensor, arguments: argparse.Namespace) -> list[Row]:
    """A step for each context, each in a process of its own that goes on from the weights of the one before."""
    found = []
    environment = os.environ | {  # freed blocks go back, so that the peak is what the program holds
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
        "MALLOC_TOP_PAD_": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.pt"
        for power in range(arguments.least, arguments.most + 1, arguments.stride):
            given = [sys.executable, __file__, "--step", str(power), "--state", str(state), *arguments.given]
            done = subprocess.run(given, env=environment, stdout=subprocess.PIPE, check=True)
            found.append(Row(**json.loads(done.stdout)))
            print(line_of(found[-1]), flush=True)
        model.load_state_dict(torch.load(state)["model"])
    return found


def step(model: Any, text: Tensor, arguments: argparse.Namespace) -> Row:
    """The one for ``arguments.step``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    if arguments.state.exists():
        before = torch.load(arguments.state)
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
    warm_up = rows_of(text, arguments.batch_size, 3 * arguments.chunk_length)
    model(warm_up, labels=warm_up).loss.backward()
    optimizer.zero_grad()
    ids = rows_of(text, arguments.batch_size, 1 << arguments.step)
    forget_peak()
    first, start = own_memory(peak=False), time.process_time()
    output = model(ids, labels=ids)
    output.loss.backward()
    spent, most = time.process_time() - start, own_memory(peak=True)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, arguments.state)
    memory = None if most is None or first is None else most - first - ids.nbytes
    rate, tape = ids.numel() / spent, output.report["tape_bytes"]
    return Row(1 << arguments.step, float(output.loss.detach()), rate, memory, 2 * ids.nbytes, tape)


def line_of(row: Row) -> str:
    memory = "" if row.memory is None else f"{row.memory / MEGABYTE:.1f}"
    sizes = f"{memory} | {row.given / MEGABYTE:.1f} | {row.tape / MEGABYTE:,.0f}"
    return f"| {row.context:,} | {row.tokens_per_second:,.0f} | {sizes} | {row.loss:.3f} |"


def walked(
    cell: TokenCell, parts: list[Tensor], inputs: list[tuple[Tensor, ...]], back: bool
) -> list[Tensor]:
    """The parts of a state after tokens, or by division before them."""
    parts = list(parts)
    for token in reversed(inputs) if back else inputs:
        for half in reversed(range(2)) if back else range(2):
            gates = cell.gates(half, token, parts)
            for part in reversed(cell.halves[half]) if back else cell.halves[half]:
                z, c = cell.update(part, gates, parts)
                assert z is not None
                parts[part] = (parts[part] - c) / z if back else z * parts[part] + c
    return parts


@torch.no_grad()
def drifts(model: Any, text: Tensor) -> list[Drift]:
    """Of the lowest layer's cell, in the state after 512 tokens."""
    block, found = model.blocks[0], []
    ids = text[None, : 512 + max(BACK)]
    x = block.ln1(model.model.embed(ids, None))
    cell = block.recurrence
    start = cell.advance(cell.exact(cell.empty(1)), x[:, :512], output=False).state
    for tokens in BACK:
        part = x[:, 512 : 512 + tokens]
        after, tape = start, []
        for token in part.split(1, dim=1):
            advanced = cell.advance(after, token, output=False)
            kept = advanced.remnant.tensors(advanced.remnant.size)
            tape.append((token, kept))
            after = advanced.state
        for token, kept in reversed(tape):
            after = cell.retreat(after, token, None, after.remnant(kept)).state
        exact = float((after.memory.mantissa != start.memory.mantissa).double().mean())
        errors = []
        for dtype in (torch.float32, torch.float64):
            cell.to(dtype)
            inputs = list(zip(*(given.unbind(1) for given in cell.project(part.to(dtype))), strict=True))
            first = [value.to(dtype) for value in cell.values(start).memory.unbind(1)]
            last = walked(cell, walked(cell, first, inputs, back=False), inputs, back=True)
            error = torch.stack(last).double() - torch.stack(first).double()
            relative = float(error.norm() / torch.stack(first).double().norm())
            errors.append(relative if relative < 1 else None)
        cell.float()
        found.append(Drift(tokens, *errors, exact))
    return found


def figure_of(rows: list[Row], found: list[Drift]) -> Any:
    """Tokens/s by context, and memory where it was measured, each from zero; errors by tokens back."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    rates, memories, errors = figure.subplots(1, 3)
    rates.plot([row.context for row in rows], [row.tokens_per_second for row in rows], marker="o")
    rates.set_ylabel("tokens per CPU second")
    measured = [(row.context, row.memory / MEGABYTE) for row in rows if row.memory is not None]
    if measured:
        memories.plot(*zip(*measured, strict=True), marker="s")
    memories.set_ylabel("memory, MiB")
    for axes in (rates, memories):
        axes.set_xscale("log", base=2)
        axes.set_xlim(rows[0].context / 1.5, rows[-1].context * 1.5)
        seen = [0, *(value for line in axes.lines for value in line.get_ydata())]
        axes.set_ylim(1.15 * min(seen), 1.15 * max(seen) or 1)
        axes.set_xlabel("tokens of context")
    for name in ("float32", "float64"):
        left = [(row.tokens, error) for row in found if (error := getattr(row, name)) is not None]
        errors.plot(*zip(*left, strict=True), marker="o", label=f"division in {name}")
    errors.axhline(1e-17, color="black", label="exact reversal: 0")
    errors.set_xscale("log", base=2)
    errors.set_yscale("log")
    errors.set_xlabel("tokens back")
    errors.set_ylabel("relative error of the state")
    errors.legend()
    return figure


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--least", type=int, default=12, help="log2 of the shortest context")
    parser.add_argument("--most", type=int, default=16, help="log2 of the longest")
    parser.add_argument("--stride", type=int, default=1, help="of log2")
    parser.add_argument("--chunk-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; a second one has nothing to do")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--step", type=int, help="do that of one context alone, log2, and print it")
    parser.add_argument("--state", type=Path, help="with it: weights to begin with, and where they go")
    arguments = parser.parse_args(given)
    arguments.given = sys.argv[1:] if given is None else given
    return arguments


def main(given: list[str] | None = None) -> tuple[list[Row], list[Drift]]:
    """Print both tables."""
    arguments = parse(given)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    sizes = architecture("reversible-lstm").sizes(arguments.width)
    model = RwkvRevForCausalLM(
        RwkvRevConfig(
            rwkv_version="reversible-lstm",
            vocab_size=256,
            hidden_size=arguments.width,
            num_hidden_layers=arguments.layers,
            **sizes,
        )
    ).train()
    model.set_bptt("reversible", chunk_length=arguments.chunk_length, tape="disk")
    text = torch.frombuffer(bytearray(default_text().encode()), dtype=torch.uint8).long()
    if arguments.step is not None:
        print(json.dumps(asdict(step(model, text, arguments))))
        return [], []
    print(
        "| context | tokens per CPU second | memory, MiB | ids, MiB | tape on disk, MiB | loss |", flush=True
    )
    print("|---|---|---|---|---|---|", flush=True)
    rows = train(model, text, arguments)
    found = drifts(model, text)
    print("\n| tokens back | division, float32 | division, float64 | exact reversal |\n|---|---|---|---|")
    for row in found:
        errors = ["nothing left" if error is None else f"{error:.1e}" for error in (row.float32, row.float64)]
        print(f"| {row.tokens} | {' | '.join(errors)} | {row.exact:g} |")
    if arguments.json:
        figures = {
            "torch": torch.__version__,
            "rows": [asdict(r) for r in rows],
            "drift": [asdict(d) for d in found],
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        figure_of(rows, found).savefig(arguments.plot, dpi=110)
    return rows, found


if __name__ == "__main__":
    main()
