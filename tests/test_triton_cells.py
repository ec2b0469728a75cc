"""The CUDA kernels of token shift and gates against the PyTorch formulas in float64, values and every gradient.

On a machine without a GPU they run in Triton's interpreter, in a process of its own (the choice is made at import):
``TRITON_INTERPRET=1 python tests/test_triton_cells.py``.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_rev.cells import gates, token_shift

pytest.importorskip("triton")

# relative error (Frobenius norm) that rounding inputs' gradients and results to the dtype allows
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SMALL = [(1, 1, 1, 8), (2, 19, 2, 8), (1, 70, 3, 20)]
LARGE = [(1, 1, 2, 64), (3, 517, 4, 64), (2, 64, 3, 128), (1, 1000, 12, 64), (2, 129, 5, 40)]
DTYPES = list(TOLERANCES)


def differentiate(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Values and gradients by all inputs, for fixed output gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, pulls)]


def compare(
    fast: Callable[..., tuple[Tensor, ...]],
    formula: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    dtype: torch.dtype,
) -> None:
    found = differentiate(fast, inputs)
    again = differentiate(fast, inputs)
    expected = differentiate(formula, [tensor.double() for tensor in inputs])
    for number, (value, repeated, truth) in enumerate(zip(found, again, expected, strict=True)):
        assert torch.equal(value, repeated), number
        error = (value.double() - truth).norm() / truth.norm().clamp(min=1e-30)
        assert error <= TOLERANCES[dtype], (number, float(error))


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def check_mixes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    from rwkv_rev.cells import triton_token_shift

    batch, length, heads, size = shape
    width = heads * size
    for count in (1, 2, 3, 4, 6):
        x, shift, *mus = drawn(
            (batch, length, width), (batch, width), *[(width,)] * count, dtype=dtype, device=device
        )
        mus[0][:3] = torch.tensor([0.0, 1.0, -1.0])

        def formula(x: Tensor, shift: Tensor, *mus: Tensor) -> tuple[Tensor, ...]:
            shifted = token_shift.token_shift(x, shift, None)
            return tuple(token_shift.mix(x, shifted, mu) for mu in mus)

        def fast(x: Tensor, shift: Tensor, *mus: Tensor) -> tuple[Tensor, ...]:
            return triton_token_shift.token_mixes(x, shift, list(mus))

        def fast_with_last(x: Tensor, shift: Tensor, *mus: Tensor) -> tuple[Tensor, ...]:
            mixes, last = triton_token_shift.mixes_and_last(x, shift, list(mus))
            return *mixes, last

        compare(fast, formula, [x, shift, *mus], dtype)
        compare(
            fast_with_last,
            lambda x, shift, *mus: (*formula(x, shift, *mus), token_shift.last_token(x, shift, None)),
            [x, shift, *mus],
            dtype,
        )
        mixed, shifted = fast(x, shift, *mus)[0], token_shift.token_shift(x, shift, None)
        assert torch.equal(mixed[..., 0], shifted[..., 0])
        assert torch.equal(mixed[..., 1], x[..., 1])


def check_documents(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Mixes in packed rows, the first token of which may begin a document, too."""
    from rwkv_rev.cells import triton_token_shift

    batch, length, heads, size = shape
    width = heads * size
    at = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < 0.2
    at[0, 0], at[-1, -1] = True, True
    for count in (1, 4, 6):
        x, shift, start, *mus = drawn(
            (batch, length, width), (batch, width), (width,), *[(width,)] * count, dtype=dtype, device=device
        )
        begun = (at.to(device, torch.uint8), start)

        def formula(x: Tensor, shift: Tensor, *mus: Tensor) -> tuple[Tensor, ...]:
            first = at.to(device)[..., None]
            shifted = torch.where(first, start.to(x), token_shift.token_shift(x, shift, None))  # noqa: B023
            return *(token_shift.mix(x, shifted, mu) for mu in mus), token_shift.last_token(x, shift, None)

        def fast(x: Tensor, shift: Tensor, *mus: Tensor) -> tuple[Tensor, ...]:
            mixes, last = triton_token_shift.mixes_and_last(x, shift, list(mus), begun)  # noqa: B023
            again = triton_token_shift.token_mixes(x, shift, list(mus), begun)  # noqa: B023
            assert all(map(torch.equal, mixes, again))
            return *mixes, last

        compare(fast, formula, [x, shift, *mus], dtype)


