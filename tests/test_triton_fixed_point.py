"""The CUDA kernels of the exact update against the PyTorch formulas, bit for bit.

On a machine without a GPU they run in Triton's interpreter, in a process of its own (the choice is made at import).
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rwkv_rev.reversal.decay_arithmetic import NON_FINITE, SMALLEST_EXPONENT, TARGET_BITS
from rwkv_rev.reversal.fixed_point import COARSE_BITS, FixedPoint, decay_plan

pytest.importorskip("triton")

SIZES = [(1, 2, 16), (2, 3, 8), (1, 1, 64), (1, 2, 24)]
SCALES = [1, 10, 100, 1000, 1e-6, 1e-6, 1]
"""Of what each chunk adds: grids rise; a head whose large numbers decay at once is left coarse by the small one."""


def compare(batch: int, heads: int, size: int, device: str) -> None:
    from rwkv_rev.reversal import triton_fixed_point as kernel

    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.exp(torch.linspace(-9, 2.5, heads * size)).view(heads, size).double()
    log_decay[0, 0], log_decay[0, 1] = 0.0, -1000.0
    plan = replace(decay_plan(log_decay.to(device), 32), kernels=False)
    layout = kernel.PlaneLayout.of(plan.widths(), size, torch.device(device))
    count = torch.randint(0, 33, (batch,), generator=generator).to(device)
    coarse = False
    state = FixedPoint.of(torch.randn(batch, heads, size, size, generator=generator).to(device))
    for chunk in range(len(SCALES)):
        update = torch.randn(batch, heads, size, size, generator=generator) * SCALES[chunk]
        update = update.to(device)
        decay = plan.decay_of(count if chunk % 2 else None)
        expected, remnant = state.advance(update, count if chunk % 2 else None, plan)
        options = {
            "target_bits": TARGET_BITS, "non_finite": NON_FINITE,
            "coarse_bits": COARSE_BITS, "smallest_exponent": SMALLEST_EXPONENT,
        }  # fmt: skip
        found = kernel.advance(state.mantissa, state.exponent, update, decay, layout, **options)
        assert torch.equal(found.mantissa, expected.mantissa)
        assert torch.equal(found.exponent, expected.exponent)
        assert torch.equal(found.raised, remnant.raised)
        assert torch.equal(found.coarse, expected.coarse())
        coarse |= bool(found.coarse.any())
        assert torch.equal(found.floats, expected.value())
        assert torch.equal(found.fingerprint, expected.fingerprint())
        assert found.packed.numel() == remnant.packed.numel()
        before = kernel.retreat(found.mantissa, found.exponent, update, decay, layout, found.packed)
        kept = ~remnant.raised
        assert torch.equal(before.mantissa[kept], state.mantissa[kept])
        assert torch.equal(before.floats[kept], state.value()[kept])
        assert torch.equal(before.fingerprint[kept], state.fingerprint()[kept])
        state = expected
    assert coarse or size != 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_equal_the_formulas_on_the_device(sizes: tuple[int, int, int]) -> None:
    compare(*sizes, "cuda")


def test_kernels_equal_the_formulas_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, check=True)


if __name__ == "__main__":
    for sizes in SIZES:
        compare(*sizes, "cpu")
