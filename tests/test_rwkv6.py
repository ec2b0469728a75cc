"""RWKV-6 through the public functions: trained by every tuning, evaluated, generated from, exported, verified."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.cells.time_mix_rwkv6 import MIXED
from rwkv_rev.equivalence.oracles import rwkv_package
from rwkv_rev.equivalence.original import open_original
from rwkv_rev.folders.source import parse_source
from rwkv_rev.fresh import init

Cli = Callable[..., tuple[int, str, str]]


def test_every_tuning_and_every_command(cli: Cli, tmp_path: Path) -> None:
    text, sizes = counting_text(tmp_path / "data.txt"), {"hidden_size": 16, "num_hidden_layers": 2}
    init("6", tmp_path / "fresh", settings={**sizes, "head_size": 8, "mix_rank": 4, "decay_rank": 6}, seed=1)
    short = {"lr": 3e-3, "context_length": 128, "chunk_length": 32}
    finetune(settings(tmp_path / "fresh", text, tmp_path / "full", max_steps=6, **short))
    assert losses(tmp_path / "full")[-1] < losses(tmp_path / "full")[0] - 0.02
    for tune in ("lora", "state"):
        finetune(settings(tmp_path / "full", text, tmp_path / tune, tune=tune, max_steps=2, **short))
    before = load_file(tmp_path / "full/model.safetensors")
    changed = {
        name
        for name, tensor in load_file(tmp_path / "lora/model.safetensors").items()
        if not torch.equal(tensor, before[name].float()) and ".1." in name
    }
    pairs = [*(f"{name}_mix" for name in MIXED), "decay"]
    maps = {f"{name}_{part}" for name in pairs for part in ("down", "up")}
    assert {name.split(".")[-2] for name in changed} == maps | {
        "receptance",
        "key",
        "value",
        "gate",
        "output",
    }
    tuned = load_file(tmp_path / "state/model.safetensors")
    assert all(torch.equal(tuned[name], tensor.float()) for name, tensor in before.items())
    assert float(tuned["model.initial_wkv.1"].abs().max()) > 0

    code, out, _ = cli("eval", "state", "--data", text, "--context-length", 128, "--json")
    assert code == 0 and 0 < json.loads(out)["total"]["bits_per_byte"] < 9
    code, out, _ = cli("generate", "full", "--prompt", "7 squared", "--max-new-tokens", 4, "--seed", 1)
    assert code == 0 and out.startswith("7 squared")
    code, out, _ = cli("inspect", "full", "--context-length", "64k", "--chunk-length", 256)
    assert code == 0 and "reversible" in out and "RWKV-6" in out
    code, _, err = cli("export", "state", "--output", "back.pth")
    assert code == 0, err
    # its tuned state too, by the rwkv package and the scan
    code, out, err = cli("verify", "state", "--tokens", 32, "--context", 72, "--chunk", 24)
    assert code == 0, out + err
    logits = ("--tokens", 32, "--no-reversal", "--no-gradients")
    code, out, err = cli("verify", "state", "--original", "back.pth", "--oracle", "naive", *logits)
    assert code == 0, out + err


def test_every_layout_gives_the_rwkv_package_the_same(tmp_path: Path) -> None:
    """From one foreign layout to another: maps lie transposed, and in other orders, in one of them."""
    pytest.importorskip("rwkv")
    rwkv_rev.convert("bundled:rwkv-6", tmp_path / "model")
    ids = torch.randint(256, (70,), generator=torch.Generator().manual_seed(0))
    sources = ["bundled:rwkv-6"]
    for to in ("hf", "fla"):
        rwkv_rev.export(tmp_path / "model", tmp_path / to, to=to)
        sources.append(str(tmp_path / to))
    found = []
    for source in sources:
        with open_original(parse_source(source)) as original:
            found.append(torch.cat(list(rwkv_package(original, ids))))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_bundled_over_1024_tokens(bundled: dict[str, Path]) -> None:
    """Largest |delta logit| 1e-4 and every top-1 against the ``rwkv`` package, and against the float64 scan."""
    report = rwkv_rev.verify(bundled["6"], tokens=1024)
    assert report.passed and {row.oracle for row in report.rows} == {"rwkv", "naive"}
    for row in report.rows:
        assert row.comparison.tokens == 1024
        assert row.comparison.largest <= 1e-4 and row.comparison.top1 == 1.0
