"""Objectives for long contexts, side by side: same model, same data, same steps; what each of them is good for.

    python examples/objectives/objectives.py [--steps 48] [--json FILE] [--plot FILE] ...

The bundled RWKV-5.2 is fine-tuned on Python's own reference manual, a topic a document, by each objective of
``rwkv-rev finetune --objective`` with the exact gradient, and by the next token with a gradient cut at every chunk.
Measured on topics that are held out, in bits per byte, without weights and without a gradient:

- by position in a context of T tokens;
- after a change of document: the first tokens of another topic behind the end of one, the state going on;
- at a second reading of half a context;
- of what is asked for again after a whole context, by how far back it stands: how much less its bytes cost than when
  they were first read. Behind the marker of ``recall``, which no other objective has seen, and behind an empty line.
  The first bytes of a span are given, those after them count.

The next token is trained once more with another seed, in another order of the rows: what differs by no more than these
two do is noise.
"""

import argparse
import json
import math
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.state import ModelState
from rwkv_rev.training.objectives.recall import AFTER, MARKER

RUNS: dict[str, dict[str, Any]] = {
    "truncated next-token": {"bptt": "truncated"},
    "next-token": {},
    "next-token with another seed": {"seed": 1},
    "position-weighted": {"objective": "position-weighted"},
    "second-pass": {"objective": "second-pass"},
    "recall": {"objective": "recall"},
    "adapt": {"objective": "adapt"},
}
BEFORE = "before training"
HELD_OUT = 5
"""Every so manieth topic is held out."""
SPAN, CUE = 32, 8
"""Bytes of what is asked for again, and how many of them are given; as ``recall`` asks."""
SPANS = 4
"""Spans at each distance, one behind the other, the first of them so far back."""
SEPARATORS = {"behind the marker": MARKER, "behind an empty line": AFTER}


@dataclass
class Settings:
    """Of every run; lengths in tokens, which are bytes here."""

    steps: int = 48
    context_length: int = 2048
    chunk_length: int = 512
    batch_size: int = 2
    lr: float = 5e-4
    held_out_rows: int = 16
    runs: list[str] = field(default_factory=lambda: list(RUNS))

    @property
    def edges(self) -> list[int]:
        """Borders of the positions: an eighth of the context, a quarter, a half, all."""
        return [0, *(self.context_length >> power for power in (3, 2, 1, 0))]

    @property
    def distances(self) -> list[int]:
        """Bytes from a span's beginning to where it is asked for: doubled up to the context's beginning."""
        found = [2 * SPAN]
        while 2 * found[-1] < self.context_length:
            found.append(2 * found[-1])
        return [*found, self.context_length]


def topics() -> tuple[list[str], list[str]]:
    """Topics of Python's reference manual: to train on, and held out."""
    from pydoc_data.topics import topics as all_topics

    texts = [all_topics[name] for name in sorted(all_topics)]
    held_out = texts[::HELD_OUT]
    return [text for number, text in enumerate(texts) if number % HELD_OUT], held_out


def rows_of(texts: list[str], length: int, count: int) -> Tensor:
    """[count, length] bytes: the first full context of each topic, then the second of each."""
    raw = [text.encode() for text in texts]
    places = range(0, max(map(len, raw)), length)
    cut = (list(text[place : place + length]) for place in places for text in raw)
    full = [row for row in cut if len(row) == length][:count]
    if len(full) < count:
        raise SystemExit(f"{len(full)} held-out rows of {length} bytes, not {count}: fewer --held-out-rows")
    return torch.tensor(full)


@torch.no_grad()
def bits(
    model: RwkvRevForCausalLM, ids: Tensor, state: ModelState | None = None
) -> tuple[Tensor, ModelState]:
    """What each token but the first costs, [B, T - 1], and the state after all."""
    costs, states = [], []
    for number, row in enumerate(ids.split(4)):
        given = None if state is None else state.each(lambda t, at=4 * number: t[:, at : at + 4])
        output = model(row, state=given)
        costs.append(
            torch.nn.functional.cross_entropy(
                output.logits[:, :-1].transpose(1, 2).float(), row[:, 1:], reduction="none"
            )
        )
        states.append(output.state)
    kinds = zip(*(each.tensors() for each in states), strict=True)
    return torch.cat(costs) / math.log(2), type(states[0])(*(torch.cat(parts, dim=1) for parts in kinds))


