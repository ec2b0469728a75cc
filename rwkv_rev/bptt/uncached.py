"""A loss's sweeps without the caches of weights that autocast and parametrizations keep, in one thread at a time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.utils import parametrize

from rwkv_rev.autograd.one_thread import one_thread


@contextmanager
def uncached(device: torch.device) -> Iterator[None]:
    """The caller's autocast and parametrizations without their caches, in one thread at a time.

    Weights made in a sweep without graph must not be reused in one with graph, where they would get no gradient. Those
    caches, and the random generators, belong to the process: another thread's loss waits.
    """
    with one_thread(), _without_caches(device):
        yield


@contextmanager
def _without_caches(device: torch.device) -> Iterator[None]:
    kept = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        with _uncached_autocast(device):
            yield
    finally:
        parametrize._cache_enabled, parametrize._cache = kept


def _uncached_autocast(device: torch.device) -> AbstractContextManager:
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)
