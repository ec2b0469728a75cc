"""What a reversible GRU or LSTM forgets on text, and what keeping it costs: bits used against the ideal.

    python examples/reversible_rnn/reversible_rnn.py [--cell gru lstm] [--limit none 1 2 3 5] [--json FILE] ...

MacKay, Vicol, Ba and Grosse 2018 ("Reversible Recurrent Neural Networks") train such cells on text with limits on how
many bits a number may forget in a token, and report how much less their buffers take than all hidden states would (32
bits for each number and token), beside what an ideal buffer would take, ``sum log2(1/z)``. Here the same is done on
bytes of Python's own reference manual, for each cell and limit:

1. A model of one layer (embedding, cell, LayerNorm, output layer) is trained on windows of ``--window`` tokens, the
   state carried from one to the next.
2. On held-out text every window is run forwards and back, and the state before it must come back to the bit. Counted
   are the bits that the remnants of all its tokens need when nothing is kept whole: one chunk for each token, the
   paper's regime.
3. Beside it stands what the paper's own buffer takes for the same gates: z in 10 bits, an int64 for each number, a new
   one for all of them as soon as any is full, and a bit for each token that says whether it was.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_rev.cells.reversible_gru import ReversibleGru
from rwkv_rev.cells.reversible_lstm import ReversibleLstm
from rwkv_rev.cells.token_cell import TokenCell
from rwkv_rev.equivalence.text import default_text
from rwkv_rev.reversal.stepped import StepsRemnant, ideal_bits

CELLS: dict[str, type[TokenCell]] = {"gru": ReversibleGru, "lstm": ReversibleLstm}
HIDDEN_BITS = 32
FORGET_BITS = 10
"""Of z in the paper's buffer."""
BUFFER_BITS = 63
"""Of an int64 there; it is full when the next product may need more."""
HELD_OUT = 0.1
FORGET_BIAS = -3.0
EMBEDDING_SCALE = 0.3


@dataclass(frozen=True)
class Row:
    """One cell and limit.

    Attributes:
        limit: bits that a number may forget in a token; None for no limit.
        loss: of held-out text, bits per byte.
        ideal: ``log2(1/z)``, mean over tokens and numbers of the state, bits.
        used: bits of the remnants, likewise.
        buffer: bits of the paper's buffer for the same z, likewise.
        exact: whether all states came back to the bit.
    """

    cell: str
    limit: float | None
    loss: float
    ideal: float
    used: float
    buffer: float
    exact: bool
    tokens: int
    seconds: float

    @property
    def line(self) -> str:
        """A line of the table under :data:`HEADER`."""
        bits = [self.ideal, self.used, self.buffer]
        ratios = [kept / self.ideal for kept in bits[1:]]
        saved = [HIDDEN_BITS / kept for kept in bits]
        found = [
            self.cell,
            "no limit" if self.limit is None else f"{self.limit:g} bits",
            f"{self.loss:.2f}",
            *(f"{kept:.3f}" for kept in bits),
            *(f"{ratio:.2f}" for ratio in ratios),
            *(f"{times:.1f}" for times in saved),
            "yes" if self.exact else "NO",
        ]
        return f"| {' | '.join(found)} |"


HEADER = (
    "| cell | forgets at most | bits/byte | ideal | used | buffer | used/ideal | buffer/ideal | 32/ideal | 32/used | "
    "32/buffer | to the bit |\n" + "|---" * 12 + "|"
)


