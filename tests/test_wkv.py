"""The recurrences: formula, naive float64, chunked float64, float32, half. On GPU: test_wkv_triton.py."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairwise import every_two
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_rev.bundled import __file__ as BUNDLED
from rwkv_rev.cells.recomputation import checkpointed
from rwkv_rev.wkv import (
    EMPTY_EXPONENT,
    KernelError,
    Wkv5Handover,
    choose_kernel,
    use_kernel,
    wkv4,
    wkv5,
    wkv5_contribution,
    wkv5_plan,
)
from rwkv_rev.wkv.compaction import Compaction
from rwkv_rev.wkv.linear_wkv4 import LARGEST_EXPONENT, LinearWkv4, fits

# (relative RMS error of the results, of the gradients, which come in the inputs' dtype)
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 5e-6),
    torch.bfloat16: (1e-6, 5e-3),
    torch.float16: (1e-6, 1e-3),
}
LARGEST_FLOAT64 = 1e-10  # deviation of any element, relative to the largest or to one

LENGTHS = (1, 2, 3, 7, 31, 32, 33, 64, 95, 130)
DECAYS: dict[str, Callable[[int], Tensor]] = {
    "1e-9..1": lambda n: torch.logspace(-9, 0, n, dtype=torch.float64).log(),
    "mild": lambda n: -torch.exp(torch.linspace(-6, -0.2, n, dtype=torch.float64)),
    "one": lambda n: torch.zeros(n, dtype=torch.float64),
    "underflow": lambda n: torch.full((n,), -1e4, dtype=torch.float64),
    "zero": lambda n: torch.full((n,), -math.inf, dtype=torch.float64),
}
MASKS = {"unmasked": None, "holes": 0.7, "all-masked": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are too small for two, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    arguments: list[Tensor]
    mask: Tensor | None
    grad_out: Tensor
    grad_state: Tensor

    def to(self, dtype: torch.dtype, state_dtype: torch.dtype) -> "Case":
        """Token tensors in one dtype, decay, bonus and state in another."""
        *tokens, log_decay, bonus, state = self.arguments
        rest = [x.to(state_dtype) for x in (log_decay, bonus, state)]
        return self._replace(arguments=[*(x.to(dtype) for x in tokens), *rest])


def make_mask(generator: torch.Generator, batch: int, tokens: int, share: float | None) -> Tensor | None:
    return None if share is None else torch.rand(batch, tokens, generator=generator) < share


def case5(
    batch: int = 2,
    tokens: int = 33,
    heads: int = 2,
    size: int = 8,
    decay: str = "1e-9..1",
    share: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v = (random(batch, tokens, heads, size) * scale for _ in range(3))
    log_decay = DECAYS[decay](heads * size).view(heads, size)
    arguments = [r, k, v, log_decay, random(heads, size), random(batch, heads, size, size)]
    mask = make_mask(generator, batch, tokens, share)
    return Case(arguments, mask, random(batch, tokens, heads, size), random(batch, heads, size, size))


def case4(
    batch: int = 2,
    tokens: int = 33,
    width: int = 10,
    decay: str = "1e-9..1",
    share: float | None = None,
    scale: float = 1.0,
    empty: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, v, bonus = random(batch, tokens, width) * scale, random(batch, tokens, width), random(width)
    state = torch.stack((random(batch, width), random(batch, width).abs(), random(batch, width) * scale), 1)
    if empty:
        state = empty_state4(batch, width)
    mask = make_mask(generator, batch, tokens, share)
    arguments = [k, v, DECAYS[decay](width), bonus, state]
    return Case(arguments, mask, random(batch, tokens, width), random(batch, 3, width))


def empty_state4(batch: int, width: int) -> Tensor:
    return torch.tensor([0.0, 0.0, EMPTY_EXPONENT], dtype=torch.float64)[:, None].expand(batch, 3, width)


def run5(case: Case, kernel: str, **options: Any) -> dict[str, Tensor]:
    """Results and gradients, those of the state through both the outputs and the final state."""
    arguments = [x.detach().clone().requires_grad_() for x in case.arguments]
    log_decay, state = arguments[3], arguments[5]
    out, contribution = wkv5(*arguments, case.mask, kernel=kernel, **options)
    tokens = out.shape[1]
    counts = torch.full((len(out),), tokens) if case.mask is None else case.mask.sum(1)
    decay = torch.exp(counts[:, None, None].to(out.dtype) * log_decay.clamp(min=-1e30))
    final = decay[..., None] * state + contribution
    grads = torch.autograd.grad(
        (out, final), arguments, (case.grad_out.to(out.dtype), case.grad_state.to(final.dtype))
    )
    names = ("d_r", "d_k", "d_v", "d_log_decay", "d_bonus", "d_state")
    return {
        "out": out.detach(),
        "contribution": contribution.detach(),
        **dict(zip(names, grads, strict=True)),
    }


def run4(case: Case, kernel: str) -> dict[str, Tensor]:
    arguments = [x.detach().clone().requires_grad_() for x in case.arguments]
    out, state = wkv4(*arguments, case.mask, kernel=kernel)
    grads = torch.autograd.grad(
        (out, state), arguments, (case.grad_out.to(out.dtype), case.grad_state.to(state.dtype))
    )
    names = ("d_k", "d_v", "d_log_decay", "d_bonus", "d_state")
    out, state = out.detach(), state.detach()
    results = {"out": out, "numerator": state[:, 0], "denominator": state[:, 1], "exponent": state[:, 2]}
    return {**results, **dict(zip(names, grads, strict=True))}


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; absolute where nothing is expected."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    if (
        "exponent" in expected
    ):  # RWKV-4's d_bonus is a sum over tokens of terms that d_k has one by one: it may cancel
        scale = max(expected["d_bonus"].norm(), expected["d_k"].abs().sum((0, 1)).norm())
        errors["d_bonus"] = float((actual["d_bonus"] - expected["d_bonus"]).norm() / (scale or 1.0))
    limits = {name: TOLERANCES[dtype][name.startswith("d_")] for name in expected}
    assert all(errors[name] <= limits[name] for name in errors), errors  # NaN fails too
    if dtype == torch.float64:
        for name in expected:
            top = max(1.0, float(expected[name].abs().max()))
            assert float((actual[name] - expected[name]).abs().max()) <= LARGEST_FLOAT64 * top, name


# The naive scans against the formulas


def test_naive_wkv5_is_the_formula() -> None:
    case = case5(batch=1, tokens=6, heads=2, size=3, decay="mild")
    r, k, v, log_decay, bonus, state = case.arguments
    out, contribution = wkv5(*case.arguments, kernel="naive")
    w = log_decay.exp()
    for t, h in itertools.product(range(6), range(2)):
        matrix = torch.diag(w[h] ** t) @ state[0, h] + torch.diag(bonus[h]) @ torch.outer(
            k[0, t, h], v[0, t, h]
        )
        for s in range(t):
            matrix = matrix + torch.diag(w[h] ** (t - 1 - s)) @ torch.outer(k[0, s, h], v[0, s, h])
        torch.testing.assert_close(out[0, t, h], r[0, t, h] @ matrix)
    for h in range(2):
        total = sum(torch.diag(w[h] ** (5 - s)) @ torch.outer(k[0, s, h], v[0, s, h]) for s in range(6))
        torch.testing.assert_close(contribution[0, h], total)


@pytest.mark.parametrize("empty", [False, True])
def test_naive_wkv4_is_the_formula(empty: bool) -> None:
    case = case4(batch=1, tokens=6, width=3, decay="mild", empty=empty)
    k, v, log_decay, bonus, state = (x if x.dim() == 1 else x[0] for x in case.arguments)
    out, final = wkv4(*case.arguments, kernel="naive")
    top = 0.0 if empty else state[2].exp()
    for t in range(7):
        past = [(torch.exp(t * log_decay) * state[0] * top, torch.exp(t * log_decay) * state[1] * top)]
        for s in range(t):
            weight = torch.exp((t - 1 - s) * log_decay + k[s])
            past.append((weight * v[s], weight))
        numerator, denominator = (sum(parts) for parts in zip(*past, strict=True))
        if t < 6:
            now = torch.exp(bonus + k[t])
            torch.testing.assert_close(out[0, t], (numerator + now * v[t]) / (denominator + now))
    torch.testing.assert_close(final[0, :2] * final[0, 2].exp(), torch.stack((numerator, denominator)))


# Chunked against naive, float64


@pytest.mark.parametrize(("tokens", "decay", "mask"), every_two(LENGTHS, DECAYS, MASKS))
def test_chunked_wkv5_is_naive_in_float64(tokens: int, decay: str, mask: str) -> None:
    case = case5(tokens=tokens, decay=decay, share=MASKS[mask])
    actual = run5(case, "chunked")
    assert_close(actual, run5(case, "naive"), torch.float64)
    assert torch.equal(
        wkv5_contribution(*case.arguments[1:4], case.mask, kernel="chunked"), actual["contribution"]
    )


@pytest.mark.parametrize(("tokens", "decay", "mask"), every_two(LENGTHS, DECAYS, MASKS))
def test_chunked_wkv4_is_naive_in_float64(tokens: int, decay: str, mask: str) -> None:
    first = list(DECAYS).index(decay) % 2 == 1  # each length meets each scale with either kind of state
    for scale, empty in ((1.0, first), (20.0, not first)):
        case = case4(tokens=tokens, decay=decay, share=MASKS[mask], scale=scale, empty=empty)
        assert_close(run4(case, "chunked"), run4(case, "naive"), torch.float64)


SHAPES = {"batch": st.integers(1, 3), "tokens": st.integers(1, 140), "seed": st.integers(0, 999)}
ANY = {"decay": st.sampled_from(list(DECAYS)), "share": st.sampled_from([None, 0.1, 0.5, 0.95])}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 2, 5, 16]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    **SHAPES,
    **ANY,
)
def test_chunked_wkv5_is_naive_for_any_shape(**shape: Any) -> None:
    case = case5(**shape)
    assert_close(run5(case, "chunked"), run5(case, "naive"), torch.float64)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 20), scale=st.sampled_from([0.1, 1.0, 20.0]), empty=st.booleans(), **SHAPES, **ANY
)
@example(width=1, scale=20.0, empty=False, batch=1, tokens=20, seed=0, decay="1e-9..1", share=0.1)
def test_chunked_wkv4_is_naive_for_any_shape(**shape: Any) -> None:
    case = case4(**shape)
    assert_close(run4(case, "chunked"), run4(case, "naive"), torch.float64)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [2, 32, 64, 96])
@pytest.mark.parametrize("empty", [False, True])
def test_wkv4_without_running_maxima(
    tokens: int, decay: str, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exponents up to the largest allowed; a key, a bonus or a state beyond takes the scan with maxima."""
    chosen = []
    apply = LinearWkv4.apply
    monkeypatch.setattr(LinearWkv4, "apply", lambda *a: chosen.append(True) or apply(*a))
    case = case4(tokens=tokens, decay=decay, empty=empty)
    k, _, _, bonus, state = case.arguments
    k.mul_(0.9999 * (LARGEST_EXPONENT - bonus.abs().max()) / k.abs().max())
    assert_close(run4(case, "chunked"), run4(case, "naive"), torch.float64)
    assert chosen
    chosen.clear()
    for part in (k[1, 1], bonus) if empty else (k[1, 1], bonus, state[:, 2]):
        former = part.clone()
        part[-1] = math.nan
        assert not fits(k, bonus, state)
        part.copy_(former)
        part.clamp_(min=1.01 * LARGEST_EXPONENT)
        assert_close(run4(case, "chunked"), run4(case, "naive"), torch.float64)
        part.copy_(former)
    assert not chosen


