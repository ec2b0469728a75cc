"""The Triton kernels against the naive float64 recurrences, forward and every gradient.

On a CUDA device (marker gpu) at real sizes; elsewhere through Triton's interpreter, in a process of its own
because it is chosen when kernels are imported: ``TRITON_INTERPRET=1 python tests/test_wkv_triton.py wkv5``.
RWKV-6 has a decay of its own for every token, drawn from the same ranges.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rwkv_rev.bundled import __file__ as BUNDLED
from rwkv_rev.wkv import EMPTY_EXPONENT, KernelError, choose_kernel, naive, wkv6
from rwkv_rev.wkv.dispatch import TRITON
from rwkv_rev.wkv.handover import Handover

NO_TRITON = importlib.util.find_spec("triton") is None
WEAK, TRAINED, STRONG, ALL = (-7.0, -4.0), (-6.0, 0.0), (2.0, 4.0), (-7.0, 3.03)  # of time_decay
NONE_TO_ZERO = (-20.0, 9.0)  # log w from -2e-9 to -8,103, and -inf


class Case(NamedTuple):
    shape: tuple[int, ...]  # (B, T, H, N) or (B, T, D)
    decay: tuple[float, float] = TRAINED
    dtype: torch.dtype = torch.float32
    masked: bool = False
    key_scale: float = 1.0
    empty: bool = False

    def __str__(self) -> str:
        flags = "-masked" * self.masked + "-empty" * self.empty
        return f"{'x'.join(map(str, self.shape))}-{str(self.dtype)[6:]}-decay{self.decay}{flags}"


# relative RMS error of (float32 results, gradients that are rounded to the input's dtype)
TOLERANCES = {torch.float32: (3e-6, 3e-6), torch.float16: (2e-5, 1e-3), torch.bfloat16: (2e-5, 5e-3)}

SMALL = {
    "wkv5": [
        Case((1, 70, 1, 16)),
        Case((2, 130, 2, 8), masked=True),
        Case((1, 70, 1, 20), decay=ALL),
        Case((1, 65, 1, 16), decay=STRONG, dtype=torch.bfloat16),
        Case((1, 66, 1, 128), decay=WEAK, masked=True),
    ],
    "wkv6": [
        Case((1, 70, 1, 16)),
        Case((2, 130, 2, 8), masked=True),
        Case((1, 70, 1, 20), decay=ALL),
        Case((2, 65, 2, 16), decay=NONE_TO_ZERO, masked=True),
        Case((1, 65, 1, 16), decay=STRONG, dtype=torch.bfloat16),
        Case((1, 66, 1, 128), decay=WEAK, masked=True),
    ],
    "wkv4": [
        Case((1, 40, 10)),
        Case((2, 50, 10), masked=True),
        Case((2, 50, 300), decay=ALL, masked=True, key_scale=5.0),
        Case((1, 17, 10), decay=STRONG, empty=True, dtype=torch.bfloat16),
    ],
}
LARGE = {
    "wkv5": [
        *(
            Case((2, 517, 2, n), masked=masked, dtype=dtype)
            for n in (8, 16, 20, 32, 40, 64, 96, 128)
            for dtype, masked in (
                (torch.float32, n % 16 == 8),
                (torch.bfloat16, False),
                (torch.bfloat16, True),
            )
        ),
        *(Case((1, t, 3, 64)) for t in (1, 2, 63, 64, 65, 1024)),
        *(Case((2, 400, 4, 64), decay=decay) for decay in (WEAK, STRONG, ALL)),
        *(Case((2, 400, 4, n), dtype=torch.float16) for n in (32, 64)),
        Case((2, 400, 4, 64), dtype=torch.float32, masked=True),
    ],
    "wkv6": [
        *(
            Case((2, 517, 2, n), masked=masked, dtype=dtype)
            for n in (8, 16, 20, 32, 40, 64, 96, 128)
            for dtype, masked in (
                (torch.float32, n % 16 == 8),
                (torch.bfloat16, False),
                (torch.bfloat16, True),
            )
        ),
        *(Case((1, t, 3, 64)) for t in (1, 2, 63, 64, 65, 1024)),
        *(
            Case((2, 400, 4, 64), decay=decay, dtype=dtype)
            for decay in (WEAK, STRONG, ALL, NONE_TO_ZERO)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        *(Case((2, 400, 4, n), dtype=torch.float16) for n in (32, 64)),
        Case((2, 400, 4, 64), dtype=torch.float32, masked=True),
    ],
    "wkv4": [
        *(Case((2, t, 130), masked=t == 400) for t in (1, 127, 128, 129, 400)),
        *(Case((2, 700, 512), decay=decay, key_scale=8.0) for decay in (WEAK, STRONG, ALL)),
        Case((2, 300, 512), empty=True, key_scale=20.0),
        *(Case((2, 400, 96), dtype=dtype, masked=True) for dtype in (torch.float16, torch.bfloat16)),
    ],
}


def inputs(function: str, case: Case, device: str) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Arguments, mask, and the gradients arriving at the two results, all random and none of them zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, tokens, *width = case.shape
    decays = case.shape if function == "wkv6" else width
    time_decay = torch.empty(*decays).uniform_(*case.decay, generator=generator)
    log_decay, bonus = -torch.exp(time_decay), random(*width)
    k, v = case.key_scale * random(*case.shape), random(*case.shape)
    mask = torch.rand(batch, tokens, generator=generator) > 0.3 if case.masked else None
    if function != "wkv4":
        state = random(batch, *width, width[-1])
        arguments = [
            random(*case.shape).to(case.dtype),
            k.to(case.dtype),
            v.to(case.dtype),
            log_decay,
            bonus,
            state,
        ]
        arriving = [random(*case.shape), random(*state.shape)]
        if function == "wkv6":
            log_decay.view(-1)[::7] = -torch.inf if case.decay == NONE_TO_ZERO else 0.0
            arriving.append(random(*state.shape[:3]).double())
    else:
        state = torch.stack(
            [random(batch, *width), random(batch, *width).abs() + 0.1, random(batch, *width)], 1
        )
        if case.empty:
            state[:, :2], state[:, 2] = 0.0, EMPTY_EXPONENT
        arguments = [k.to(case.dtype), v.to(case.dtype), log_decay, bonus, state]
        arriving = [random(*case.shape), random(*state.shape)]
        arriving[1][:, 2] = 0.0  # m is a gauge
    if mask is not None:
        mask = mask.to(device)
    return [x.to(device) for x in arguments], mask, [x.to(device) for x in arriving]


def run(
    function: Callable[..., Any], arguments: list[Tensor], mask: Tensor | None, arriving: list[Tensor]
) -> list[Tensor]:
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    results = function(*arguments, mask)
    arriving = [x.to(result.dtype) for x, result in zip(arriving, results, strict=True)]
    gradients = torch.autograd.grad(results, arguments, arriving)
    return [x.detach() for x in (*results, *gradients)]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error (absolute per element where only zeros are expected); NaN where the actual values hold one."""
    error = (actual.double() - expected.double()).norm() / (expected.double().norm() or expected.numel())
    return error.item()


