"""The reversible LSTM against its equations, written once more; its limit, and states that grow."""

import pytest
import torch
from torch import Tensor

from rwkv_rev.cells.reversible_lstm import ReversibleLstm
from rwkv_rev.cells.token_cell import TokenState
from rwkv_rev.errors import ConfigError
from rwkv_rev.reversal.stepped import GridOverflowError, ideal_bits

SIZE, WIDTH = 3, 5


def by_the_paper(cell: ReversibleLstm, state: Tensor, x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(c1, h1, c2, h2) after each token of x [B, C, D], [B, C, 4, M]; and every z and p."""
    U, b = cell.input.weight, cell.input.bias
    (c1, h1, c2, h2), after, forgets = state.unbind(1), [], []
    for t in range(x.shape[1]):
        for half in range(2):
            c, h, other = (c1, h1, h2) if half == 0 else (c2, h2, h1)
            rows = slice(5 * SIZE * half, 5 * SIZE * (half + 1))
            whole = x[:, t] @ U[rows].T + b[rows] + other @ cell.recurrent[half].weight.T
            z, p, i, o, g = whole.chunk(5, dim=1)
            z, p = (least + (1 - least) * torch.sigmoid(gate) for gate in (z, p))
            c = z * c + torch.sigmoid(i) * torch.tanh(g)
            h = p * h + torch.sigmoid(o) * torch.tanh(c)
            forgets += [z, p]
            if half == 0:
                c1, h1 = c, h
            else:
                c2, h2 = c, h
        after.append(torch.stack([c1, h1, c2, h2], dim=1))
    return torch.stack(after, dim=1), torch.stack(forgets)


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5])
def test_the_equations(limit: int | None) -> None:
    torch.manual_seed(0)
    cell = ReversibleLstm(WIDTH, SIZE, forget_limit=limit).double()
    x, state = torch.randn(2, 7, WIDTH).double(), torch.randn(2, 4, SIZE).double()
    with torch.no_grad():
        after, forgets = by_the_paper(cell, state, x, 0.0 if limit is None else 2.0**-limit)
        out, end = cell.step(TokenState(state), x)
        advanced = cell.advance(cell.exact(TokenState(state)), x)
    expected = after[:, :, 1::2].flatten(2) @ cell.output.weight.T
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end.memory, after[:, -1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advanced.out, out, rtol=1e-10, atol=1e-10)
    assert advanced.remnant.size is not None
    used, ideal = float(advanced.remnant.size.sum()), float(ideal_bits(forgets).sum())
    assert 0.8 * ideal <= used <= 1.6 * ideal


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_holds_whatever_the_gates_say(limit: int) -> None:
    torch.manual_seed(0)
    cell = ReversibleLstm(WIDTH, SIZE, forget_limit=limit)
    with torch.no_grad():
        cell.input.bias[: 2 * SIZE] = cell.input.bias[5 * SIZE : 7 * SIZE] = -200.0
    advanced = cell.advance(cell.exact(cell.empty(4)), torch.randn(4, 3, WIDTH))
    assert all(float(decay.min()) == 2.0**-limit for decay in advanced.remnant.decays)
    _, widths = advanced.remnant.forgotten
    assert int(widths.max()) == limit


def test_a_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="forget_limit = 0 bits must be more than 0, or None"):
        ReversibleLstm(WIDTH, SIZE, forget_limit=0)


def test_a_cell_that_forgets_nothing_grows_until_it_is_named() -> None:
    torch.manual_seed(0)
    cell = ReversibleLstm(WIDTH, SIZE)
    with torch.no_grad():
        cell.input.bias.fill_(200.0)  # z, p, i, o and g are 1
        state = cell.exact(cell.empty(1))
        state = cell.advance(state, torch.randn(1, 255, WIDTH)).state
        assert float(cell.values(state).memory.max()) == 255
        with pytest.raises(GridOverflowError, match=r"beyond 256 in row 0.* magnitude=11 or more"):
            cell.advance(state, torch.randn(1, 2, WIDTH))
        longer = ReversibleLstm(WIDTH, SIZE, magnitude=11, wide=True)
        longer.load_state_dict(cell.state_dict())
        state = longer.advance(longer.exact(longer.empty(1)), torch.randn(1, 300, WIDTH)).state
        assert float(longer.values(state).memory.max()) == 300
