"""Mixes and decays that would be others at each look, which a plan and the chunks take by themselves."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from rwkv_rev import random_state
from rwkv_rev.cells.as_written import is_as_written
from rwkv_rev.errors import StrategyError

if TYPE_CHECKING:
    from rwkv_rev.cells.shifted_cell import ShiftedCell


def refuse_changing(cell: "ShiftedCell", look: Callable[[], Sequence[Tensor]]) -> None:
    """Refuse a parametrization, or a method of others, that gives ``look()`` other numbers each time.

    Raises:
        StrategyError: if two looks differ, or one draws random numbers.
    """
    parametrized = parametrize.is_parametrized(cell)
    if not parametrized and is_as_written(cell):
        return
    devices = {parameter.device for parameter in cell.parameters()}
    generators = random_state.capture(devices)
    with torch.no_grad():
        looks = [look() for _ in range(2)]
    drawn = not random_state.capture(devices).same(generators)
    random_state.restore(generators)
    if drawn or not all(torch.equal(one, other) for one, other in zip(*looks, strict=True)):
        kind = type(cell).__bases__[0] if parametrized else type(cell)
        what = "a parametrization" if parametrized else "a method (log_decay, mixes) overridden or replaced"
        raise StrategyError(
            f"{what} of the {kind.__name__} of layer {cell.layer} gives other mixes or decays at each look (it draws "
            "random numbers, or counts), and chunks need them to stay as they are: use bptt='full'"
        )


def refuse_unplanned(cell: "ShiftedCell", log_decay: Tensor, planned: Tensor) -> None:
    """Refuse decays [H, N] in what ``project`` of others gave that are not those of the plan, float64.

    Asked of others alone: it waits for a device. Nothing is looked at while launches are recorded, which were run
    before.

    Raises:
        StrategyError: if they differ by more than a rounding.
    """
    if torch.compiler.is_compiling() or is_as_written(cell):
        return
    if log_decay.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    rounding = 4 * torch.finfo(log_decay.dtype).eps
    given = log_decay.detach().double()
    if given.shape != planned.shape or not torch.allclose(
        given, planned, rtol=rounding, atol=0, equal_nan=True
    ):
        raise StrategyError(
            f"project of the {type(cell).__name__} of layer {cell.layer} gives other decays than its log_decay, by "
            "which chunks are planned: override log_decay, to give the same at each look, or use bptt='full'"
        )