def compare(function: str, case: Case, device: str) -> dict[str, float]:
    """Asserts what must hold for one case and returns the errors."""
    module = importlib.import_module(f"rwkv_rev.wkv.triton_{function}")
    arguments, mask, arriving = inputs(function, case, device)
    actual = run(getattr(module, function), arguments, mask, arriving)
    expected = run(getattr(naive, function), [x.double() for x in arguments], mask, arriving)

    with torch.no_grad():
        again = getattr(module, function)(*arguments, mask)
    assert all(torch.equal(x, y) for x, y in zip(again, actual, strict=False)), "no_grad changes the bits"
    repeated = run(getattr(module, function), arguments, mask, arriving)
    assert all(torch.equal(x, y) for x, y in zip(actual, repeated, strict=True)), (
        "a second call changes the bits"
    )
    if function == "wkv5":
        names = ["out", "contribution", "d_r", "d_k", "d_v", "d_log_decay", "d_bonus", "d_state"]
        alone = module.wkv5_contribution(arguments[1], arguments[2], arguments[3], mask)
        assert torch.equal(alone, actual[1]), "wkv5_contribution has other bits"
        handed = handed_over(arguments, mask, arriving)
        assert all(torch.equal(x, y) for x, y in zip(handed, actual, strict=True)), (
            "handing over changes bits"
        )
    elif function == "wkv6":
        names = ["out", "contribution", "factor", "d_r", "d_k", "d_v", "d_log_decay", "d_bonus", "d_state"]
        with torch.no_grad():
            alone = module.wkv6_contribution(*arguments[1:4], mask)
        assert all(torch.equal(x, y) for x, y in zip(alone, actual[1:3], strict=True)), (
            "wkv6_contribution has other bits"
        )
        for results in (actual, expected):
            results[2] = torch.exp(results[2])
    else:
        names = ["out", "state", "d_k", "d_v", "d_log_decay", "d_bonus", "d_state"]
        for results in (actual, expected):  # compare A e^-m and B e^-m in one gauge
            results[1], exponent = results[1][:, :2].double(), results[1][:, 2:].double()
            results[1] = results[1] * torch.exp(exponent - actual_exponent(arguments, mask, naive.wkv4))
        assert not actual[-1][:, 2].any(), "the gauge m got a gradient"
    if mask is not None:
        assert not actual[0][~mask].any(), "a masked token has an output"
    assert all(x.isfinite().all() for x in actual), "not finite"
    errors = {name: relative(x, y) for name, x, y in zip(names, actual, expected, strict=True)}
    exact, rounded = TOLERANCES[case.dtype]
    for name, error in errors.items():
        limit = (rounded if name in ("d_r", "d_k", "d_v") else exact) * (1 + case.key_scale / 2)
        assert error <= limit, (name, error, limit)
    return errors


