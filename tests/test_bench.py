"""``rwkv-rev bench``: rows of the right form, at sizes that take seconds; no test depends on a time."""

import json
import math
import mmap
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python

from rwkv_rev.benchmark import kernels, packed_rows
from rwkv_rev.benchmark.conversion import conversion_rows
from rwkv_rev.benchmark.cpu_compare import cpu_rows
from rwkv_rev.benchmark.environment import environment
from rwkv_rev.benchmark.growth import exponent, fits, longest_context, slope
from rwkv_rev.benchmark.kernels import kernel_rows
from rwkv_rev.benchmark.memory import OUT_OF_MEMORY, AnonymousPeak, anonymous_memory, memory_rows
from rwkv_rev.benchmark.models import SHAPES, benchmark_model, shape_config
from rwkv_rev.benchmark.plots import plot_rows
from rwkv_rev.benchmark.run import run_benchmark
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.cli import main
from rwkv_rev.errors import RwkvRevError, SourceError
from rwkv_rev.modeling import RwkvRevForCausalLM

CPU = torch.device("cpu")
SMALL = {"lengths": (40, 56, 80), "chunk_lengths": (16,), "repeats": 1}
COMMON = {"bench", "shape", "hardware", "versions", "dtype", "command"}


@pytest.fixture
def model_folder(shallow: dict[str, Path]) -> str:
    return str(shallow["5.2"])


def test_exponents_and_lines_are_recovered() -> None:
    sizes = [2**i for i in range(6)]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert slope(sizes, [7 * size + 2 for size in sizes]) == pytest.approx((7, 2))


def test_fits_say_where_memory_runs_out() -> None:
    rows: list[dict[str, Any]] = [
        {
            "setting": "full",
            "tokens": T,
            "peak_bytes": 100 * T + 1000,
            "seconds": T / 10,
            "limit_bytes": 101_000,
        }
        for T in (100, 200, 400)
    ]
    rows.append({"setting": "full", "tokens": 800, "error": OUT_OF_MEMORY})
    taped = {"setting": "reversible", "chunk_length": 10, "peak_bytes": 5000, "limit_bytes": 101_000}
    rows += [taped | {"tokens": T, "tape_bytes": 3 * (T - 20)} for T in (100, 200, 400)]
    rows.append(taped | {"tokens": 15, "tape_bytes": 7})  # two chunks, of which a line over T tells nothing
    full, reversible = fits(rows)
    assert full["runs_out_at"] == 1000 and full["bytes_per_token"] == pytest.approx(100)
    assert full["time_exponent"] == pytest.approx(1)
    assert reversible["memory_exponent"] == pytest.approx(0, abs=1e-9) and "runs_out_at" not in reversible
    assert reversible["tape_exponent"] == pytest.approx(1)
    assert reversible["tape_bytes_per_token"] == pytest.approx(3)


def test_longest_context_by_the_memory_of_the_card() -> None:
    """By what `full` takes of a model of 1.58 billion weights: 50.2 GB at 16,384 tokens, 95.6 GB at 32,768."""
    tokens, peaks = [16_384, 32_768], [50_227_989_504, 95_600_397_312]
    assert longest_context(tokens, peaks, 95_600_397_312, 4096) == 32_768
    assert longest_context(tokens, peaks, 95_600_397_311, 4096) == 28_672
    assert longest_context(tokens, peaks, 0.95 * 80e9, 4096) == 24_576
    assert longest_context(tokens, peaks, 4e9, 4096) == 0  # less than the weights take


def test_environment_names_everything() -> None:
    row = environment(CPU, torch.bfloat16, "rwkv-rev bench")
    assert "threads" in row["hardware"] and row["versions"]["torch"] == torch.__version__
    assert row["dtype"] == "bfloat16"


