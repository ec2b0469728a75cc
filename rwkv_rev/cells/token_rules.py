"""What a :class:`~rwkv_rev.cells.token_cell.TokenCell` must keep to, looked at once: NaN shows what depends on what.

Chunks cut a text anywhere, and the way back knows the input, the other half of the state and those parts of a half that
were updated before. So an input that is NaN at one token may make NaN of that token alone, and a part that is NaN and
not known on the way back, of nothing. What hides NaN (a comparison, ``nan_to_num``) is not seen.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.cells.contract import residual
from rwkv_rev.cells.token_checks import Token, output_of, projected, updated
from rwkv_rev.errors import StrategyError

if TYPE_CHECKING:
    from rwkv_rev.cells.token_cell import TokenCell

TOKENS = 4


@torch.no_grad()
def refuse_broken_rules(cell: "TokenCell", x: Tensor) -> None:
    """Look at a cell whose inputs are like x [B, C, D]; nothing is drawn and no buffer is changed.

    Raises:
        StrategyError: if tokens are mixed, or a step depends on what the way back does not know.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in cell.modules()):
        return  # somebody looks on, and would see NaN
    generators = random_state.capture({x.device})
    buffers = {buffer: buffer.clone() for buffer in cell.buffers()}
    try:
        broken = _broken(cell, x)
        if broken is not None:
            raise StrategyError(f"layer {cell.layer} ({type(cell).__name__}): {broken}; or use bptt='full'")
    finally:
        for buffer, before in buffers.items():
            buffer.copy_(before)
        random_state.restore(generators)


def _broken(cell: "TokenCell", x: Tensor) -> str | None:
    """The first rule that is broken, and what to do."""
    steps = torch.arange(1, TOKENS + 1, device=x.device, dtype=x.dtype)[:, None] / TOKENS
    example = (steps * torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype))[None]
    inputs = projected(cell, cell.project(example), example)
    memory = x.new_zeros(1, TOKENS, cell.number_of_parts, cell.size)
    for name, call in (
        ("project", lambda x, _: [part.flatten(2).sum(2) for part in projected(cell, cell.project(x), x)]),
        ("read", lambda x, parts: [residual(output_of(cell, cell.read(parts, x), x)).sum(2)]),
    ):
        if _mixes(call, example, memory):
            return (
                f"`{name}` mixes tokens, and a text is cut into chunks between any two: let each token's output depend "
                "on that token alone, and keep what goes on from token to token in the state"
            )
    token = tuple(part[:, 0] for part in inputs)
    for half, own in enumerate(cell.halves):
        known = [memory[:, 0, part] for part in range(cell.number_of_parts)]
        blind = [torch.full_like(one, torch.nan) if part in own else one for part, one in enumerate(known)]
        for part in own:
            step = partial(_update, cell, half, part, token)
            if _finite(step, known) and not _finite(step, blind):
                return (
                    f"the step of part {part} depends on a part that is not known on the way back: `gates` may read "
                    f"parts of the other half alone, and `update` also those of {own} before {part}"
                )
            blind[part] = known[part]
    return None


def _mixes(call: Callable[..., list[Tensor]], x: Tensor, parts: Tensor) -> bool:
    """Whether NaN at one token, in input and parts, makes others NaN."""

    def of_others(token: int) -> list[Tensor]:
        at = torch.arange(TOKENS, device=x.device) == token
        nan = torch.tensor(torch.nan, dtype=x.dtype, device=x.device)
        found = call(torch.where(at[:, None], nan, x), torch.where(at[:, None, None], nan, parts))
        return [out[:, ~at] for out in found]

    return _finite(call, x, parts) and not all(_finite(of_others, token) for token in range(TOKENS))


def _update(cell: "TokenCell", half: int, part: int, token: Token, parts: list[Tensor]) -> list[Tensor]:
    parts = parts.copy()  # what is put in its place stays here
    found = updated(cell, cell.update(part, cell.gates(half, token, parts), parts), parts[part])
    return [one for one in found if one is not None]


def _finite(call: Callable[..., list[Tensor]], *given: Any) -> bool:
    """Whether all that is computed is finite; so is what cannot be computed, from NaN that somebody refuses."""
    try:
        found = call(*given)
    except Exception:
        return True
    return all(bool(one.isfinite().all()) for one in found)
