"""Cells of one's own that are stepped a token at a time and break a rule: refused by name, before anything is wrong."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from token_cases import LanguageModel, gradients, plain_inputs
from torch import Tensor, nn

from rwkv_rev import position_wise
from rwkv_rev.cells.coupled import CoupledCell
from rwkv_rev.cells.token_cell import Token, TokenCell, Update
from rwkv_rev.cells.token_rules import refuse_broken_rules
from rwkv_rev.errors import StrategyError


class Pair(TokenCell):
    """Three parts: the first half is one, the second is two, of which the latter reads the former."""

    halves = ((0,), (1, 2))

    def __init__(self, width: int, size: int = 5) -> None:
        super().__init__(size, 4)
        self.input, self.output = nn.Linear(width, 2 * size), nn.Linear(3 * size, width)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.input(x).chunk(2, dim=-1)

    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> Any:
        return token[half] + (parts[0] if half else parts[1] - parts[2])

    def update(self, part: int, gates: Any, parts: Sequence[Tensor]) -> Update:
        return torch.sigmoid(gates), torch.tanh(gates + (parts[1] if part == 2 else 1))

    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        return self.output(parts.flatten(2))


class Shifting(Pair):
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().project(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))


class Summing(Pair):
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().project(x.cumsum(1))


class Centred(Pair):
    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        found = super().read(parts, x)
        return found - found.mean(1, keepdim=True)


class Ahead(Pair):
    def read(self, parts: Tensor, x: Tensor) -> Tensor:
        return super().read(parts.flip(1), x)


class OwnHalf(Pair):
    def gates(self, half: int, token: Token, parts: Sequence[Tensor]) -> Any:
        return super().gates(half, token, parts) + parts[1]


class OwnPart(Pair):
    def update(self, part: int, gates: Any, parts: Sequence[Tensor]) -> Update:
        decay, change = super().update(part, gates, parts)
        return decay, change + 0.1 * parts[part]


class Later(Pair):
    def update(self, part: int, gates: Any, parts: Sequence[Tensor]) -> Update:
        decay, change = super().update(part, gates, parts)
        return decay, change + (parts[2] if part == 1 else 0)


MIXES = "mixes tokens, and a text is cut into chunks"
UNKNOWN = "the step of part 1 depends on a part that is not known on the way back"


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (Shifting, f"`project` {MIXES}"),
        (Summing, f"`project` {MIXES}"),
        (Centred, f"`read` {MIXES}"),
        (Ahead, f"`read` {MIXES}"),
        (OwnHalf, UNKNOWN),
        (OwnPart, UNKNOWN.replace("part 1", "part 0")),
        (Later, UNKNOWN),
    ],
)
def test_refused_by_name(cell: type[Pair], words: str, strategy: str) -> None:
    model = LanguageModel(cell).double().train()
    with pytest.raises(StrategyError, match=rf"layer 0 \({cell.__name__}\): {words}"):
        gradients(model, strategy, plain_inputs(model, 21), 8)


def test_a_cell_that_keeps_them_is_as_it_was() -> None:
    """Its gradient is that of the whole context; buffers and generators are untouched, and it is looked at once."""

    class Noting(Pair):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("mean", torch.zeros(width))

        def project(self, x: Tensor) -> tuple[Tensor, ...]:
            self.mean.copy_(x.mean((0, 1)))
            return super().project(nn.functional.dropout(x, 0.5))

    cell = Noting(12)
    before = torch.get_rng_state()
    refuse_broken_rules(cell, torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0)))
    assert not cell.mean.any() and torch.equal(torch.get_rng_state(), before)
    model = LanguageModel(Pair).double().train()
    _, expected = gradients(model, "full", plain_inputs(model, 21), 64)
    for strategy in ("reversible", "checkpoint"):
        _, found = gradients(model, strategy, plain_inputs(model, 21), 8)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert all(block.cell._keeps_rules for block in model.blocks)


def test_nobody_who_looks_on_sees_nan() -> None:
    model = LanguageModel(CoupledCell).double().train()
    seen: list[Tensor] = []
    with torch.no_grad():
        block = model.blocks[0].cell
        block.first.of_input.register_forward_hook(position_wise(lambda _, __, out: seen.append(out)))
    gradients(model, "reversible", plain_inputs(model, 21), 8)
    assert seen and all(bool(out.isfinite().all()) for out in seen)


def test_code_that_refuses_nan_is_not_taken_for_broken() -> None:
    class Careful(Pair):
        def read(self, parts: Tensor, x: Tensor) -> Tensor:
            assert x.isfinite().all(), "the model has diverged"
            return super().read(parts, x)

    model = LanguageModel(Careful).double().train()
    gradients(model, "reversible", plain_inputs(model, 21), 8)
