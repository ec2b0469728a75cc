"""The Triton kernel of RWKV-7 against the naive float64 recurrence, forward and every gradient.

On a CUDA device (marker gpu) at real sizes; elsewhere through Triton's interpreter, in a process of its own because it
is chosen when kernels are imported: ``TRITON_INTERPRET=1 python tests/test_triton_wkv7.py``. The interpreter has no
bfloat16 products: there they are float32 products of factors that were rounded as on the device.
"""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rwkv_rev.wkv import KernelError, naive

NO_TRITON = importlib.util.find_spec("triton") is None
NAMES = ("out", "state", "d_r", "d_k", "d_v", "d_log_decay", "d_removal", "d_rate", "d_state")
# relative RMS error of (results and float32 gradients, gradients that are rounded to the input's dtype)
TOLERANCES = {torch.float32: (3e-6, 3e-6), torch.float16: (5e-5, 1e-3), torch.bfloat16: (8e-3, 8e-3)}


class Case(NamedTuple):
    shape: tuple[int, ...]  # (B, T, H, N)
    edge: str = "drawn"
    dtype: torch.dtype = torch.float32
    masked: bool = False
    narrow: bool = False  # log_decay, removal and rate in ``dtype``, too, rather than in float32
    autocast: bool = False  # the key and the value in float32
    at_most: tuple[tuple[str, float], ...] = ()  # gradients of which a factor is in parts, and their errors

    def __str__(self) -> str:
        flags = "-masked" * self.masked + "-narrow" * self.narrow + "-autocast" * self.autocast
        return f"{'x'.join(map(str, self.shape))}-{self.edge}-{str(self.dtype)[6:]}{flags}"