def test_training_rows(model_folder: str) -> None:
    settings = BenchSettings(model_folder, strategies=("full", "reversible"), command="this", **SMALL)  # type: ignore[arg-type]
    rows = run_benchmark("training", settings)
    assert all(row.keys() >= COMMON and row["command"] == "this" for row in rows)
    points = [row for row in rows if not row.get("fit")]
    assert [(row["setting"], row["tokens"]) for row in points] == [
        (name, T) for T in (40, 56, 80) for name in ("full", "reversible C=16")
    ]
    for full, reversible in zip(points[::2], points[1::2], strict=True):
        assert full["ratio_to_full"] == 1
        assert reversible["ratio_to_full"] == pytest.approx(reversible["seconds"] / full["seconds"])
        assert reversible["loss"] == pytest.approx(full["loss"], rel=1e-5)
    assert "tape_exponent" in rows[-1]
    json.dumps(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_rows(bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a whole context runs out of a limit that chunks stay below."""
    commands = []

    def forked(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return run_python(command, **options)

    monkeypatch.setattr("subprocess.run", forked)
    settings = BenchSettings(
        str(bundled["5.2"]), lengths=(640,), chunk_lengths=(32,), tapes=("disk",), memory_limit=40_000_000
    )
    full, reversible = memory_rows(settings)
    assert full["setting"] == "full" and full["error"] == OUT_OF_MEMORY
    assert full["limit_bytes"] == 40_000_000 and "error" not in reversible
    assert 0 < reversible["peak_bytes"] < 40_000_000 and reversible["tape_bytes"] > 0
    assert len(commands) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_anonymous_peak_sees_what_is_gone_again() -> None:
    with AnonymousPeak() as memory:
        # not by an allocator, which might hand out memory that it has already
        held = mmap.mmap(-1, 64_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.write(bytes(len(held)))
        end = time.monotonic() + 30  # the watcher looks every 2 ms, where the machine lets it
        while memory.peak - memory.before < 32e6 and time.monotonic() < end:
            time.sleep(0.01)
        held.close()
        after = anonymous_memory()
    assert memory.peak - memory.before > 32e6 > after - memory.before


def test_cpu_rows(model_folder: str) -> None:
    pytest.importorskip("rwkv")
    settings = BenchSettings("bundled:rwkv-4", lengths=(24,), chunk_lengths=(8,), repeats=1)
    forward, training, *shares = cpu_rows(settings)
    assert forward["peer"].startswith("rwkv ") and forward["ratio"] > 0
    assert training["loss"] == pytest.approx(training["peer_loss"], rel=1e-4)
    assert all(0 < row["matmul_share"] < 1 and row["others"] for row in shares)


def test_conversion_rows(tmp_path: Path) -> None:
    rows = conversion_rows(BenchSettings("bundled:rwkv-4", repeats=1), tmp_path)
    assert len(rows) == 1 + hasattr(os, "posix_fadvise")
    for row in rows:
        assert row["convert_to_copy"] == pytest.approx(
            row["convert_bytes_per_second"] / row["copy_bytes_per_second"]
        )
    assert not list(tmp_path.iterdir())


def test_kernel_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "errors", partial(kernels.errors, tokens=128))
    heads = [(function, (1, 40, 2, 8), torch.float32) for function in ("wkv5", "wkv6", "wkv7")]
    rows = kernel_rows(CPU, shapes=[*heads, ("wkv4", (2, 40, 16), torch.float32)])
    assert [row["kernel"] for row in rows] == ["chunked"] * 12
    assert all(row["forward_backward_ms"] > 0 for row in rows[:4])
    assert all(
        float(error) < 1e-4
        for row in rows
        if row["dtype"] == "float32"
        for error in row.get("errors", {}).values()
    )


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RwkvRevError, match="no gradient strategy"):
        BenchSettings(strategies=("fast",))
    with pytest.raises(SourceError, match="neither a shape"):
        BenchSettings("9.9-huge").model()
    with pytest.raises(RwkvRevError, match="at least 2 tokens"):
        BenchSettings(lengths=(1,))
    assert all(shape_config(name).hidden_size % 64 == 0 for name in SHAPES)


def test_shapes_of_published_models() -> None:
    """RWKV-7's ranks are those of the published models; and numbers of weights are theirs."""
    ranks = ("decay_rank", "rate_rank", "residual_rank", "gate_rank")
    found = {
        name: tuple(getattr(shape_config(name), rank) for rank in ranks) for name in SHAPES if name[0] == "7"
    }
    assert found == {
        "7-0.1b": (64, 64, 32, 128),
        "7-1.5b": (96, 96, 64, 256),
        "7-3b": (96, 96, 64, 320),
        "7-7b": (128, 128, 96, 480),
        "7-13b": (128, 128, 96, 480),
    }
    published = {"6-1.5b": 1.6, "6-3b": 3.1, "6-7b": 7.6, "6-14b": 14.1, "7-0.1b": 0.19}
    published |= {"7-1.5b": 1.53, "7-3b": 2.9, "7-7b": 7.2, "7-13b": 13.3}
    for name, billions in published.items():
        with torch.device("meta"):
            model = RwkvRevForCausalLM(shape_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02), name
    assert (shape_config("7-1.5b").num_attention_heads, shape_config("7-1.5b").head_size) == (32, 64)


@pytest.mark.parametrize("version", ["6", "7"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_small_shapes_of_6_and_7(monkeypatch: pytest.MonkeyPatch, version: str, lora_rank: int) -> None:
    """As the published ones: no map is zero, and training is measured, in full and by low-rank additions."""
    shape = {"rwkv_version": version, "layers": 2, "width": 64, "vocab": 32}
    monkeypatch.setitem(SHAPES, "small", shape)
    model = benchmark_model("small", CPU, torch.bfloat16)
    assert all(module.weight.any() for module in model.modules() if isinstance(module, torch.nn.Linear))
    kept = {name.split(".")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == set(model.config.architecture.float32)
    settings = BenchSettings("small", lengths=(32, 64), chunk_lengths=(16,), repeats=1, lora_rank=lora_rank)
    rows = run_benchmark("training", settings)
    points = [row for row in rows if not row.get("fit")]
    assert len(points) == 4 and all(row["tokens_per_second"] > 0 for row in points)
    losses = [row["loss"] for row in points if row["tokens"] == 64]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: list[dict[str, Any]] = [
        {"setting": name, "tokens": T, "peak_bytes": T * 10**6, "tokens_per_second": 5.0, "seconds": 1.0,
         "limit_bytes": 10**10, "hardware": "here", "dtype": "float32", "shape": "small"}
        for name in ("full", "reversible C=16", "reversible C=32") for T in (1024, 2048)
    ]  # fmt: skip
    rows.append({"setting": "full", "tokens": 4096, "error": OUT_OF_MEMORY, "limit_bytes": 10**10})
    rows.append({"setting": "full", "fit": True, "time_exponent": 1.0})
    drawn = plot_rows(rows, tmp_path / "plots")
    assert [path.name for path in drawn] == ["memory-by-context.png", "speed-by-context.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: str) -> None:
    arguments = ["bench", "training", "--shape", model_folder, "--lengths", "32,64", "--chunk-length", "16"]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--repeats", "1", "--json"])
    assert not exit_.value.code
    streams = capsys.readouterr()
    rows = json.loads(streams.out)
    assert len(rows) == 4 and "tokens_per_second" in streams.err
    saved = tmp_path / "rows.json"
    saved.write_text(json.dumps(rows))
    with pytest.raises(SystemExit):
        main(["bench", "--rows", str(saved)])
    table = capsys.readouterr().out
    assert "reversible C=16" in table and torch.__version__ in table
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "training", "--lengths", "many"])
    assert exit_.value.code == 2
    assert math.isfinite(rows[0]["seconds"])


def test_packed_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each way, on a CPU."""
    monkeypatch.setattr(packed_rows, "SHORTEST", 3)
    monkeypatch.setattr(packed_rows, "LONGEST", 12)
    documents = ["--documents", "5", "--row-length", "32", "--chunk-length", "16,32"]
    monkeypatch.setitem(SHAPES, "small", {"rwkv_version": "5.2", "layers": 2, "width": 64, "vocab": 256})
    packed_rows.main(["--device", "cpu", "--shape", "small", *documents])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == ["alone", "padded", "packed", "packed", "packed"]
    assert [row["chunk_length"] for row in rows[3:]] == [16, 32]
    assert rows[0]["steps"] == 5 and rows[0]["padding"] == 0
    assert all(row["tokens_per_second"] > 0 and row["to_alone"] > 0 for row in rows)
