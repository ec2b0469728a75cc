"""Half precision: weights are trained in float32, the loss falls, and stays near that of a float32 run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from safetensors.torch import load_file, save_file

STEPS = 5
NEAR = {"bfloat16": 0.02, "float16": 0.005}
"""Largest distance of a loss from the float32 run's, relative: a few units of the format's rounding."""
RATES = {"full": 1e-3, "lora": 3e-3, "state": 1.0}


def compare(
    model: Path, folder: Path, device: str, dtype: str, tune: str, *, near: bool = True, **changes: Any
) -> None:
    """Train in ``dtype`` and in float32 on the same data; the former falls and stays near the latter."""
    data = counting_text(folder / "data.txt")
    found = {}
    for name in ("float32", dtype):
        config = settings(
            model,
            data,
            folder / name,
            device=device,
            dtype=name,
            tune=tune,
            lr=RATES[tune],
            max_steps=STEPS,
            **{"context_length": 160, "chunk_length": 48} | changes,
        )
        finetune(config)
        found[name] = losses(folder / name)
    assert found[dtype][-1] < 0.95 * found[dtype][0]
    assert found[dtype] != found["float32"], "the arithmetic was not that of the dtype"
    assert not near or found[dtype] == pytest.approx(found["float32"], rel=NEAR[dtype])
    settings_ = json.loads((folder / dtype / "training" / "summary.json").read_text())["plan"]["settings"]
    assert settings_["dtype"] == dtype
    trained = load_file(folder / dtype / "model.safetensors")
    before = load_file(model / "model.safetensors")
    changed = [
        n for n, t in trained.items() if n not in before or not torch.equal(t.float(), before[n].float())
    ]
    assert changed and all(trained[name].dtype == torch.float32 for name in changed)


@pytest.mark.parametrize(
    ("version", "tune"), [("5.2", "full"), ("5.2", "lora"), ("5.2", "state"), ("4", "full")]
)
def test_bfloat16_on_the_cpu(shallow: dict[str, Path], tmp_path: Path, version: str, tune: str) -> None:
    compare(shallow[version], tmp_path, "cpu", "bfloat16", tune)


@pytest.mark.parametrize("tune", ["lora", "state"])
def test_frozen_weights_keep_their_bits(shallow: dict[str, Path], tmp_path: Path, tune: str) -> None:
    """A source in float32, its frozen weights rounded to bfloat16 for training alone."""
    source = tmp_path / "source"
    shutil.copytree(shallow["5.2"], source)
    generator = torch.Generator().manual_seed(0)
    before = {
        name: tensor.float() * (1 + 1e-3 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(before, source / "model.safetensors", {"format": "pt"})
    data = counting_text(tmp_path / "data.txt")
    changes = {"lora_rank": 4, "lora_targets": ["time_mix.key"]} if tune == "lora" else {}
    out = tmp_path / "out"
    finetune(settings(source, data, out, tune=tune, lr=RATES[tune], dtype="bfloat16", **changes))
    after = load_file(out / "model.safetensors")
    maps = {name for name in before if name.endswith("time_mix.key.weight")} if tune == "lora" else set()
    for name in before.keys() - maps:
        assert torch.equal(after[name], before[name]), name
    for name in maps:
        adapter = load_file(out / "adapter" / "adapter_model.safetensors")
        stem = name.removesuffix(".weight")
        a, b = (next(t for n, t in adapter.items() if f"{stem}.lora_{x}" in n) for x in "AB")
        torch.testing.assert_close(after[name], before[name] + 2.0 * b @ a, rtol=0, atol=1e-6)
        assert not torch.equal(after[name], before[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("tune", RATES)
@pytest.mark.parametrize("bptt", ["reversible", "full"])
def test_half_precision_on_a_gpu(
    bundled: dict[str, Path], tmp_path: Path, dtype: str, tune: str, bptt: str
) -> None:
    """float16 under the trainer's loss scale; with ``full`` it may skip a first step, so losses come later."""
    near = dtype == "bfloat16" or bptt == "reversible"
    compare(bundled["5.2"], tmp_path, "cuda", dtype, tune, bptt=bptt, near=near)