class ByteModel(nn.Module):
    """Embedding of bytes, one cell, LayerNorm, output layer."""

    def __init__(self, cell: TokenCell, width: int) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(256, width), cell
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def loss(self, state: Any, ids: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        """Mean loss in nats on the exact state's grid, and the exact state after the window."""
        x = self.embedding(ids)
        replay = self.cell.replay(state, x)
        logits = self.head(self.norm(x + replay.out))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, self.cell.exact(type(replay.end)(replay.end.memory.detach()))


@torch.no_grad()
def start_forgetting(model: ByteModel) -> None:
    """Let an LSTM forget at first: where z and p begin at 1/2, some of its sums run away in the first hundred tokens.

    What has run away holds the gates that read it where they are, and such a model learned no more than how often each
    byte comes (4.6 bits a byte, c and h in the thousands).
    """
    cell = model.cell
    if isinstance(cell, ReversibleLstm):
        model.embedding.weight.mul_(EMBEDDING_SCALE)
        for half in range(2):  # z and p
            cell.input.bias[5 * half * cell.size :][: 2 * cell.size] = FORGET_BIAS


def windows(text: Tensor, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets) [rows, length] one after another through ``rows`` parallel pieces of a text."""
    piece = (len(text) - 1) // rows
    ids, targets = (text[shift : shift + rows * piece].view(rows, piece) for shift in (0, 1))
    for start in range(0, piece - length + 1, length):
        yield ids[:, start : start + length], targets[:, start : start + length]


def train(model: ByteModel, text: Tensor, rows: int, length: int, steps: int, rate: float) -> None:
    """``steps`` windows of AdamW, the state carried along."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    done = 0
    while done < steps:
        state = model.cell.exact(model.cell.empty(rows))
        for ids, targets in windows(text, rows, length):
            loss, state = model.loss(state, ids, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                return


@torch.no_grad()
def measure(model: ByteModel, text: Tensor, rows: int, length: int, most: int) -> tuple[float, ...]:
    """Of ``most`` windows: bits per byte; ideal, used and buffer bits per number and token; exactness; tokens."""
    state = model.cell.exact(model.cell.empty(rows))
    losses, ideal, used, buffer, exact, count = [], 0.0, 0.0, 0.0, True, 0
    for ids, targets in list(windows(text, rows, length))[:most]:
        losses.append(float(model.loss(state, ids, targets)[0]) / math.log(2.0))
        x, first, tape = model.embedding(ids), state, []
        for token in x.split(1, dim=1):
            advanced = model.cell.advance(state, token)
            remnant = advanced.remnant
            assert isinstance(remnant, StepsRemnant)
            tape.append((token, remnant))
            state = advanced.state
        after = state
        for token, remnant in reversed(tape):
            assert remnant.size is not None
            used += float(remnant.size.sum())
            kept = after.remnant(remnant.tensors(remnant.size))
            after = model.cell.retreat(after, token, None, kept).state
        exact &= torch.equal(after.memory.mantissa, first.memory.mantissa)
        decays = torch.stack([torch.stack(remnant.decays, dim=1) for _, remnant in tape])  # [C, B, P, M]
        ideal += float(ideal_bits(decays).sum())
        buffer += buffer_bits(decays)
        count += decays.numel()
    return (
        sum(losses) / len(losses),
        ideal / count,
        used / count,
        buffer / count,
        exact,
        len(losses) * rows * length,
    )


def buffer_bits(decays: Tensor) -> float:
    """Bits of the paper's buffers for the z [C, B, P, M] of a window: each part of the state has one of its own."""
    fixed = (decays.double() * 2**FORGET_BITS).round().clamp(min=1)
    tokens, rows, parts, size = decays.shape
    total = 0.0
    for part in range(parts):
        held, buffers = torch.zeros(rows, size, dtype=torch.float64), 1
        for z in fixed[:, :, part]:
            if bool((held >= BUFFER_BITS - FORGET_BITS).any()):
                held, buffers = torch.zeros_like(held), buffers + 1
            held += FORGET_BITS - z.log2()
        total += 64 * buffers * rows * size + 8 * -(-tokens // 8)
    return total


def run(cell: str, limit: float | None, arguments: argparse.Namespace, text: Tensor) -> Row:
    """Train and measure one cell with one limit."""
    torch.manual_seed(arguments.seed)
    start, width, rows, length = time.perf_counter(), arguments.width, arguments.batch_size, arguments.window
    made: Any = CELLS[cell]
    room = {"magnitude": 16, "wide": True} if cell == "lstm" else {}  # sums over all of the text
    model = ByteModel(made(width, width, forget_limit=limit, **room), width)
    start_forgetting(model)
    border = int(len(text) * (1 - HELD_OUT))
    train(model, text[:border], rows, length, arguments.steps, arguments.learning_rate)
    loss, ideal, used, buffer, exact, tokens = measure(
        model, text[border:], rows, length, arguments.held_out_windows
    )
    return Row(cell, limit, loss, ideal, used, buffer, bool(exact), int(tokens), time.perf_counter() - start)


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell", nargs="+", choices=list(CELLS), default=["gru"])
    parser.add_argument(
        "--limit", nargs="+", default=["2"], help="bits that a number may forget in a token; none"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument(
        "--width", type=int, default=64, help="D; the state has 2 D numbers, 4 D for the LSTM"
    )
    parser.add_argument("--window", type=int, default=70)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--held-out-windows", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[Row]:
    """Print the table, a line as soon as it is measured."""
    arguments = parse(given)
    text = torch.frombuffer(bytearray(default_text().encode()), dtype=torch.uint8).long()
    rows: list[Row] = []
    print(HEADER, flush=True)
    for cell in arguments.cell:
        for limit in arguments.limit:
            rows.append(run(cell, None if limit == "none" else float(limit), arguments, text))
            print(rows[-1].line, flush=True)
    if arguments.json:
        found = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
