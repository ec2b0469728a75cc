"""The recurrences whose transitions depend on the tokens (RWKV-6, RWKV-7): formula, naive float64, chunked, masks."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_rev.wkv import KernelError, wkv6, wkv6_contribution, wkv7

TOLERANCES = {  # relative RMS error of results and of gradients, which come in the inputs' dtype
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 5e-6),
    torch.bfloat16: (1e-6, 5e-3),
    torch.float16: (1e-6, 1e-3),
}
LENGTHS = (1, 2, 3, 31, 32, 33, 64, 95, 130)
MASKS = {"unmasked": None, "holes": 0.7, "all-masked": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are too small for two, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(batch: int, tokens: int, share: float | None) -> Tensor | None:
    if share is None:
        return None
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(5)) < share


# log w per token and channel: what RWKV-6 can produce, down to 1e-9 and to 0 a step, weak and strong side by side
DECAYS6: dict[str, Callable[[Tensor], Tensor]] = {
    "drawn": lambda x: -torch.exp(x - 2),
    "1e-9..1": lambda x: 10.3 * (torch.sin(3 * x) - 1),
    "alternating": lambda x: torch.where(x > 0, -1e-4 * x, 30.0 * x),
    "zero": lambda x: torch.where(x > 1, -math.inf, -torch.exp(x)),
    "one": lambda x: torch.zeros_like(x),
}


def case6(tokens: int, decay: str = "drawn", batch: int = 2, heads: int = 2, size: int = 8) -> list[Tensor]:
    shape = (batch, tokens, heads, size)
    r, k, v, x = (drawn(*shape, seed=seed) for seed in range(4))
    log_decay = DECAYS6[decay](x)
    return [r, k, v, log_decay, drawn(heads, size, seed=7), drawn(batch, heads, size, size, seed=8)]


# kappa, a, log w: trained-like; projections at every token; one key over and over; nothing removed, nothing decayed
EDGES7 = ("drawn", "projections", "repeated", "kept", "strongest")


def case7(tokens: int, edge: str = "drawn", batch: int = 2, heads: int = 2, size: int = 8) -> list[Tensor]:
    shape = (batch, tokens, heads, size)
    r, k, v, x, y, z = (drawn(*shape, seed=seed) for seed in range(6))
    removal = torch.nn.functional.normalize(x, dim=-1)
    rate, log_decay = torch.sigmoid(y), -math.exp(-0.5) * torch.sigmoid(z)
    if edge == "projections":
        rate, log_decay = torch.ones_like(rate), torch.zeros_like(log_decay)
    elif edge == "repeated":
        removal = removal[:, :1].expand(shape).clone()
        rate = torch.ones_like(rate)
    elif edge == "kept":
        rate, log_decay = torch.zeros_like(rate), torch.zeros_like(log_decay)
    elif edge == "strongest":
        log_decay = torch.full_like(log_decay, -math.exp(-0.5))
    return [r, k, v, log_decay, removal, rate, drawn(batch, heads, size, size, seed=8)]


def after6(arguments: list[Tensor], mask: Tensor | None, kernel: str) -> tuple[Tensor, Tensor]:
    out, contribution, log_factor = wkv6(*arguments, mask, kernel=kernel)
    factor = torch.exp(log_factor).to(contribution.dtype)
    return out, factor[..., None] * arguments[-1] + contribution


def after7(arguments: list[Tensor], mask: Tensor | None, kernel: str) -> tuple[Tensor, Tensor]:
    return wkv7(*arguments, mask, kernel=kernel)


AFTER: dict[str, Any] = {"6": (case6, after6), "7": (case7, after7)}
CASES = [("6", decay) for decay in DECAYS6] + [("7", edge) for edge in EDGES7]


def run(
    version: str, arguments: list[Tensor], mask: Tensor | None, kernel: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients through both of them; tokens in ``dtype``, decays and states at least in float32."""
    tokens = 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype if number < tokens else wide).requires_grad_() for number, x in enumerate(arguments)]
    results = AFTER[version][1](leaves, mask, kernel)
    pulls = [drawn(*x.shape, seed=20 + number).to(x.dtype) for number, x in enumerate(results)]
    return [x.detach() for x in results], list(torch.autograd.grad(results, leaves, pulls))


def error(found: Tensor, expected: Tensor) -> float:
    found = found.double()
    assert found.isfinite().all()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("version", "edge"), CASES)
