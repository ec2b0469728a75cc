"""The first sweep: exact states forward, and what is needed to come back onto the tape."""

from itertools import islice
from typing import TYPE_CHECKING

import torch

from rwkv_rev import random_state
from rwkv_rev.cells.block import ExactStates

if TYPE_CHECKING:
    from rwkv_rev.bptt.runner import Runner
    from rwkv_rev.bptt.sweep import Sweep


@torch.no_grad()
def forward_sweep(sweep: "Sweep", runner: "Runner") -> list[ExactStates]:
    """Exact states before the last chunk; fills the tape."""
    states = sweep.first
    sweep.whole_output = bool(sweep.strangers.declared)  # a hook hears the top layer too
    sweep.random.append(random_state.capture(sweep.places))
    for chunk in islice(sweep.chunks, len(sweep.chunks) - 1):
        states = runner.advance(chunk, states)
        now, before = random_state.capture(sweep.places), sweep.random[-1]
        unchanged = now.same(before)
        sweep.random.append(before if unchanged else now)  # one copy where nothing is drawn
        if chunk.index == 0:
            # the top layer's output is needed only to draw there what the second sweep will draw
            sweep.whole_output = sweep.whole_output or not unchanged
    if sweep.sharded is not None:
        sweep.sharded.wait_forwards()
    states = runner.turn(states)
    sweep.refuse_others(states)
    return states