PROJECTED = (("d_rate", 4.8e-3), ("d_r", 4.4e-3), ("d_v", 4.6e-3))
DRAWN = (("d_k", 3.0e-3), ("d_v", 3.0e-3), ("d_state", 2.4e-3))
SMALL = [
    Case((1, 37, 2, 16)),
    Case((1, 70, 1, 20), "repeated", masked=True),
    Case((1, 65, 1, 64), "projections", torch.bfloat16, at_most=PROJECTED),
    Case((1, 128, 1, 64), "run", torch.bfloat16, at_most=(("out", 3e-3), ("state", 3e-3), ("d_v", 5e-3))),
    Case((1, 130, 1, 16), "strongest", torch.bfloat16, masked=True, narrow=True),
    Case((1, 20, 1, 72), "drawn", torch.float16, masked=True),
    Case((1, 70, 1, 16), "drawn", torch.bfloat16, autocast=True, at_most=DRAWN),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# few combinations of head size, dtypes and mask: the first call of each compiles for 10 to 40 seconds
LARGE = [
    *(Case((1, tokens, 3, 64), dtype=BF16) for tokens in (1, 2, 63, 64, 65, 2048)),
    *(Case((2, 400, 2, 64), edge, BF16) for edge in ("projections", "repeated", "run", "kept", "strongest")),
    *(Case((2, 517, 2, 64), edge, BF16, masked=True) for edge in ("drawn", "repeated", "strongest")),
    Case((2, 517, 2, 64), dtype=BF16, autocast=True),
    Case((2, 200, 2, 20), dtype=BF16, masked=True),
    Case((2, 200, 2, 96), dtype=BF16, masked=True),
    Case((2, 517, 2, 128), dtype=BF16, narrow=True),
    *(Case((2, 400, 2, 64), edge, FP16) for edge in ("drawn", "projections", "repeated", "strongest")),
    *(
        Case((2, 400, 2, 64), edge, FP32, masked=True)
        for edge in ("drawn", "projections", "repeated", "kept", "strongest")
    ),
]


def inputs(case: Case, device: str) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Arguments, mask, and the gradients arriving at the two results, all random and none of them zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, tokens, heads, size = case.shape
    r, k, v, x, y, z = (random(*case.shape) for _ in range(6))
    removal = torch.nn.functional.normalize(x, dim=-1)
    rate, log_decay = torch.sigmoid(y), -math.exp(-0.5) * torch.sigmoid(z)
    if case.edge == "projections":
        rate, log_decay = torch.ones_like(rate), torch.zeros_like(log_decay)
    elif case.edge == "repeated":
        removal, rate = removal[:, :1].expand(case.shape).clone(), torch.ones_like(rate)
    elif (
        case.edge == "run"
    ):  # of one token after others, as in a line of spaces: what it adds it removes again
        log_decay, k = -math.exp(-0.5) * torch.sigmoid(z - 3), x / 4
        run = torch.arange(tokens).clamp(max=40)
        r, k, v, log_decay, removal, rate = (x[:, run] for x in (r, k, v, log_decay, removal, rate))
    elif case.edge == "kept":
        rate, log_decay = torch.zeros_like(rate), torch.zeros_like(log_decay)
    elif case.edge == "strongest":
        log_decay = torch.full_like(log_decay, -math.exp(-0.5))
    gates = [x.to(case.dtype) if case.narrow else x for x in (log_decay, removal, rate)]
    state = random(batch, heads, size, size)
    mask = (torch.rand(batch, tokens, generator=generator) > 0.3).to(device) if case.masked else None
    key, value = (x if case.autocast else x.to(case.dtype) for x in (k, v))
    arguments = [r.to(case.dtype), key, value, *gates, state]
    arriving = [random(*case.shape), random(*state.shape)]
    return [x.to(device) for x in arguments], mask, [x.to(device) for x in arriving]


def run(function: Any, arguments: list[Tensor], mask: Tensor | None, arriving: list[Tensor]) -> list[Tensor]:
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    results = function(*arguments, mask)
    gradients = torch.autograd.grad(results, arguments, [x.to(results[0].dtype) for x in arriving])
    return [x.detach() for x in (*results, *gradients)]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error (absolute per element where only zeros are expected)."""
    error = (actual.double() - expected.double()).norm() / (expected.double().norm() or expected.numel())
    return error.item()


def compare(case: Case, device: str) -> dict[str, float]:
    """Asserts what must hold for one case and returns the errors."""
    from rwkv_rev.wkv.triton_wkv7 import wkv7

    arguments, mask, arriving = inputs(case, device)
    actual = run(wkv7, arguments, mask, arriving)
    expected = run(naive.wkv7, [x.double() for x in arguments], mask, arriving)
    with torch.no_grad():
        again = wkv7(*arguments, mask)
    assert all(torch.equal(x, y) for x, y in zip(again, actual[:2], strict=True)), "no_grad changes the bits"
    repeated = run(wkv7, arguments, mask, arriving)
    assert all(map(torch.equal, actual, repeated)), "a second call changes the bits"
    if mask is not None:
        masked = [x for name, x in zip(NAMES, actual, strict=True) if "state" not in name]
        assert not any(x[~mask].any() for x in masked), "a masked token has an output or a gradient"
        garbage = [
            x.masked_fill(~mask[..., None, None], math.nan) if n < 6 else x for n, x in enumerate(arguments)
        ]
        assert all(map(torch.equal, run(wkv7, garbage, mask, arriving), actual)), "a masked token is read"
    assert all(x.isfinite().all() for x in actual), "not finite"
    errors = {name: relative(x, y) for name, x, y in zip(NAMES, actual, expected, strict=True)}
    exact, rounded = TOLERANCES[case.dtype]
    for name, x, error in zip(NAMES, actual, errors.values(), strict=True):
        limit = exact if x.dtype == torch.float32 else rounded
        assert error <= limit, (name, error, limit)
    for name, most in case.at_most:
        assert errors[name] <= most, (name, errors[name], most)
    return errors


@pytest.mark.skipif(NO_TRITON, reason="triton is not installed")
def test_interpreted_kernel_matches_naive() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(NO_TRITON or not torch.cuda.is_available(), reason="no CUDA device")
class TestOnDevice:
    @pytest.mark.parametrize("case", LARGE, ids=str)
    def test_matches_naive(self, case: Case, poisoned_memory: None) -> None:
        compare(case, "cuda")

    def test_bits_do_not_depend_on_what_follows(self) -> None:
        """A sequence and its first tokens agree, and so do an all-true mask and none."""
        from rwkv_rev.wkv.triton_wkv7 import wkv7

        arguments, _, arriving = inputs(Case((2, 300, 2, 64), dtype=torch.bfloat16), "cuda")
        whole = run(wkv7, arguments, None, arriving)
        mask = torch.ones(2, 300, dtype=torch.bool, device="cuda")
        assert all(map(torch.equal, run(wkv7, arguments, mask, arriving), whole))
        short = [x[:, :100].contiguous() for x in arguments[:6]]
        assert torch.equal(wkv7(*short, arguments[6])[0], whole[0][:, :100])

    def test_masked_tokens_change_no_bit_of_the_state(self) -> None:
        from rwkv_rev.wkv.triton_wkv7 import wkv7

        arguments, _, _ = inputs(Case((1, 1000, 2, 64), dtype=torch.bfloat16), "cuda")
        mask = torch.zeros(1, 1000, dtype=torch.bool, device="cuda")
        assert torch.equal(wkv7(*arguments, mask)[1], arguments[6])

    def test_refuses_what_it_cannot_do(self) -> None:
        from rwkv_rev.wkv.triton_wkv7 import wkv7

        for shape, dtype, message in (
            ((1, 3, 1, 16), torch.float64, "float64"),
            ((1, 3, 1, 129), FP32, "head sizes"),
        ):
            arguments, _, _ = inputs(Case(shape), "cuda")
            with pytest.raises(KernelError, match=message):
                wkv7(*(x.to(dtype) for x in arguments))


def interpret() -> None:
    """Every small case through the interpreter, in this process."""
    global tl, rounded  # where the interpreter looks for them
    import triton
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    from rwkv_rev.wkv import triton_wkv7, triton_wkv7_gradients, triton_wkv7_parts

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        # Triton turns one-element arrays into loop bounds by int(), which NumPy 2.4 refuses; from 3.6 on it has a scope
        original(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    @triton.jit
    def rounded(x):  # type: ignore[no-untyped-def]
        # to bfloat16, to the nearest (the interpreter's conversion cuts off)
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def dot(a, b, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
        a = rounded(a) if PRECISION == "rounded" else a.to(tl.float32)
        b = rounded(b) if PRECISION == "rounded" else b.to(tl.float32)
        return tl.dot(a, b, total, input_precision="ieee")

    @triton.jit
    def factor(x, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
        return rounded(x) if PRECISION == "rounded" else x

    interpreter._patch_lang_tensor = patched
    for module in (triton_wkv7, triton_wkv7_gradients, triton_wkv7_parts):
        for name, instead in (("_dot", dot), ("_factor", factor)):
            if hasattr(module, name):
                setattr(module, name, instead)
    triton_wkv7.PRECISIONS = dict.fromkeys(triton_wkv7.PRECISIONS, ("ieee", "ieee"))
    triton_wkv7.PRECISIONS[torch.bfloat16] = ("ieee", "rounded")
    torch.set_num_threads(1)
    for case in SMALL:
        print(case, {name: f"{error:.1e}" for name, error in compare(case, "cpu").items()}, flush=True)


if __name__ == "__main__":
    interpret()
