"""The coupled additive cell: its equations, gates of anybody's, nothing on the tape."""

import pytest
import torch
from token_cases import gradients, language_model, masked_inputs, plain_inputs
from torch import Tensor, nn

from rwkv_rev import position_wise
from rwkv_rev.cells.coupled import CoupledCell
from rwkv_rev.errors import StrategyError


def test_the_equations() -> None:
    torch.manual_seed(0)
    cell, x = CoupledCell(6, 3).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    state = cell.empty(2, dtype=torch.float64)
    out, end = cell.step(state._replace(memory=torch.randn_like(state.memory)), x)
    torch.manual_seed(0)
    CoupledCell(6, 3), torch.randn(2, 5, 6, dtype=torch.float64)
    s1, s2 = torch.randn_like(state.memory).unbind(1)

    def gate(of: nn.Module, s: Tensor, x: Tensor) -> Tensor:
        W, U, b = of.of_state.weight, of.of_input.weight, of.of_input.bias
        return 0.125 * torch.tanh(s @ W.T + x @ U.T + b)

    for token in range(5):
        s1 = s1 + gate(cell.first, s2, x[:, token])
        s2 = s2 + gate(cell.second, s1, x[:, token])
        expected = torch.tanh(torch.cat([s1, s2], dim=1)) @ cell.reader.of_state.weight.T
        torch.testing.assert_close(out[:, token], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end.memory, torch.stack([s1, s2], dim=1), rtol=1e-12, atol=1e-12)


@position_wise
class Product(nn.Module):
    """A gate of two tensors that is no sum of theirs."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size + width, 7), nn.Linear(7, size)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return torch.sin(self.outer(torch.relu(self.inner(torch.cat([state, x], dim=-1))))) * x[..., :1]


def test_gates_of_anybody() -> None:
    """Any module of two tensors: exact in both strategies, and the same gradient as the plain loop's."""
    model = language_model("coupled")
    for block in model.blocks:
        block.cell = CoupledCell(12, 5, first=Product(5, 12), second=Product(5, 12), magnitude=6).double()
    given = plain_inputs(model, 20)
    _, expected = gradients(model, "full", given, 64)
    for strategy in ("checkpoint", "reversible"):
        _, found = gradients(model, strategy, given, 8)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * float(other.abs().max()))


def test_a_gate_that_nobody_declared_is_refused_by_name() -> None:
    class Unknown(Product):
        pass

    model = language_model("coupled")
    model.blocks[1].cell = CoupledCell(12, 5, first=Unknown(5, 12)).double()
    with pytest.raises(StrategyError, match=r"Unknown at blocks\.1\.cell\.first .*position_wise"):
        gradients(model, "reversible", plain_inputs(model, 40), 8)


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_nothing_of_the_state_is_on_the_tape(chunk: int) -> None:
    """Prints and a fingerprint for each layer, whatever the width: 32 bytes as they are laid out, 48 at the top."""
    for width in (12, 96):
        model = language_model("coupled", torch.float32, width=width)
        result, _ = gradients(model, "reversible", plain_inputs(model, 24), chunk)
        assert result.report["tape_bytes"] == (24 // chunk - 2) * (32 + 48)


def test_the_state_is_exact_to_the_bit_where_plain_arithmetic_is_not() -> None:
    """What floating point loses by adding and subtracting again, integers do not."""
    torch.manual_seed(0)
    cell, x = CoupledCell(4, 2), torch.randn(1, 200, 4)
    start = torch.randn(1, 2, 2)
    s1, s2 = start[:, 0], start[:, 1]
    with torch.no_grad():
        for token in x.unbind(1):
            s1 = s1 + cell.first(s2, cell.first.share(token))
            s2 = s2 + cell.second(s1, cell.second.share(token))
        for token in x.flip(1).unbind(1):
            s2 = s2 - cell.second(s1, cell.second.share(token))
            s1 = s1 - cell.first(s2, cell.first.share(token))
    assert not torch.equal(torch.stack([s1, s2], dim=1), start)
    exact = cell.exact(cell.empty(1)._replace(memory=start))
    advanced = cell.advance(exact, x)
    assert advanced.remnant.tensors(advanced.remnant.size) == []
    before = cell.retreat(advanced.state, x, None, advanced.state.remnant([])).state
    assert torch.equal(before.memory.mantissa, exact.memory.mantissa)


def test_masked_rows_leave_their_states() -> None:
    model = language_model("coupled")
    given = masked_inputs(model)
    given.valid[0] = False
    result, _ = gradients(model, "reversible", given, 8)
    torch.testing.assert_close(result.state.memory[:, 0], given.state.memory[:, 0], rtol=0, atol=2.0**-39)
