"""What the two sweeps computed when the file of numbers was written: the same bits on the same machine.

Elsewhere kernels round otherwise, and values are compared within float32's rounding. Write the numbers anew, after
a change that is meant to change them, with ``python tests/test_golden.py``; the commit says why.
"""

import hashlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, differentiate, english, load, tiny_model
from torch import Tensor

import rwkv_rev

GOLDEN = Path(__file__).parent / "golden" / "sweeps.json"
LENGTH = 1000
CHUNKS = (96, 256)
GRADIENTS = 1e-6
"""Relative, on the same machine: sums may be taken in another order."""
ELSEWHERE = 1e-4
SOURCES = {"4": "bundled:rwkv-4", "5.2": "bundled:rwkv-5.2", "6": "bundled:rwkv-6", "7": "bundled:rwkv-7"}


def machine() -> str:
    """What the bits of a float32 sum depend on."""
    wanted = ("model name", "cpu family", "model\t", "stepping")
    lines = (
        Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    processor = [" ".join(line.split()) for line in lines if line.startswith(wanted)] or [
        platform.processor()
    ]
    return ", ".join([f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability(), *processor])


def measure(version: str, chunk: int, folder: Path | None) -> dict[str, Any]:
    """One loss over real text with a hole, a padded start and a padded end, and a state before it."""
    if folder is None:
        sizes = {"hidden_size": 64, "vocab_size": 256, "intermediate_size": 96, "head_size": 16}
        model = tiny_model(version, **sizes)
    else:
        model = load(folder)
    ids = english(LENGTH + 64)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, :70] = mask[:, 600:733] = mask[:, -9:] = 0
    with torch.no_grad():
        state = model(ids[:, LENGTH:]).state
    found = differentiate(
        model, "reversible", chunk, input_ids=ids[:, :LENGTH], attention_mask=mask, state=state
    )
    return {
        "loss": float(found.loss).hex(),
        "state": [_bits(tensor) for tensor in found.state.tensors()],
        "tape_bytes": found.report["tape_bytes"],
        "gradients": {name: [_bits(g), *_projections(g)] for name, g in sorted(found.gradients.items())},
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_golden(version: str, chunk: int, bundled: dict[str, Path]) -> None:
    golden = json.loads(GOLDEN.read_text())
    expected = golden["cases"][f"{version}, C={chunk}"]
    found = measure(version, chunk, bundled.get(version))
    here = machine() == golden["machine"]
    if here:
        assert found["loss"] == expected["loss"] and found["state"] == expected["state"]
        assert found["tape_bytes"] == expected["tape_bytes"]
    assert float.fromhex(found["loss"]) == pytest.approx(float.fromhex(expected["loss"]), rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, (_, norm, *along) in found["gradients"].items():
        _, *values = expected["gradients"][name]
        bound = (GRADIENTS if here else ELSEWHERE) * values[0]
        for one, other in zip((norm, *along), values, strict=True):
            assert abs(one - other) <= bound, name


def _bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def _projections(gradient: Tensor) -> list[float]:
    """The norm, and products with three random vectors of norm 1."""
    flat = gradient.detach().double().flatten()
    generator = torch.Generator().manual_seed(len(flat))
    directions = torch.randn(3, len(flat), generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    return [float(f"{value:.9g}") for value in (flat.norm(), *(directions @ flat))]


def _lines(cases: dict[str, Any]) -> str:
    """JSON with one line for each gradient, so that a change can be read."""
    text = json.dumps({"machine": machine(), "cases": cases}, separators=(",", ":"))
    return text.replace('],"', '],\n"').replace('{"', '{\n"') + "\n"


def _write() -> None:
    torch.set_num_threads(1)
    cases = {}
    with tempfile.TemporaryDirectory() as root:
        for version in VERSIONS:
            folder = None
            if version in SOURCES:
                folder = Path(root, version)
                rwkv_rev.convert(SOURCES[version], folder)
            for chunk in CHUNKS:
                cases[f"{version}, C={chunk}"] = measure(version, chunk, folder)
    GOLDEN.write_text(_lines(cases))


if __name__ == "__main__":
    _write()
