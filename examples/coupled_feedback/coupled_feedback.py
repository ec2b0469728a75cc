"""Coupled feedback in the place of the token shift: how much of what a model loses comes back, in how many steps.

    python examples/coupled_feedback/coupled_feedback.py [--model rwkv-5.2] [--steps 80] [--json FILE] ...

A bundled model is rewritten by ``rwkv_rev.rewrite(model, token_shift="coupled")`` and trained on bytes of Python's own
reference manual. Beside it stand two others, on the same windows in the same order:

* ``token shift``: the model as it was, trained on likewise, for what training on this text alone gives;
* ``nothing``: the rewritten model with its feedback held at zero, for what the other parameters make up for alone.

What comes back is ``(start - now) / (start - original)``: bits per byte of held-out text that the change cost, and that
training has won back, 100 % where the model is as good as the original was before any training.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import rwkv_rev
from rwkv_rev.equivalence.text import default_text
from rwkv_rev.loading import load_model

MODELS = ("rwkv-4", "rwkv-5.2")
"""Bundled ones whose token shifts ``rewrite`` replaces."""
KINDS = ("token shift", "coupled", "nothing")
HELD_OUT = 0.1


@dataclass(frozen=True)
class Row:
    """One kind after some steps.

    Attributes:
        loss: of held-out text, bits per byte.
        back: the share of the lost bits per byte that has come back; None for the model as it was.
        seconds: of training so far.
    """

    kind: str
    step: int
    loss: float
    back: float | None
    seconds: float


def windows(text: Tensor, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows [rows, length] of a text, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - length + 1, (rows,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: Any, text: Tensor, rows: int, length: int) -> float:
    """Bits per byte of ``rows`` windows at equal distances."""
    model.eval()
    starts = torch.linspace(0, len(text) - length, rows).long().tolist()
    ids = torch.stack([text[start : start + length] for start in starts])
    return float(model(ids, labels=ids).loss) / math.log(2.0)


def made(kind: str, folder: Path) -> Any:
    """The model of a kind, before training."""
    model = load_model(folder, "cpu", "auto").float()
    if kind != "token shift":
        model = rwkv_rev.rewrite(model, token_shift="coupled")
    if kind == "nothing":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".feedback." not in name)
    model.set_bptt("full")
    return model


def train(
    kind: str, model: Any, texts: tuple[Tensor, Tensor], arguments: argparse.Namespace
) -> Iterator[tuple[int, float, float]]:
    """Step, held-out loss and seconds, at each step that is asked for."""
    text, held_out = texts
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=5)
    given = windows(text, arguments.batch_size, arguments.window, arguments.seed)
    spent = 0.0
    for step in range(arguments.steps + 1):
        if step == arguments.steps or step % arguments.every == 0:
            yield step, held_out_loss(model, held_out, arguments.held_out_windows, arguments.window), spent
        if step == arguments.steps:
            return
        start = time.perf_counter()
        model.train()
        ids = next(given)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - start


def table(rows: list[Row]) -> str:
    """A line for each step."""
    lines = [
        "| steps | " + " | ".join(f"{kind} | back" for kind in KINDS[1:]) + f" | {KINDS[0]} |",
        "|---|---|---|---|---|---|",
    ]
    for step in sorted({row.step for row in rows}):
        found = {row.kind: row for row in rows if row.step == step}
        cells = [f"{found[kind].loss:.3f} | {100 * (found[kind].back or 0.0):.0f} %" for kind in KINDS[1:]]
        lines.append(f"| {step} | {' | '.join(cells)} | {found[KINDS[0]].loss:.3f} |")
    return "\n".join(lines)


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="rwkv-5.2")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--window", type=int, default=128, help="tokens")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out-windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[Row]:
    """Print the table."""
    arguments = parse(given)
    text = torch.frombuffer(bytearray(default_text().encode()), dtype=torch.uint8).long()
    border = int(len(text) * (1 - HELD_OUT))
    texts, rows, original = (text[:border], text[border:]), [], math.nan
    with TemporaryDirectory() as folder:
        rwkv_rev.convert(f"bundled:{arguments.model}", Path(folder) / "model", verify=False)
        for kind in KINDS:
            torch.manual_seed(arguments.seed)
            model, start = made(kind, Path(folder) / "model"), math.nan
            for step, loss, seconds in train(kind, model, texts, arguments):
                if step == 0:
                    start = loss
                    original = loss if kind == "token shift" else original
                back = None if kind == "token shift" else (start - loss) / (start - original)
                rows.append(Row(kind, step, loss, back, seconds))
    print(table(rows))
    if arguments.json:
        found = {"torch": torch.__version__, "model": arguments.model, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
