"""The reversible GRU against its equations, written once more, and the limit of its forgetting."""

import math

import pytest
import torch
from torch import Tensor

from rwkv_rev.cells.reversible_gru import ReversibleGru
from rwkv_rev.cells.token_cell import TokenState
from rwkv_rev.errors import ConfigError
from rwkv_rev.reversal.stepped import ideal_bits

SIZE, WIDTH = 3, 5


def by_the_paper(cell: ReversibleGru, h: Tensor, x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(h1, h2) after each token of x [B, C, D] by one map of (x, h) for each gate, [B, C, 2, M]; and every z."""
    U, b = cell.input.weight, cell.input.bias
    (h1, h2), after, forgets = h.unbind(1), [], []
    for t in range(x.shape[1]):
        halves = []
        for half in range(2):
            other = h2 if half == 0 else halves[0]
            rows = slice(3 * SIZE * half, 3 * SIZE * (half + 1))
            z_x, r_x, g_x = (x[:, t] @ U[rows].T + b[rows]).chunk(3, dim=1)
            z_h, r_h = (other @ cell.gate[half].weight.T).chunk(2, dim=1)
            z = least + (1 - least) * torch.sigmoid(z_x + z_h)
            g = torch.tanh(g_x + (torch.sigmoid(r_x + r_h) * other) @ cell.candidate[half].weight.T)
            halves.append(z * (h1, h2)[half] + (1 - z) * g)
            forgets.append(z)
        h1, h2 = halves
        after.append(torch.stack(halves, dim=1))
    return torch.stack(after, dim=1), torch.stack(forgets)


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5])
def test_the_equations(limit: int | None) -> None:
    torch.manual_seed(0)
    cell = ReversibleGru(WIDTH, SIZE, forget_limit=limit).double()
    x, h = torch.randn(2, 7, WIDTH).double(), torch.randn(2, 2, SIZE).double()
    with torch.no_grad():
        after, forgets = by_the_paper(cell, h, x, 0.0 if limit is None else 2.0**-limit)
        out, end = cell.step(TokenState(h), x)
        advanced = cell.advance(cell.exact(TokenState(h)), x)
    torch.testing.assert_close(out, after.flatten(2) @ cell.output.weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end.memory, after[:, -1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advanced.out, out, rtol=1e-11, atol=1e-11)
    assert advanced.remnant.size is not None
    used, ideal = float(advanced.remnant.size.sum()), float(ideal_bits(forgets).sum())
    assert 0.8 * ideal <= used <= 1.6 * ideal


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_limit_holds_whatever_the_gates_say(limit: int) -> None:
    """No number forgets more than k bits in a token, not where the sigmoid is 0; its remnant has k bits at most."""
    torch.manual_seed(0)
    cell = ReversibleGru(WIDTH, SIZE, forget_limit=limit)
    with torch.no_grad():
        cell.input.bias[: 2 * SIZE] = cell.input.bias[3 * SIZE : 5 * SIZE] = -200.0
    advanced = cell.advance(cell.exact(cell.empty(4)), torch.randn(4, 3, WIDTH))
    assert all(float(decay.min()) == 2.0**-limit for decay in advanced.remnant.decays)
    _, widths = advanced.remnant.forgotten
    assert int(widths.max()) == limit


@pytest.mark.parametrize("limit", [0, -1, math.nan])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"forget_limit = .* must be more than 0, or None"):
        ReversibleGru(WIDTH, SIZE, forget_limit=limit)


def test_the_state_stays_within_one() -> None:
    torch.manual_seed(0)
    cell = ReversibleGru(WIDTH, SIZE, magnitude=1)
    with torch.no_grad():
        cell.input.weight.mul_(20)
        state = cell.exact(cell.empty(2))
        for _ in range(20):
            state = cell.advance(state, 10 * torch.randn(2, 5, WIDTH)).state
    assert float(cell.values(state).memory.abs().max()) <= 1
