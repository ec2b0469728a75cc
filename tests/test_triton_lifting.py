"""The CUDA kernels of integer lifting against the PyTorch formulas, bit for bit in what they leave.

On a machine without a GPU they run in Triton's interpreter, in a process of its own (the choice is made at import).
"""

import os
import subprocess
import sys

import pytest
import torch

from rwkv_rev.reversal.bit_stack import pack
from rwkv_rev.reversal.lifting import LIFTED, KeptLifted, Lifted, LiftingPlan, Transition, exact_bits
from rwkv_rev.wkv import use_kernel, wkv7_transition

pytest.importorskip("triton")

SMALL = [(1, 2, 16, 1), (1, 1, 20, 1)]
LARGE = [(2, 3, 64, 1), (1, 2, 128, 2), (1, 2, 96, 1)]
CHUNKS = [("any", 16, 1.0), ("nothing", 3, 1.0), ("units", 16, 1.0), ("any", 300, 1.0), ("slow", 8, 1e6)]
"""Kind, tokens, and a factor of the values, of which one makes grids rise."""


def compare(batch: int, heads: int, size: int, seed: int, device: str) -> None:
    """In the interpreter the same bits; on a device the pivots may differ in the last one, and states come back."""
    from test_lifting import tokens

    from rwkv_rev.reversal import triton_lifting as kernel

    generator = torch.Generator().manual_seed(seed)
    state = Lifted.of(torch.randn(batch, heads, size, size, generator=generator).to(device))
    kinds = set()
    for kind, length, scale in CHUNKS:
        given = [x.to(device) for x in tokens(kind, size, length, generator, batch, heads)]
        with use_kernel("chunked"):
            matrix, update = (x.float() for x in wkv7_transition(*given))
            transition = Transition(matrix.double(), scale * update.double())
            expected, remnant = state.advance(transition, LiftingPlan())
        bits = exact_bits(matrix)
        found = kernel.advance(state.grid.mantissa, state.grid.exponent, *transition, bits)
        assert torch.equal(found.exponent, expected.grid.exponent)
        if device == "cpu":
            assert torch.equal(found.mantissa, expected.grid.mantissa)
            assert torch.equal(found.widths, remnant.widths)
            assert torch.equal(found.values.double(), remnant.values)
            assert torch.equal(found.code, remnant.code)
        else:
            largest = expected.grid.mantissa.double().abs().max()
            far = (found.mantissa.double() - expected.grid.mantissa.double()).abs().max()
            assert float(far) <= 64 + 2.0**-20 * float(largest)
            assert int(found.widths.sum()) <= 1.01 * int(remnant.size) + 64
        words = pack(found.values.flatten(), found.widths.flatten(), int(found.widths.sum()), wide=False)
        kept = KeptLifted(words, found.code.to(torch.uint8), state.grid.exponent)
        before = kernel.retreat(found.mantissa, found.exponent, *transition, *kept, bits)
        assert torch.equal(before, state.grid.mantissa)
        kinds |= set((found.code >= LIFTED).flatten().tolist())
        wrong = found.mantissa.clone()
        wrong[0, 0, size - 1, 2] += 1
        other = kernel.retreat(wrong, found.exponent, *transition, *kept, bits)
        assert not torch.equal(other[0, 0], before[0, 0])
        state = expected
    assert kinds == {True, False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_kernels_equal_the_formulas_on_the_device(sizes: tuple[int, int, int, int]) -> None:
    compare(*sizes, "cuda")


def test_kernels_equal_the_formulas_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, check=True)


if __name__ == "__main__":
    for one in SMALL:
        compare(*one, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_transition_on_the_device() -> None:
    """In float64 for float32; under autocast, where what reads has few bits, by the kernel."""
    from test_lifting import tokens

    given = [x.float().cuda() for x in tokens("any", 64, 100, torch.Generator().manual_seed(0), 2, 3)]
    found, exact = wkv7_transition(*given), wkv7_transition(*(x.double() for x in given), kernel="naive")
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    found = wkv7_transition(given[0].bfloat16(), *given[1:])
    assert {x.dtype for x in found} == {torch.float32}