@pytest.mark.parametrize("decay", [-0.5, -1.5, -3.0, -7.0, -15.0, -40.0])
def test_every_depth_of_halving(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECAYS, "constant", lambda n: torch.full((n,), decay, dtype=torch.float64))
    case = case5(tokens=70, decay="constant")
    assert_close(run5(case, "chunked"), run5(case, "naive"), torch.float64)


# Lower precision: the reference is float64 naive on the same, rounded inputs


def rounded(case: Case, dtype: torch.dtype) -> tuple[Case, Case]:
    low = case.to(dtype, torch.float32)
    return low, low.to(torch.float64, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("decay", ["1e-9..1", "mild", "one"])
def test_chunked_wkv5_in_lower_precision(decay: str, scale: float, dtype: torch.dtype) -> None:
    low, high = rounded(case5(tokens=170, size=32, decay=decay, scale=scale, share=0.9), dtype)
    actual = run5(low, "chunked")
    assert actual["out"].dtype == actual["contribution"].dtype == torch.float32
    assert actual["d_k"].dtype == dtype
    assert_close(actual, run5(high, "naive"), dtype)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize(
    ("decay", "dtype", "tokens"),
    every_two(["1e-9..1", "mild", "one"], [torch.float32, torch.bfloat16, torch.float16], [170, 192]),
    ids=str,
)
def test_chunked_wkv4_in_lower_precision(tokens: int, decay: str, scale: float, dtype: torch.dtype) -> None:
    case = case4(tokens=tokens, width=64, decay=decay, scale=scale, share=0.9 if tokens == 170 else None)
    case.arguments[0].clamp_(-20, 20)
    low, high = rounded(case, dtype)
    actual = run4(low, "chunked")
    assert actual["out"].dtype == actual["numerator"].dtype == torch.float32
    assert actual["d_k"].dtype == dtype
    expected = run4(high, "naive")
    regauge = torch.exp(actual["exponent"].double() - expected["exponent"])
    for name in ("numerator", "denominator"):
        actual[name] = actual[name] * regauge
    assert_close(actual, expected, dtype)


def bundled(name: str, *keys: str) -> Iterator[list[Tensor]]:
    """Parameters of every layer's time mix in a checkpoint that comes with the package."""
    weights = torch.load(BUNDLED.replace("__init__.py", f"{name}.pth"), weights_only=True)
    for layer in itertools.count():
        if f"blocks.{layer}.att.time_decay" not in weights:
            return
        yield [weights[f"blocks.{layer}.att.{key}"].double() for key in keys]


def test_float32_errors_with_trained_decays_are_no_larger_than_the_naive_scans() -> None:
    errors: dict[str, float] = {}
    for time_decay, bonus in bundled("rwkv-5.2", "time_decay", "time_faaaa"):
        heads, size = time_decay.shape
        case = case5(batch=1, tokens=160, heads=heads, size=size)
        case.arguments[3:5] = [-time_decay.exp(), bonus]
        low, high = rounded(case, torch.float32)
        expected = run5(high, "naive")
        for kernel in ("naive", "chunked"):
            for name, value in run5(low, kernel).items():
                errors[f"5 {name} {kernel}"] = max(
                    errors.get(f"5 {name} {kernel}", 0), relative(value, expected[name])
                )
    for time_decay, bonus in bundled("rwkv-4", "time_decay", "time_first"):
        case = case4(batch=1, tokens=160, width=len(time_decay), scale=4.0)
        case.arguments[2:4] = [-time_decay.exp(), bonus]
        low, high = rounded(case, torch.float32)
        expected = run4(high, "naive")
        for kernel in ("naive", "chunked"):
            for name, value in run4(low, kernel).items():
                errors[f"4 {name} {kernel}"] = max(
                    errors.get(f"4 {name} {kernel}", 0), relative(value, expected[name])
                )
    for name in [name.removesuffix(" naive") for name in errors if name.endswith("naive")]:
        assert errors[f"{name} chunked"] <= 1.5 * errors[f"{name} naive"] + 1e-7, errors


# What the callers rely on


@pytest.mark.parametrize("kernel", ["naive", "chunked"])
def test_masked_tokens_change_nothing(kernel: str) -> None:
    case = case5(tokens=50, share=0.6)
    assert case.mask is not None
    r, k, v, *rest = case.arguments
    garbage = [x.masked_fill(~case.mask[..., None, None], math.nan) for x in (r, k, v)]
    out, contribution = wkv5(*garbage, *rest, case.mask, kernel=kernel)
    assert not out[~case.mask].any()
    for row in range(2):
        short = [x[row : row + 1, case.mask[row]] for x in (r, k, v)]
        alone, update = wkv5(*short, *rest[:2], rest[2][row : row + 1], kernel=kernel)
        torch.testing.assert_close(out[row : row + 1, case.mask[row]], alone)
        torch.testing.assert_close(contribution[row : row + 1], update)

    case = case4(tokens=50, share=0.6)
    assert case.mask is not None
    k, v, *rest = case.arguments
    garbage = [x.masked_fill(~case.mask[..., None], math.nan) for x in (k, v)]
    out, state = wkv4(*garbage, *rest, case.mask, kernel=kernel)
    assert not out[~case.mask].any()
    for row in range(2):
        short = [x[row : row + 1, case.mask[row]] for x in (k, v)]
        alone, after = wkv4(*short, *rest[:2], rest[2][row : row + 1], kernel=kernel)
        torch.testing.assert_close(out[row : row + 1, case.mask[row]], alone)
        torch.testing.assert_close(state[row : row + 1], after)


@pytest.mark.parametrize("kernel", ["naive", "chunked"])
@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_a_row_of_masked_tokens_keeps_its_state_to_the_bit(tokens: int, kernel: str) -> None:
    for empty in (False, True):
        case = case4(tokens=tokens, empty=empty)
        mask = torch.arange(2)[:, None].expand(2, tokens).bool()
        before = case.arguments[-1]
        after = wkv4(*case.arguments, mask, kernel=kernel)[1]
        assert torch.equal(after[0], before[0])
        assert not torch.equal(after[1], before[1])
    assert not wkv5(*case5(tokens=tokens).arguments, mask, kernel=kernel)[1][0].any()


@pytest.mark.parametrize("kernel", ["naive", "chunked"])
@pytest.mark.parametrize("cut", [1, 17, 64])
def test_two_chunks_are_one(cut: int, kernel: str) -> None:
    r, k, v, log_decay, bonus, state = case5(tokens=90, decay="mild").arguments
    whole, total = wkv5(r, k, v, log_decay, bonus, state, kernel=kernel)
    first, update = wkv5(*(x[:, :cut] for x in (r, k, v)), log_decay, bonus, state, kernel=kernel)
    middle = torch.exp(cut * log_decay)[..., None] * state + update
    second, last = wkv5(*(x[:, cut:] for x in (r, k, v)), log_decay, bonus, middle, kernel=kernel)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(torch.exp((90 - cut) * log_decay)[..., None] * update + last, total)

    k, v, log_decay, bonus, state = case4(tokens=90, decay="mild", empty=True).arguments
    whole, total = wkv4(k, v, log_decay, bonus, state, kernel=kernel)
    first, middle = wkv4(k[:, :cut], v[:, :cut], log_decay, bonus, state, kernel=kernel)
    second, last = wkv4(k[:, cut:], v[:, cut:], log_decay, bonus, middle, kernel=kernel)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, total)


