"""Every cell that is stepped a token at a time: the laws, gradients of every strategy, tape, refusals."""

import copy

import pytest
import torch
from bptt_cases import relative_error
from cell_laws import LAWS, Trial
from hypothesis import given
from token_cases import (
    CELLS,
    PROPERTIES,
    gradients,
    language_model,
    masked_inputs,
    plain_inputs,
    token_trials,
)
from torch import Tensor, nn

from rwkv_rev.cells.coupled import CoupledCell
from rwkv_rev.cells.token_cell import TokenCell
from rwkv_rev.errors import ReversalMismatchError, StrategyError
from rwkv_rev.reversal.stepped import GridOverflowError, Stepped

KINDS = ("coupled", "gru", "lstm")
CHUNK = 8
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of gradients against those of the plain loop in float64, relative RMS per tensor."""


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", CELLS)
def test_laws(kind: str, law: str) -> None:
    @PROPERTIES
    @given(token_trials(kind))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_loop_in_float64(kind: str, strategy: str, chunk: int) -> None:
    wide = language_model(kind)
    _, expected = gradients(wide, "full", masked_inputs(wide), 64)
    for dtype, tolerance in TOLERANCES.items():
        model = copy.deepcopy(wide).to(dtype)
        _, found = gradients(model, strategy, masked_inputs(model), chunk)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= tolerance
