"""How far plain division drifts: why an exact reversal needs remnants.

    forwards  s <- w s + u,      backwards  s <- (s - u) / w

in one floating-point format, one token at a time, with known u: the recurrence that RWKV-4 and RWKV-5 share, element
by element, and the literal recipe of a reversible timestep cell. Each step back multiplies the errors made so far by
1/w, so that after n steps ``n log2(1/w)`` bits of the format are noise. The updates here are standard normal numbers
from a fixed seed, the same for every decay: the drift is a matter of the decay and the format, not of the text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 8
"""Independent states of each decay; their root mean square is reported."""


def division_drift(log_decay: Tensor, steps: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Relative error of states rebuilt by division.

    Args:
        log_decay: any shape, natural logarithm of the decay per token, at most 0.
        steps: how many tokens back, ascending.
        dtype: the format in which both directions compute.

    Returns:
        [len(steps), *log_decay.shape] float64: rms(rebuilt - state) / rms(state), infinite where nothing finite came
        back.
    """
    decay = torch.exp(log_decay.detach().double().cpu()).to(dtype).flatten()[:, None]  # [R, 1]
    length = max(steps)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(length + 1, COLUMNS, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    *updates, first = drawn.unbind()
    state = first.expand(len(decay), COLUMNS)
    wanted = {length - back for back in steps}
    kept = {}
    for step, update in enumerate(updates):
        if step in wanted:
            kept[step] = state
        state = decay * state + update
    errors = {}
    for step in reversed(range(length)):
        state = (state - updates[step]) / decay
        if step in wanted:
            errors[step] = _relative(state.double(), kept[step].double())
    return torch.stack([errors[length - back] for back in steps]).view(len(steps), *log_decay.shape)


def _relative(rebuilt: Tensor, state: Tensor) -> Tensor:
    """Per row, rms of the difference over rms of the state."""
    error = (rebuilt - state).norm(dim=1) / state.norm(dim=1)
    return torch.where(torch.isfinite(error), error, torch.inf)
