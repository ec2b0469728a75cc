"""RWKV-7 through the public functions: trained by every tuning, evaluated, generated from, exported, verified."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.equivalence.oracles import rwkv_package
from rwkv_rev.equivalence.original import open_original
from rwkv_rev.folders.source import parse_source
from rwkv_rev.fresh import init

PEER = Path(__file__).parents[2] / "shared" / "peer" / "tiny-rwkv-7v0-834K.pth"

Cli = Callable[..., tuple[int, str, str]]


def test_every_tuning_and_every_command(cli: Cli, tmp_path: Path) -> None:
    text, sizes = counting_text(tmp_path / "data.txt"), {"hidden_size": 16, "num_hidden_layers": 2}
    init("7", tmp_path / "fresh", settings={**sizes, "head_size": 8, "gate_rank": 4}, seed=1)
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
    maps = {f"{name}_{part}" for name in ("decay", "rate", "residual", "gate") for part in ("down", "up")}
    assert {name.split(".")[-2] for name in changed} == maps | {"receptance", "key", "value", "output"}
    tuned = load_file(tmp_path / "state/model.safetensors")
    assert all(torch.equal(tuned[name], tensor.float()) for name, tensor in before.items())
    assert float(tuned["model.initial_wkv.1"].abs().max()) > 0

    code, out, _ = cli("eval", "state", "--data", text, "--context-length", 128, "--json")
    assert code == 0 and 0 < json.loads(out)["total"]["bits_per_byte"] < 9
    code, out, _ = cli("generate", "full", "--prompt", "7 squared", "--max-new-tokens", 4, "--seed", 1)
    assert code == 0 and out.startswith("7 squared")
    code, out, _ = cli("inspect", "full", "--context-length", "64k", "--chunk-length", 256)
    assert code == 0 and "reversible" in out and "RWKV-7" in out
    code, _, err = cli("export", "state", "--output", "back.pth")
    assert code == 0, err
    # its tuned state too, by the rwkv package and the scan
    code, out, err = cli("verify", "state", "--tokens", 32, "--context", 72, "--chunk", 24)
    assert code == 0, out + err
    logits = ("--tokens", 32, "--no-reversal", "--no-gradients")
    code, out, err = cli("verify", "state", "--original", "back.pth", "--oracle", "naive", *logits)
    assert code == 0, out + err


def test_another_models_expected_logits(tmp_path: Path) -> None:
    if not PEER.exists():
        pytest.skip("needs the peers' checkpoints")
    expected = json.loads(PEER.with_suffix("").with_suffix(".expected.json").read_text())
    rwkv_rev.convert(PEER, tmp_path / "model")
    model = rwkv_rev.RwkvRevForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([expected["prompt_bytes"]])).logits[0, -1]
    assert (logits - torch.tensor(expected["logits_after_last_byte"])).abs().max() < 1e-4


def test_the_rwkv_package_reads_what_fla_holds(tmp_path: Path) -> None:
    """From one foreign layout to the other: low-rank maps lie transposed in one of them."""
    pytest.importorskip("rwkv")
    rwkv_rev.convert("bundled:rwkv-7", tmp_path / "model")
    rwkv_rev.export(tmp_path / "model", tmp_path / "fla", to="hf")
    config = json.loads((tmp_path / "fla/config.json").read_text())
    assert (config["model_type"], config["decay_low_rank_dim"], config["head_dim"]) == ("rwkv7", 32, 64)
    ids = torch.randint(256, (70,), generator=torch.Generator().manual_seed(0))
    found = []
    for source in ("bundled:rwkv-7", str(tmp_path / "fla")):
        with open_original(parse_source(source)) as original:
            found.append(torch.cat(list(rwkv_package(original, ids))))
    assert torch.equal(*found)
    rwkv_rev.convert(tmp_path / "fla", tmp_path / "again", verify=True)