def moved(x: Tensor) -> Tensor:
    """A contiguous copy that starts at another, odd address."""
    return torch.cat((x.new_zeros(3), x.flatten()))[3:].view_as(x)


@pytest.mark.parametrize("share", [None, 0.8])
@pytest.mark.parametrize(
    ("kernel", "tokens"), [("naive", 1), ("naive", 61), *(("chunked", n) for n in (1, 32, 61, 256))]
)
def test_the_same_bits_every_time(kernel: str, tokens: int, share: float | None) -> None:
    for case, run in (
        (case5(tokens=tokens, share=share, size=32, decay="mild"), run5),
        (case4(tokens=tokens, share=share, width=33), run4),
    ):
        case = case.to(torch.float32, torch.float32)
        first = run(case, kernel)
        again = run(case._replace(arguments=[moved(x) for x in case.arguments]), kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run(case, kernel)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name
            assert torch.equal(value, cast[name]), name
        with torch.no_grad():
            function = wkv5 if run is run5 else wkv4
            out, state = function(*case.arguments, case.mask, kernel=kernel)
            assert torch.equal(out, first["out"])
            if run is run5:
                alone = wkv5_contribution(*case.arguments[1:4], case.mask, kernel=kernel)
                assert torch.equal(state, first["contribution"])
                assert torch.equal(alone, first["contribution"])


@pytest.mark.parametrize("share", [None, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 32, 61])
@pytest.mark.parametrize("kernel", ["naive", "chunked"])
def test_a_plan_and_shared_work_change_no_bit(
    kernel: str, tokens: int, dtype: torch.dtype, share: float | None
) -> None:
    """Neither of those for these tokens, nor of a plan for others, nor work used twice."""
    case = case5(tokens=tokens, share=share, size=32, decay="mild").to(dtype, torch.float32)
    expected = run5(case, kernel)
    for planned in (tokens, tokens + 1):
        plan, handover = wkv5_plan(case.arguments[3], planned, kernel=kernel), Wkv5Handover()
        with torch.no_grad():
            alone = wkv5_contribution(
                *case.arguments[1:4], case.mask, kernel=kernel, plan=plan, handover=handover
            )
        assert torch.equal(alone, expected["contribution"])
        for _ in range(2):
            actual = run5(case, kernel, plan=plan, handover=handover)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_no_result_depends_on_uninitialised_memory() -> None:
    cases = [(case5(tokens=45, share=share), case4(tokens=45, share=share)) for share in (None, 0.7)]
    expected = [(run5(five, "chunked"), run4(four, "chunked")) for five, four in cases]
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = [(run5(five, "chunked"), run4(four, "chunked")) for five, four in cases]
    finally:
        torch.use_deterministic_algorithms(False)
    for pair in zip(actual, expected, strict=True):
        for got, wanted in zip(*pair, strict=True):
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kernel", ["naive", "chunked"])
def test_gradients_of_the_contribution_alone(kernel: str) -> None:
    case = case5(tokens=45, share=0.7)
    k, v, log_decay = (x.clone().requires_grad_() for x in case.arguments[1:4])
    alone = wkv5_contribution(k, v, log_decay, case.mask, kernel=kernel)
    actual = torch.autograd.grad(alone, (k, v, log_decay), case.grad_state)
    r, _, _, _, bonus, state = case.arguments
    both = wkv5(r, k, v, log_decay, bonus, state, case.mask, kernel="naive")[1]
    for got, wanted in zip(
        actual, torch.autograd.grad(both, (k, v, log_decay), case.grad_state), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_chunked_is_many_times_faster_than_naive() -> None:
    def seconds(run: Callable[[Case, str], Any], case: Case, kernel: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(case, kernel)
            times.append(time.perf_counter() - start)
        return min(times)

    five = case5(batch=1, tokens=512, size=64, decay="mild").to(torch.float32, torch.float32)
    four = case4(batch=1, tokens=512, width=128, decay="mild").to(torch.float32, torch.float32)
    assert seconds(run5, five, "naive") > 4 * seconds(run5, five, "chunked")
    assert seconds(run4, four, "naive") > 4 * seconds(run4, four, "chunked")


# The dispatcher


def test_the_kernel_comes_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    monkeypatch.delenv("RWKV_REV_KERNEL", raising=False)
    assert choose_kernel(None, tensor) == "chunked"
    assert choose_kernel("naive", tensor) == "naive"
    monkeypatch.setenv("RWKV_REV_KERNEL", "naive")
    assert choose_kernel(None, tensor) == "naive"
    assert choose_kernel("chunked", tensor) == "chunked"
    case = case4()
    assert torch.equal(wkv4(*case.arguments)[0], wkv4(*case.arguments, kernel="naive")[0])
    with use_kernel("chunked"):
        assert choose_kernel(None, tensor) == "chunked"
        assert choose_kernel("naive", tensor) == "naive"
        assert os.environ["RWKV_REV_KERNEL"] == "naive"  # which belongs to the whole process
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(choose_kernel, None, tensor).result() == "naive"
    assert choose_kernel(None, tensor) == "naive"


def test_a_layer_that_is_computed_again_uses_the_same_kernel() -> None:
    """Also in another thread, as autograd's of a device is."""
    used: list[str] = []
    x = torch.zeros(1, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        used.append(choose_kernel(None, x))
        return x.sin()

    with use_kernel("naive"):
        loss = checkpointed(partial(checkpoint, use_reentrant=False), layer, x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert used == ["naive", "naive"]


def test_triton_falls_back_to_chunked_on_the_cpu() -> None:
    case = case5()
    assert choose_kernel("triton", case.arguments[0]) == "chunked"
    pairs = zip(wkv5(*case.arguments, kernel="triton"), wkv5(*case.arguments, kernel="chunked"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="'cuda'; there are naive, chunked, triton"):
        wkv4(*case4().arguments, kernel="cuda")
    monkeypatch.setenv("RWKV_REV_KERNEL", "fast")
    with pytest.raises(KernelError, match="'fast'"):
        wkv5_contribution(*case5().arguments[1:4])


def test_shapes_that_do_not_fit_are_refused() -> None:
    r, k, v, log_decay, bonus, state = case5().arguments
    with pytest.raises(KernelError, match=r"state has shape \(2, 2, 8\); \(2, 2, 8, 8\) is needed"):
        wkv5(r, k, v, log_decay, bonus, state[..., 0])
    with pytest.raises(KernelError, match="log_decay has shape"):
        wkv5_contribution(k, v, log_decay[0])
    with pytest.raises(KernelError, match="mask has shape"):
        wkv5(r, k, v, log_decay, bonus, state, torch.ones(2, 3))
    with pytest.raises(KernelError, match="4 dimensions and a token are needed"):
        wkv5_contribution(k[:, :0], v[:, :0], log_decay)
    k, v, log_decay, bonus, state = case4().arguments
    with pytest.raises(KernelError, match="v has shape"):
        wkv4(k, v[:, 1:], log_decay, bonus, state)


def test_masks_of_integers_are_taken() -> None:
    case = case4(share=0.5)
    assert case.mask is not None
    assert torch.equal(wkv4(*case.arguments, case.mask.long())[0], wkv4(*case.arguments, case.mask)[0])


# compaction.py


def test_compaction_packs_in_order_and_unpacks() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    x = torch.arange(15.0).view(3, 5, 1) + 1
    compaction = Compaction(mask)
    assert compaction.counts.tolist() == [3, 1, 0]
    assert compaction.pack(x)[..., 0].tolist() == [[2, 4, 5, 0, 0], [6, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert torch.equal(compaction.unpack(compaction.pack(x)), x * mask[..., None])