def test_chunked_is_the_recurrence(version: str, edge: str, mask: str) -> None:
    for tokens in LENGTHS if mask == "unmasked" and edge == "drawn" else (33, 70):
        arguments = AFTER[version][0](tokens, edge)
        valid = mask_of(2, tokens, MASKS[mask])
        truth = run(version, arguments, valid, "naive", torch.float64)
        for dtype, limits in TOLERANCES.items():
            if dtype.itemsize == 2:  # what is rounded on the way in is no error of the kernel
                arguments = [x.to(dtype).double() if i < 3 else x for i, x in enumerate(arguments)]
                truth = run(version, arguments, valid, "naive", torch.float64)
            found = run(version, arguments, valid, "chunked", dtype)
            for values, expected, limit in zip(found, truth, limits, strict=True):
                for number, (one, other) in enumerate(zip(values, expected, strict=True)):
                    assert error(one, other) <= limit, (tokens, dtype, number, error(one, other))


@pytest.mark.parametrize("edge", EDGES7)
def test_gates_in_sixteen_bits_are_multiplied_in_float32(edge: str) -> None:
    arguments = [x.to(torch.bfloat16) for x in case7(70, edge)]
    results = wkv7(*arguments, kernel="chunked")
    truth = wkv7(*(x.double() for x in arguments), kernel="naive")
    assert max(map(error, results, truth)) <= TOLERANCES[torch.bfloat16][0]


def test_naive_6_is_the_formula() -> None:
    r, k, v, log_decay, bonus, state = case6(5, batch=1, heads=1)
    out = wkv6(r, k, v, log_decay, bonus, state, kernel="naive")[0][0, :, 0]
    matrix = state[0, 0]
    for t in range(5):
        product = torch.outer(k[0, t, 0], v[0, t, 0])
        torch.testing.assert_close(out[t], r[0, t, 0] @ (matrix + torch.diag(bonus[0]) @ product))
        matrix = torch.diag(log_decay[0, t, 0].exp()) @ matrix + product


def test_naive_7_is_the_formula() -> None:
    r, k, v, log_decay, removal, rate, state = case7(5, batch=1, heads=1)
    out, after = wkv7(r, k, v, log_decay, removal, rate, state, kernel="naive")
    matrix = state[0, 0].T  # value index first, as in the paper
    for t in range(5):
        kappa, a, w = removal[0, t, 0], rate[0, t, 0], log_decay[0, t, 0].exp()
        matrix = matrix @ (torch.diag(w) - torch.outer(kappa, a * kappa))
        matrix = matrix + torch.outer(v[0, t, 0], k[0, t, 0])
        torch.testing.assert_close(out[0, t, 0], matrix @ r[0, t, 0])
    torch.testing.assert_close(after[0, 0], matrix.T)


@pytest.mark.parametrize("kernel", ["naive", "chunked"])
@pytest.mark.parametrize(("version", "edge"), CASES)
def test_masked_tokens_change_nothing(version: str, edge: str, kernel: str) -> None:
    """To rounding of the tokens alone; outputs there are zero, whatever stands in the masked places."""
    case, after = AFTER[version]
    arguments = case(40, edge, batch=1)
    valid = torch.rand(1, 40, generator=torch.Generator().manual_seed(3)) < 0.6
    tokens = 4 if version == "6" else 6
    alone = [x[:, valid[0]] if number < tokens else x for number, x in enumerate(arguments)]
    garbage = [
        x.masked_fill(~valid[..., None, None], 1e4) if number < tokens and number != 3 else x
        for number, x in enumerate(arguments)
    ]
    out, state = after(garbage, valid, kernel)
    expected, last = after(alone, None, kernel)
    torch.testing.assert_close(out[:, valid[0]], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)
    assert not out[:, ~valid[0]].any()


@pytest.mark.parametrize("kernel", ["naive", "chunked"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("decay", DECAYS6)
def test_the_contribution_alone_is_the_same_to_the_bit(decay: str, mask: str, kernel: str) -> None:
    arguments, valid = [x.float() for x in case6(70, decay)], mask_of(2, 70, MASKS[mask])
    with torch.no_grad():
        both = wkv6_contribution(*arguments[1:4], valid, kernel=kernel)
    for one, other in zip(both, wkv6(*arguments, valid, kernel=kernel)[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("version", "edge"), CASES)
def test_the_same_bits_with_gradients_and_without(version: str, edge: str) -> None:
    case, after = AFTER[version]
    arguments = [x.float().requires_grad_() for x in case(70, edge)]
    with torch.no_grad():
        expected = after(arguments, None, "chunked")
    for one, other in zip(after(arguments, None, "chunked"), expected, strict=True):
        assert torch.equal(one, other)


def test_wrong_shapes_are_named() -> None:
    arguments = case7(4)
    with pytest.raises(KernelError, match="rate has shape"):
        wkv7(*arguments[:5], arguments[5][..., :3], arguments[6])
    with pytest.raises(KernelError, match="log_decay has shape"):
        wkv6(*case6(4)[:3], case6(5)[3], *case6(4)[4:])
