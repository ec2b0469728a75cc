"""Recall over a distance no chunk sees: exact gradients learn it, truncated ones cannot.

    python examples/long_recall/long_recall.py [--device cuda] [--distance 8192] [--chunk-length 1024] ...

A row states a few facts (a key token, then its value token) over and over in a statement of half the distance, goes
on with filler for the whole distance, and ends with one question per fact: its key alone. Only the answers count in
the loss, and every question stands at least ``distance`` tokens behind the last statement:

    k1 v2 k0 v1 f f k1 v2 k0 v1 k0 v1 ...  |  f f f f ... f f f f f f f f  k0 k1        answers: v1 v2
    statement                                 distance

Each value is drawn anew for every row, so a model that knows nothing of the facts is right once in ``values`` answers.

The same model (from the same initialisation), rows, steps and learning rate run under ``reversible``, whose gradient
is that of the whole row, and ``truncated``, whose gradient ends at the border of the chunk. Both carry the state
through the whole row in the forward pass; only the first can learn what to write into it.

All value tokens start with one and the same embedding: what tells them apart must be learned from answers that come
``distance`` tokens later. Truncated gradients never reach them, so under ``truncated`` the state cannot depend on the
answers, whatever else is learned. (Random embeddings would be told apart from the start, and a model that writes
random features of them could be *read* without any gradient through time, as in a reservoir computer: that would not
be learning over a distance.)

A randomly initialised RWKV-5.2 forgets too fast for this: its slowest channel loses exp(-6)/ln(2) = 0.0036 bits per
step, 29 bits over 8,192. For both strategies the slower half of the channels starts at ``time_decay`` -11 to -10
instead (0.2 to 0.5 bits over 8,192). With ``--architecture 7`` the slower half of RWKV-7's starts at rates that are as
slow; its decays follow from the data besides, by low-rank maps that start at zero. With 6 it is the same.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from rwkv_rev.device import choose_device

STRATEGIES = ("reversible", "truncated")
ARCHITECTURES = ("5.2", "6", "7")
SLOW_DECAY = (-11.0, -10.0)
"""Initial ``time_decay`` of the slower half of the channels."""
FAST_DECAY = (-6.0, -1.0)
"""Initial ``time_decay`` of the others: the range of the official initialisation."""
EMBEDDING_SCALE = 0.1
"""Standard deviation of the initial embeddings, but of the values'."""
VALUE_SCALE = 0.01
"""Standard deviation of the vector that every value starts with; LayerNorm follows, so small means soon apart."""
STATED = 0.75
"""Share of the statement's tokens that state facts; the rest is filler."""
WARMUP_STEPS = 10
HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True)
class Task:
    """Rows of ``1.5 * distance`` tokens; the vocabulary is keys, then values, then fillers."""

    distance: int = 8192
    chunk_length: int = 1024
    pairs: int = 2
    values: int = 4
    fillers: int = 4

    def __post_init__(self) -> None:
        if self.distance % (2 * self.chunk_length):
            raise ValueError(
                f"distance {self.distance} must be an even number of chunks of {self.chunk_length} tokens"
            )
        if self.repeats < 1:
            raise ValueError(
                f"{self.pairs} facts and as many questions need more than {self.statement} tokens"
            )

    @property
    def statement(self) -> int:
        """Tokens at the beginning in which the facts are stated."""
        return self.distance // 2

    @property
    def length(self) -> int:
        return self.statement + self.distance

    @property
    def repeats(self) -> int:
        """How often each fact is stated; its last tokens stay filler, one more than questions."""
        return min(int(self.statement * STATED), self.statement - self.pairs - 1) // (2 * self.pairs)

    @property
    def vocab_size(self) -> int:
        return self.pairs + self.values + self.fillers

    @property
    def chance(self) -> float:
        return 1 / self.values

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and labels [count, length] int64; labels are -100 except at the answers."""
        pairs = self.pairs
        ids = torch.randint(pairs + self.values, self.vocab_size, (count, self.length), generator=generator)
        values = pairs + torch.randint(self.values, (count, pairs), generator=generator)
        # facts end as far before the statement's end as questions begin before the row's: distance or more apart
        places = (self.statement - pairs - 1) // 2
        place = 2 * _shuffled(count, places, generator)[:, : pairs * self.repeats]
        ids.scatter_(1, place, torch.arange(pairs).repeat(count, self.repeats))
        ids.scatter_(1, place + 1, values.repeat(1, self.repeats))
        asked = _shuffled(count, pairs, generator)
        ids[:, -pairs - 1 : -1] = asked
        labels = torch.full_like(ids, -100)
        labels[:, -pairs:] = values.gather(1, asked)  # a label is what the token before it predicts
        return ids, labels


@dataclass(frozen=True)
class Run:
    """How to train: sizes of the model and of the optimisation, equal for every strategy."""

    width: int = 64
    head_size: int = 16
    layers: int = 2
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 5e-3
    evaluate_every: int = 10
    held_out_rows: int = 256
    device: str = "cpu"
    architecture: str = "5.2"


def build_model(task: Task, run: Run, seed: int) -> RwkvRevForCausalLM:
    """A model of the official initialisation, but for its embeddings and slow decays (see above)."""
    torch.manual_seed(seed)
    model = RwkvRevForCausalLM(
        RwkvRevConfig(
            rwkv_version=run.architecture,
            vocab_size=task.vocab_size,
            hidden_size=run.width,
            num_hidden_layers=run.layers,
            num_attention_heads=run.width // run.head_size,
            head_size=run.head_size,
            intermediate_size=2 * run.width,
        )
    )
    with torch.no_grad():
        embeddings = dict(model.named_parameters())["model.embeddings.weight"]
        embeddings.normal_(std=EMBEDDING_SCALE)
        embeddings[task.pairs : task.pairs + task.values] = torch.randn(run.width) * VALUE_SCALE
        for name, decay in model.named_parameters():
            if not name.endswith(("time_decay", "decay_base")):
                continue
            slow = torch.linspace(*SLOW_DECAY, decay.numel() // 2)
            fast = torch.linspace(*FAST_DECAY, decay.numel() - slow.numel())
            decay.copy_(_parameter(run.architecture, torch.cat([slow, fast])).view_as(decay))
    return model.to(run.device)


def _parameter(architecture: str, decay: Tensor) -> Tensor:
    """What an architecture stores for decays exp(-exp(``decay``)): of RWKV-7 they are exp(-e^{-1/2} sigmoid(w0))."""
    return torch.logit(decay.exp() * math.exp(0.5)) if architecture == "7" else decay


@torch.no_grad()
def evaluate(
    model: RwkvRevForCausalLM, task: Task, rows: tuple[Tensor, Tensor], batch_size: int
) -> tuple[float, float]:
    """Share of right answers and mean cross-entropy (nats) of the answers."""
    right, loss = 0, 0.0
    for ids, labels in zip(*(x.split(batch_size) for x in rows), strict=True):
        logits = model(ids, logits_to_keep=task.pairs + 1).logits[:, :-1].float().flatten(0, 1)
        answers = labels[:, -task.pairs :].flatten()
        right += int((logits.argmax(dim=-1) == answers).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, answers, reduction="sum"))
    count = rows[0].shape[0] * task.pairs
    return right / count, loss / count


def train(strategy: str, task: Task, run: Run, seed: int, *, quiet: bool = False) -> dict[str, Any]:
    """One training run; the curve is measured on rows never trained on."""
    model = build_model(task, run, seed)
    model.set_bptt(strategy, chunk_length=task.chunk_length)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    ids, labels = task.rows(run.held_out_rows, torch.Generator().manual_seed(HELD_OUT_SEED))
    held_out = ids.to(run.device), labels.to(run.device)
    generator = torch.Generator().manual_seed(seed)
    curve: list[dict[str, float]] = []
    report: dict[str, Any] = {}
    if run.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    seconds = 0.0
    for step in range(run.steps + 1):
        if step % run.evaluate_every == 0 or step == run.steps:
            accuracy, loss = evaluate(model, task, held_out, run.batch_size)
            curve.append({"step": step, "accuracy": accuracy, "loss": loss})
            if not quiet:
                print(
                    f"{strategy:10}  seed {seed}  step {step:4}  accuracy {accuracy:.3f}  "
                    f"loss {loss:.3f}  {seconds:.0f} s",
                    flush=True,
                )
        if step == run.steps:
            break
        start = time.perf_counter()
        ids, labels = (rows.to(run.device) for rows in task.rows(run.batch_size, generator))
        output = model(ids, labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        output.loss.item()  # waits for the device, so that seconds are seconds
        seconds += time.perf_counter() - start
        report = output.report or {}
    result = {
        "strategy": strategy,
        "seed": seed,
        "accuracy": curve[-1]["accuracy"],
        "loss": curve[-1]["loss"],
        "training_seconds": seconds,
        "tape_bytes": report.get("tape_bytes", 0),
        "curve": curve,
    }
    if run.device.startswith("cuda"):
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def compare(task: Task, run: Run, seeds: list[int], *, quiet: bool = False) -> dict[str, Any]:
    """Every strategy with every seed, and what they ran on."""
    cuda = run.device.startswith("cuda")
    return {
        "task": asdict(task)
        | {"context_length": task.length, "repeats": task.repeats, "chance": task.chance},
        "run": asdict(run),
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "results": [train(name, task, run, seed, quiet=quiet) for seed in seeds for name in STRATEGIES],
    }


def table(report: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| strategy | seed | accuracy | loss (nats) | training s | tape MB | peak device MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        peak = f"{row['peak_device_bytes'] / 1e6:,.0f}" if "peak_device_bytes" in row else "-"
        lines.append(
            f"| {row['strategy']} | {row['seed']} | {row['accuracy']:.3f} | {row['loss']:.3f} | "
            f"{row['training_seconds']:.0f} | {row['tape_bytes'] / 1e6:.1f} | {peak} |"
        )
    task = report["task"]
    guess = math.log(task["values"])
    lines.append(f"| guessing | | {task['chance']:.3f} | {guess:.3f} | | | |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy and loss over the steps, one line per run, and the level of guessing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    task = report["task"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colors = {"reversible": "#0072b2", "truncated": "#d55e00"}
    levels = {"accuracy": task["chance"], "loss": math.log(task["values"])}
    labels = {
        "reversible": f"reversible: gradient of all {task['context_length']:,} tokens",
        "truncated": f"truncated at {task['chunk_length']:,} tokens",
    }
    for axis, (quantity, level) in zip(axes, levels.items(), strict=True):
        name = "guessing" if quantity == "accuracy" else None
        axis.axhline(level, color="0.4", linestyle="--", linewidth=1, label=name)
        for row in report["results"]:
            axis.plot(
                [point["step"] for point in row["curve"]],
                [point[quantity] for point in row["curve"]],
                color=colors[row["strategy"]],
                linewidth=1.6,
                alpha=0.9,
                label=labels.pop(row["strategy"], None) if quantity == "accuracy" else None,
            )
        axis.set_xlabel("training steps")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers, held-out rows")
    axes[0].set_ylim(0, 1.03)
    axes[1].set_ylabel("loss of the answers (nats)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"Recall over {task['distance']:,} tokens, RWKV-{report['run']['architecture']}, {report['machine']}"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task, run = Task(), Run()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--distance", type=int, default=task.distance, help="tokens from facts to questions")
    parser.add_argument("--chunk-length", type=int, default=task.chunk_length, help="tokens per chunk")
    parser.add_argument("--pairs", type=int, default=task.pairs, help="facts of a row")
    parser.add_argument("--values", type=int, default=task.values, help="values a fact can have")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default=run.architecture, help="of RWKV")
    parser.add_argument("--width", type=int, default=run.width)
    parser.add_argument("--head-size", type=int, default=run.head_size)
    parser.add_argument("--layers", type=int, default=run.layers)
    parser.add_argument("--steps", type=int, default=run.steps)
    parser.add_argument("--batch-size", type=int, default=run.batch_size)
    parser.add_argument("--learning-rate", type=float, default=run.learning_rate)
    parser.add_argument("--evaluate-every", type=int, default=run.evaluate_every)
    parser.add_argument("--held-out-rows", type=int, default=run.held_out_rows)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write the curves to this PNG")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = compare(
        Task(options.distance, options.chunk_length, options.pairs, options.values),
        Run(
            options.width,
            options.head_size,
            options.layers,
            options.steps,
            options.batch_size,
            options.learning_rate,
            options.evaluate_every,
            options.held_out_rows,
            device=str(choose_device(options.device)),
            architecture=options.architecture,
        ),
        options.seed,
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)
    print(table(report))


def _shuffled(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count], each row the numbers below ``count`` in random order."""
    return torch.rand(rows, count, generator=generator).argsort(dim=1)


if __name__ == "__main__":
    main()