def check_borders(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """The carried y, with a mu per channel and per row and channel, and its inverse."""
    from rwkv_rev.cells import triton_token_shift

    batch, _, heads, size = shape
    before, first = drawn((batch, heads * size), (batch, heads * size), dtype=dtype, device=device)
    mu = torch.linspace(0, 15 / 16, heads * size, dtype=torch.float64, device=device)
    for factor in (mu, mu.expand(batch, -1) * (torch.arange(batch, device=device) % 2)[:, None]):
        y = triton_token_shift.carry(before, first, factor)
        exact = torch.lerp(before.double(), first.double(), factor)
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
        back = triton_token_shift.uncarry(y, first, factor)
        exact = (y.double() - factor * first.double()) / (1 - factor)
        assert (back.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
        whole = (factor == 0).expand_as(y)
        assert torch.equal(y[whole], before[whole])
        assert torch.equal(back[whole], before[whole])
        assert torch.equal(triton_token_shift.uncarry(y, first, factor), back)


def check_decay(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """A decayed state and what is added to it, and taking the gradient of the decay out again."""
    from rwkv_rev.wkv import decayed, triton_decay

    batch, length, heads, size = shape
    state, added = drawn(*[(batch, heads, size, size)] * 2, dtype=torch.float32, device=device)
    log_decay = -torch.logspace(-4, 0, heads * size, device=device).view(heads, size)
    counts = torch.arange(batch, device=device) * 7 % (length + 1)
    for count in (None, counts):
        compare(
            lambda *given, count=count: (triton_decay.decayed(*given, length, count),),
            lambda *given, count=count: (decayed(*given, length, count),),
            [state, added, log_decay],
            torch.float32,
        )
        partial = torch.zeros(batch, 3, heads, size, device=device)
        triton_decay.take_out(state, added, log_decay, count, length, partial)
        leaf = log_decay.clone().requires_grad_()
        (expected,) = torch.autograd.grad(
            triton_decay.decayed(state, added, leaf, length, count), leaf, added
        )
        assert torch.equal(partial[:, 1:], torch.zeros_like(partial[:, 1:]))
        torch.testing.assert_close(-partial[:, 0].sum(0), expected)
    nothing = torch.full_like(log_decay, -torch.inf)
    assert torch.equal(triton_decay.decayed(state, added, nothing, length, None), added)


def check_gates(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    from rwkv_rev.cells import triton_gates

    width = shape[2] * shape[3]
    x, gate, weight, bias = drawn(
        (*shape[:2], width), (*shape[:2], width), (width,), (width,), dtype=dtype, device=device
    )
    (y,) = drawn(shape, dtype=torch.float32, device=device)
    eps = 64e-5

    def norm(y: Tensor, weight: Tensor, bias: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
        return (triton_gates.gated_group_norm(y, weight, bias, eps, *(gate or (None,)), dtype),)

    def norm_formula(y: Tensor, weight: Tensor, bias: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
        return (gates.gated_group_norm(y, weight, bias, eps, *(gate or (None,)), torch.float64),)

    compare(norm, norm_formula, [3 * y + 1, weight, bias, gate], dtype)
    compare(norm, norm_formula, [3 * y + 1, weight, bias], dtype)
    compare(lambda x: (triton_gates.squared_relu(x),), lambda x: (gates.squared_relu(x),), [x], dtype)
    compare(
        lambda gate, x: (triton_gates.sigmoid_product(gate, x),),
        lambda gate, x: (gates.sigmoid_product(gate, x),),
        [gate, x],
        dtype,
    )
    x = x.clone()
    x[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])  # a diverged run has to show
    for found, expected in zip(
        differentiate(lambda x: (triton_gates.squared_relu(x),), [x]),
        differentiate(lambda x: (gates.squared_relu(x),), [x.double()]),
        strict=True,
    ):
        assert torch.equal(found[0, 0, :3].isnan(), expected[0, 0, :3].isnan())
        assert torch.equal(found[0, 0, :3].isinf(), expected[0, 0, :3].isinf())
    wide = y.flatten(2)
    assert triton_gates.sigmoid_product(gate, wide).dtype == dtype
    compare(
        lambda gate, x: (triton_gates.sigmoid_product(gate, x),),
        lambda gate, x: (gates.sigmoid_product(gate, x),),
        [gate, wide],
        dtype,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("check", [check_mixes, check_documents, check_borders, check_decay, check_gates])
def test_kernels_on_the_device(
    check: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(shape, dtype, "cuda")


def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["compared"] * len(SMALL) * len(DTYPES)


if __name__ == "__main__":
    for shape in SMALL:
        for dtype in DTYPES:
            for check in (check_mixes, check_documents, check_borders, check_decay, check_gates):
                check(shape, dtype, "cpu")
            print("compared")
