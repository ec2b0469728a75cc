"""Hooks on tensors are kept from the parts that a gradient is computed from, and hear the finished gradient alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from rwkv_rev.autograd.one_thread import one_thread
from rwkv_rev.autograd.thread_notes import note, noted

_WITHHELD = "rwkv_rev.hooks_withheld"
"""Under this name a thread says so. Autograd's own threads have it from the one that asks for a gradient."""


@contextmanager
def hooks_withheld(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep hooks of ``tensors`` from being called by ``torch.autograd.grad``, which would apply them twice over.

    The hooks belong to the tensors, and another thread may take a gradient by these meanwhile: that calls them.
    """
    if not any(tensor._backward_hooks for tensor in tensors):
        yield
        return
    with one_thread():
        hooked = [(hooks, list(hooks.items())) for tensor in tensors if (hooks := tensor._backward_hooks)]
        replaced = [(hooks, key, hook, partial(_heard, hook)) for hooks, each in hooked for key, hook in each]
        before = _is_withheld()
        try:
            note(_WITHHELD, True)
            for hooks, key, _, now in replaced:
                hooks[key] = now
            yield
        finally:
            note(_WITHHELD, before)
            for hooks, key, hook, now in replaced:
                if hooks.get(key) is now:  # else it has been taken off
                    hooks[key] = hook


def _heard(hook: Callable[[Tensor], Any], gradient: Tensor) -> Any:
    return None if _is_withheld() else hook(gradient)


def _is_withheld() -> bool:
    return bool(noted(_WITHHELD))
