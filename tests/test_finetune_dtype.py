"""Half precision: weights are trained in float32, the loss falls, and stays near that of a float32 run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from safetensors.torch import load_file

STEPS = 6
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
            **changes,
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
def test_bfloat16_on_the_cpu(bundled: dict[str, Path], tmp_path: Path, version: str, tune: str) -> None:
    compare(bundled[version], tmp_path, "cpu", "bfloat16", tune)


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