def measure(model: RwkvRevForCausalLM, rows: Tensor, settings: Settings) -> dict[str, Any]:
    """All figures of a model, bits per byte, from held-out rows [n, T]."""
    length = settings.context_length
    costs, after = bits(model, rows)
    edges = settings.edges
    positions = {
        f"{start:,}-{stop:,}": costs[:, max(0, start - 1) : stop - 1].mean().item()
        for start, stop in pairwise(edges)
    }
    half = rows[:, : length // 2]
    changed, _ = bits(model, torch.cat([half, rows.roll(1, 0)[:, : length // 8]], dim=1))
    twice, _ = bits(model, torch.cat([half, half], dim=1))
    found: dict[str, Any] = {
        "positions": positions,
        "after a change": changed[:, length // 2 :].mean().item(),
        "second reading": twice[:, length // 2 :].mean().item(),
        "first reading": twice[:, : length // 2 - 1].mean().item(),
    }
    for name, text in SEPARATORS.items():
        mark = torch.tensor([list(text.encode())]).expand(len(rows), -1)
        found[name] = {}
        for distance in settings.distances:
            begins = range(length - distance, length - distance + min(distance, SPANS * SPAN), SPAN)
            first, again = 0.0, 0.0
            for begin in begins:
                asked, _ = bits(model, torch.cat([mark, rows[:, begin : begin + SPAN]], dim=1), after)
                again += asked[:, mark.shape[1] + CUE - 1 :].mean().item() / len(begins)
                first += costs[:, begin + CUE - 1 : begin + SPAN - 1].mean().item() / len(begins)
            found[name][f"{distance:,}"] = {"first": first, "again": again}
    return found


def load(folder: Path) -> RwkvRevForCausalLM:
    return RwkvRevForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare(model: str, settings: Settings) -> dict[str, Any]:
    """Every run, and the model before any."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = Path(model)
        if model.startswith("bundled:"):
            start = folder / "model"
            rwkv_rev.convert(model, start)
        train, held_out = topics()
        data = folder / "train.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in train), "utf-8")
        rows = rows_of(held_out, settings.context_length, settings.held_out_rows)
        results = [{"run": BEFORE, **measure(load(start), rows, settings)}]
        for name in settings.runs:
            output, began = folder / name, time.process_time()
            done = rwkv_rev.finetune(
                start, data, output, cache_dir=str(folder / "cache"), context_length=settings.context_length,
                chunk_length=settings.chunk_length, batch_size=settings.batch_size, lr=settings.lr,
                max_steps=settings.steps, warmup=min(8, settings.steps), save_every=0, device="cpu", num_workers=1,
                **RUNS[name],
            )  # fmt: skip
            seconds = time.process_time() - began
            figures = measure(load(output), rows, settings)
            results.append({"run": name, "tokens": done.tokens, "cpu_seconds": seconds, **figures})
            print(f"{name}: {done.tokens:,} tokens, {seconds:.0f} CPU seconds", flush=True)
    return {
        "model": model if model.startswith("bundled:") else start.name,
        "settings": asdict(settings),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "results": results,
    }


def tables(report: dict[str, Any]) -> str:
    """In Markdown: of all text, and of what is asked for again."""
    results = report["results"]
    places = list(results[0]["positions"])
    lines = [
        f"| bits per byte | tokens | {' | '.join(places)} | after a change | first reading | second |",
        "|---" * (len(places) + 5) + "|",
    ]
    for row in results:
        further = (row[name] for name in ("after a change", "first reading", "second reading"))
        figures = [*row["positions"].values(), *further]
        tokens = f"{row['tokens']:,}" if "tokens" in row else "-"
        lines.append(f"| {row['run']} | {tokens} | {' | '.join(f'{x:.3f}' for x in figures)} |")
    for name in SEPARATORS:
        distances = list(results[0][name])
        lines += [
            "",
            f"| saved, {name}, bytes back | {' | '.join(distances)} |",
            "|---" * (len(distances) + 1) + "|",
        ]
        for row in results:
            lines.append(f"| {row['run']} | {' | '.join(f'{x:+.2f}' for x in saved(row[name]))} |")
    return "\n".join(lines)


def saved(asked: dict[str, dict[str, float]]) -> list[float]:
    """Bits per byte that were saved where something was asked for again, by distance."""
    return [cost["first"] - cost["again"] for cost in asked.values()]


def plot(report: dict[str, Any], path: Path) -> None:
    """By position, beyond what the next token has; and recall by distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    results = report["results"]
    plain = next((row for row in results if row["run"] == "next-token"), results[0])
    for number, row in enumerate(results):
        style = {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 1.4}
        style["linestyle"] = "--" if row["run"] in (BEFORE, "next-token with another seed") else "-"
        if row["run"] != BEFORE:
            gains = [row["positions"][name] - plain["positions"][name] for name in plain["positions"]]
            axes[0].plot(list(plain["positions"]), gains, **style)
        for axis, name in zip(axes[1:], SEPARATORS, strict=True):
            back = [int(text.replace(",", "")) for text in row[name]]
            label = row["run"] if axis is axes[1] else None
            axis.plot(back, saved(row[name]), label=label, **style)
            axis.set(xscale="log", xlabel="bytes back", title=f"saved, {name}")
    axes[0].set(xlabel="position", ylabel="bits per byte", title=f"held-out text, more than {plain['run']}")
    for axis in axes:
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].sharey(axes[2])
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Settings()
    parser.add_argument(
        "--model", default="bundled:rwkv-5.2", help="bundled:NAME or a model folder, of bytes"
    )
    names = "which to make, of: " + ", ".join(f"'{name}'" for name in RUNS)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=usual.runs, metavar="RUN", help=names)
    parser.add_argument("--steps", type=int, default=usual.steps, help="of the optimizer, in each run")
    parser.add_argument("--context-length", type=int, default=usual.context_length, help="bytes of a row")
    parser.add_argument(
        "--chunk-length", type=int, default=usual.chunk_length, help="bytes; truncated cuts here"
    )
    parser.add_argument("--batch-size", type=int, default=usual.batch_size, help="rows of a step")
    parser.add_argument("--lr", type=float, default=usual.lr, help="learning rate")
    parser.add_argument("--held-out-rows", type=int, default=usual.held_out_rows, help="rows to measure on")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write the curves to this PNG")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = vars(parser.parse_args(given))
    torch.set_num_threads(options.pop("threads"))
    model, json_path, plot_path = (options.pop(name) for name in ("model", "json", "plot"))
    report = compare(model, Settings(**options))
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if plot_path:
        plot(report, plot_path)
    print(tables(report))


if __name__ == "__main__":
    main()
