"""What belongs to the whole process or to a model, and is changed while a loss is computed: in one thread at a time.

All backward passes on a GPU run in one thread of autograd's, whoever asks for them. A loss that waits there for its
turn keeps that thread from whoever has the turn, and may need it: nobody waits there for ever.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rwkv_rev.autograd.thread_notes import note, noted
from rwkv_rev.errors import StrategyError

_lock = threading.RLock()
_OWNER = "rwkv_rev.autograd.one_thread"
"""Under this name a thread has whose turn it works in. Autograd's own threads have it from who asks for a gradient."""
_GRAD, _BACKWARD = torch.autograd.grad.__code__, torch.autograd.backward.__code__
_LOOK = 0.05
PATIENCE = 1.0
"""Seconds for which the other loss must wait for autograd without a break; it might be about to return."""


class _Owner:
    def __init__(self) -> None:
        self.thread = threading.get_ident()


_owners: list[_Owner] = []
"""Of the one thread whose turn it is, the innermost last."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Held for the length of a loss's sweeps. Losses inside of one are computed in its turn.

    Raises:
        StrategyError: in autograd's thread of a device, for which the loss whose turn it is waits.
    """
    before = noted(_OWNER)
    if before in _owners:
        yield
        return
    device = autograds_device()
    with _lock if device is None else _unless_waited_for(device):
        mine = _Owner()
        try:
            _owners.append(mine)
            note(_OWNER, mine)
            yield
        finally:
            note(_OWNER, before)
            if mine in _owners:
                _owners.remove(mine)


def autograds_device() -> torch.device | None:
    """The device whose backward passes autograd runs in this thread; None in a thread of the caller's."""
    if torch._C._current_graph_task_id() == -1 or not torch.cuda.is_initialized():
        return None
    if not isinstance(threading.current_thread(), threading._DummyThread):
        return None
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _unless_waited_for(device: torch.device) -> Iterator[None]:
    since = None
    while not _lock.acquire(timeout=_LOOK):
        if not _is_waited_for(device):
            since = None
            continue
        since = time.monotonic() if since is None else since
        if time.monotonic() - since > PATIENCE:
            raise StrategyError(
                "another thread computes a loss meanwhile, and on a GPU the two would wait for each other: "
                "hold a lock of your own from each forward pass to its gradient, or compute all losses in one thread"
            )
    try:
        yield
    finally:
        _lock.release()


def _is_waited_for(device: torch.device) -> bool:
    """Whether the thread whose turn it is waits for a gradient that is computed in autograd's thread of ``device``."""
    frame: FrameType | None = None
    for owner in _owners[-1:]:
        frame = sys._current_frames().get(owner.thread)
    while frame is not None:
        if frame.f_code is _BACKWARD:
            return True
        if frame.f_code is _GRAD:
            tensors = tree_leaves([frame.f_locals.get("outputs"), frame.f_locals.get("inputs")])
            if not all(isinstance(one, Tensor) and one.device != device for one in tensors):
                return True
        frame = frame.f_back
    return False