def handed_over(arguments: list[Tensor], mask: Tensor | None, arriving: list[Tensor]) -> list[Tensor]:
    """What :func:`run` gives of wkv5, where the contribution and the pull are asked for before."""
    module, left = importlib.import_module("rwkv_rev.wkv.triton_wkv5"), Handover()
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    r, k, v, log_decay, *_ = arguments
    with torch.no_grad():
        module.wkv5_contribution(k, v, log_decay, mask, left)
    results = module.wkv5(*arguments, mask, left)
    assert left.take() is None, "what was written is not taken"
    wanted = [x.to(result.dtype) for x, result in zip(arriving, results, strict=True)]
    with torch.no_grad():
        pulled = module.wkv5_pull(r, wanted[0], log_decay, mask, left)
    gradients = torch.autograd.grad(results, arguments, wanted)
    assert left.take_pulled(wanted[0]) is None, "what was pulled is not taken"
    assert torch.equal(pulled, gradients[-1]), "wkv5_pull has other bits"
    return [x.detach() for x in (*results, *gradients)]


def actual_exponent(arguments: list[Tensor], mask: Tensor | None, function: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return function(*(x.double() for x in arguments), mask)[1][:, 2:]


@pytest.mark.skipif(NO_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("function", list(SMALL))
def test_interpreted_kernels_match_naive(function: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, function]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
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
    @pytest.mark.parametrize(
        ("function", "case"), [(f, case) for f in LARGE for case in (*SMALL[f], *LARGE[f])], ids=str
    )
    def test_matches_naive(self, function: str, case: Case, poisoned_memory: None) -> None:
        compare(function, case, "cuda")

    @pytest.mark.parametrize("function", list(LARGE))
    def test_bits_do_not_depend_on_what_follows(self, function: str) -> None:
        """A sequence and its first tokens agree, and an all-true mask changes nothing."""
        module = importlib.import_module(f"rwkv_rev.wkv.triton_{function}")
        shape = (2, 300, 128) if function == "wkv4" else (2, 300, 2, 64)
        arguments, _, arriving = inputs(function, Case(shape), "cuda")
        whole = run(getattr(module, function), arguments, None, arriving)
        mask = torch.ones(2, 300, dtype=torch.bool, device="cuda")
        for x, y in zip(whole, run(getattr(module, function), arguments, mask, arriving), strict=True):
            assert relative(x, y) < 1e-6
        tokens = {"wkv4": 2, "wkv5": 3, "wkv6": 4}[function]
        short = [x[:, :100].contiguous() for x in arguments[:tokens]] + arguments[tokens:]
        assert torch.equal(getattr(module, function)(*short)[0], whole[0][:, :100])

    def test_trained_decays(self) -> None:
        """Decay and bonus of the bundled checkpoint, every layer."""
        weights = torch.load(Path(BUNDLED).with_name("rwkv-5.2.pth"), weights_only=True)
        from rwkv_rev.wkv import triton_wkv5

        for name in [name for name in weights if name.endswith("time_decay")]:
            arguments, mask, arriving = inputs("wkv5", Case((1, 500, *weights[name].shape)), "cuda")
            arguments[3] = -torch.exp(weights[name].float()).cuda()
            arguments[4] = weights[name.replace("decay", "faaaa")].float().cuda()
            actual = run(triton_wkv5.wkv5, arguments, mask, arriving)
            expected = run(naive.wkv5, [x.double() for x in arguments], mask, arriving)
            assert all(relative(x, y) < 3e-6 for x, y in zip(actual, expected, strict=True))

    def test_wkv6_is_dispatched_and_its_factor_is_differentiated(self) -> None:
        """The state after the chunk, made of all results but the outputs, by the dispatcher's own choice."""
        arguments, _, arriving = inputs("wkv6", Case((2, 130, 2, 64)), "cuda")
        assert choose_kernel(None, arguments[0]) == "triton" and "wkv6" in TRITON

        def after(*given: Any) -> tuple[Tensor, Tensor]:
            out, contribution, log_factor = wkv6(*given)
            return out, torch.exp(log_factor).to(out.dtype)[..., None] * given[5] + contribution

        actual = run(after, arguments, None, arriving[:2])
        expected = run(after, [x.double() for x in arguments], None, arriving[:2])
        assert all(relative(x, y) < 3e-6 for x, y in zip(actual, expected, strict=True))

    def test_refuses_what_it_cannot_do(self) -> None:
        for function, shape, dtype, message in (
            ("wkv5", (1, 3, 1, 16), torch.float64, "float64"),
            ("wkv5", (1, 3, 1, 129), torch.float32, "head sizes"),
            ("wkv6", (1, 3, 1, 16), torch.float64, "float64"),
            ("wkv6", (1, 3, 1, 129), torch.float32, "head sizes"),
            ("wkv4", (1, 3, 16), torch.float64, "float64"),
        ):
            module = importlib.import_module(f"rwkv_rev.wkv.triton_{function}")
            arguments, _, _ = inputs(function, Case(shape), "cuda")
            with pytest.raises(KernelError, match=message):
                getattr(module, function)(*(x.to(dtype) for x in arguments))


def interpret(function: str) -> None:
    """Every small case of one function through the interpreter, in this process."""
    import triton.runtime.interpreter as interpreter

    from rwkv_rev.wkv import triton_wkv4, triton_wkv5, triton_wkv6

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        # Triton turns one-element arrays into loop bounds by int(), which NumPy 2.4 refuses; from 3.6 on it has a scope
        original(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    triton_wkv4.SEGMENT = 16  # several segments in few tokens
    for module in (triton_wkv5, triton_wkv6):
        module.PRECISIONS = dict.fromkeys(module.PRECISIONS, "ieee")  # it has no bfloat16 products
    torch.set_num_threads(1)
    for case in SMALL[function]:
        print(case, {name: f"{error:.1e}" for name, error in compare(function, case, "cpu").items()})


if __name__ == "__main__":
    interpret(sys.argv[1])
