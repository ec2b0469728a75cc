"""States of the random generators, so that what is computed a second time draws the same numbers.

Any module may draw (dropout, noise on embeddings, adapters that leave out ranks), in training or not: the states are
therefore captured around every chunk, whatever the model is made of. That takes some 0.1 ms of host time per chunk.
Generators that a user's code holds for itself cannot be known; what they do is found by comparing the two sweeps.
"""

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import shortened

MOST_SEED = (1 << 63) - 1


class GeneratorStates(NamedTuple):
    """States of PyTorch's generators of the CPU and of some devices, of Python's, and of numpy's global one."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    python: Any
    numpy: Any

    def same(self, other: "GeneratorStates") -> bool:
        """Whether nothing was drawn between the two."""
        ours, theirs = ([states.cpu, *(s for _, s in states.devices)] for states in (self, other))
        return (
            all(torch.equal(one, another) for one, another in zip(ours, theirs, strict=True))
            and self.python == other.python
            and _same(self.numpy, other.numpy)
        )


def refuse_seed(seed: int | None) -> None:
    """Raises ConfigError for a seed that some machine would not take; None is no seed."""
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed = {shortened(repr(seed))} must be from 0 to {MOST_SEED}")


def capture(devices: Iterable[torch.device]) -> GeneratorStates:
    """The states now; of ``devices`` only those that have a generator of their own count."""
    own = sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)
    return GeneratorStates(
        torch.get_rng_state(),
        tuple((device, _state(device)) for device in own),
        random.getstate(),
        np.random.get_state(legacy=False),  # whatever bit generator stands behind it
    )


def restore(states: GeneratorStates) -> None:
    """Set the generators back to what :func:`capture` saw."""
    torch.set_rng_state(states.cpu)
    for device, state in states.devices:
        module = torch.get_device_module(device)
        module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)
    random.setstate(states.python)
    np.random.set_state(states.numpy)


def _same(one: Any, another: Any) -> bool:
    """Whether two states of numpy's generator are the same: dictionaries of arrays and numbers, by their kind."""
    if isinstance(one, dict):
        return one.keys() == another.keys() and all(_same(one[name], another[name]) for name in one)
    return bool(np.array_equal(one, another))


def _state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
