"""On the CPU against other implementations, as ratios within one run, and the share of time in matrix products.

Forward: all logits of T tokens by the ``rwkv`` package's sequence mode, in a process of its own that answers on
request, in turns with ours. Training: loss and gradients by transformers' RWKV-4 with the same weights, in turns with
ours; both report the loss, which has to agree. Both sides use the same number of threads and float32.
"""

import gc
import importlib.metadata
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rwkv_rev.benchmark.conversion import checkpoint_file
from rwkv_rev.benchmark.settings import BenchSettings, measured_model
from rwkv_rev.benchmark.training import random_tokens, step
from rwkv_rev.conversion import convert
from rwkv_rev.converters.export import export
from rwkv_rev.equivalence.oracles import rwkv_process
from rwkv_rev.equivalence.original import known_to_transformers
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.modeling import RwkvRevForCausalLM

MATRIX_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
LARGEST_OTHERS = 8


class Seconds(NamedTuple):
    """What a run took: by the clock, and of processor time, which other work on the machine changes less."""

    clock: float
    processor: float


def cpu_rows(
    settings: BenchSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """Forward against ``rwkv``, training against transformers (RWKV-4 only), and shares in matrix products."""
    if settings.device.type != "cpu":
        raise RwkvRevError("these comparisons run on the CPU; use --device cpu")
    model = settings.model()
    rows = []
    for length in settings.lengths:
        found = [forward_against_rwkv(settings, length)]
        if known_to_transformers(model.config):
            found += [training_against_transformers(settings, length)]
        found += shares_in_matrix_products(model, settings, length)
        for row in found:
            on_row(row)
        rows += found
    return rows


def forward_against_rwkv(settings: BenchSettings, length: int) -> dict[str, Any]:
    """Seconds of all logits, ours and the ``rwkv`` package's, and the ratio of medians; the least processor time."""
    try:
        version = importlib.metadata.version("rwkv")
    except importlib.metadata.PackageNotFoundError:
        raise RwkvRevError("the rwkv package is not installed: pip install 'rwkv-rev[verify]'") from None
    with tempfile.TemporaryDirectory(prefix="rwkv-rev-bench-") as folder:
        file = checkpoint_file(settings, Path(folder))
        model = _converted(file, Path(folder, "model")).eval()
        ids = random_tokens(model, 1, length)
        ours: list[Seconds] = []
        theirs: list[Seconds] = []
        package = model.config.architecture.rwkv_package
        if package is None:
            raise RwkvRevError(f"the rwkv package knows no {model.config.architecture.called}")
        with _rwkv(file, length, package.environment) as peer, torch.no_grad():
            for turn in range(1 + settings.repeats):
                start, used = time.perf_counter(), time.process_time()
                model(ids)
                seconds = Seconds(time.perf_counter() - start, time.process_time() - used)
                answer = _ask(peer)
                if turn:
                    ours.append(seconds)
                    theirs.append(answer)
    row = _comparison(
        "forward", f"rwkv {version}", length, *([s.clock for s in side] for side in (ours, theirs))
    )
    least, peer_least = (min(s.processor for s in side) for side in (ours, theirs))
    return row | {"processor_seconds": least, "peer_processor_seconds": peer_least}


def training_against_transformers(settings: BenchSettings, length: int) -> dict[str, Any]:
    """Seconds of a loss and its gradients, ours (``full``) and transformers', and the ratio."""
    from transformers import RwkvForCausalLM, __version__

    with tempfile.TemporaryDirectory(prefix="rwkv-rev-bench-") as folder:
        file = checkpoint_file(settings, Path(folder))
        model = _converted(file, Path(folder, "model")).train()
        export(Path(folder, "model"), Path(folder, "peer"), to="hf")
        peer: Any = RwkvForCausalLM.from_pretrained(
            Path(folder, "peer"), dtype=torch.float32, rescale_every=0, use_cache=False
        )
        peer.train()
    ids = random_tokens(model, 1, length)
    ours, theirs, losses = [], [], (0.0, 0.0)
    for turn in range(1 + settings.repeats):
        with model.set_bptt("full"):
            seconds, report = step(model, ids)
        peer_seconds, peer_loss = _peer_step(peer, ids)
        losses = report["loss"], peer_loss
        if turn:
            ours.append(seconds)
            theirs.append(peer_seconds)
    row = _comparison("training", f"transformers {__version__}", length, ours, theirs)
    return row | {"loss": losses[0], "peer_loss": losses[1]}


def shares_in_matrix_products(
    model: RwkvRevForCausalLM, settings: BenchSettings, length: int
) -> list[dict[str, Any]]:
    """The share of the operators' own time that matrix products take in a training step, by strategy.

    ``others`` names the largest of the rest with their shares. From torch.profiler.
    """
    ids = random_tokens(model, settings.batch_size, length)
    rows = []
    for name, setting in settings.bptt().items():
        with model.set_bptt(**setting):
            step(model, ids)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                step(model, ids)
        times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        total = sum(times.values())
        share = sum(times.get(key, 0.0) for key in MATRIX_PRODUCTS) / total
        others = sorted((key for key in times if key not in MATRIX_PRODUCTS), key=lambda key: -times[key])
        rows.append(
            {
                "setting": name,
                "comparison": "share in matrix products",
                **setting,
                "tokens": length,
                "matmul_share": share,
                "others": {key: round(times[key] / total, 4) for key in others[:LARGEST_OTHERS]},
            }
        )
        gc.collect()
    return rows


def _comparison(what: str, peer: str, length: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    seconds, peer_seconds = statistics.median(ours), statistics.median(theirs)
    return {
        "setting": f"{what} against {peer}",
        "comparison": what,
        "peer": peer,
        "tokens": length,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "tokens_per_second": length / seconds,
        "ratio": peer_seconds / seconds,
    }


def _converted(file: Path, folder: Path) -> RwkvRevForCausalLM:
    convert(file, folder, tokenizer="none")
    return measured_model(str(folder), torch.device("cpu"), torch.float32)


def _peer_step(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds, loss.item()


@contextmanager
def _rwkv(file: Path, length: int, variables: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    worker = Path(__file__).with_name("rwkv_timer.py")
    arguments = [file.with_suffix(""), length, torch.get_num_threads()]
    with subprocess.Popen(
        **rwkv_process(
            worker, *arguments, jit=True, variables=variables
        ),  # as the package recommends for speed
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _ask(peer: "subprocess.Popen[str]") -> Seconds:
    requests, answers = peer.stdin, peer.stdout
    assert requests is not None and answers is not None
    try:
        requests.write("go\n")
        requests.flush()
    except BrokenPipeError:
        raise RwkvRevError("the rwkv package failed on this model") from None
    for line in answers:
        if line.startswith("seconds "):
            return Seconds(*map(float, line.split()[1:]))
    raise RwkvRevError("the rwkv package failed on this model")
