"""Activation checkpointing that computes the same numbers again, or says that it did not.

``torch.utils.checkpoint`` sets back PyTorch's generators alone, compares shapes alone, and stops a recomputation as
soon as it has what it needs. Here Python's and numpy's generators are set back, too, and what comes out is compared.
"""

import contextvars
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from rwkv_rev import random_state
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.reversal.fingerprint import checksum


def checkpointed(checkpoint: Callable[..., Any], function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)``, of which ``checkpoint`` (PyTorch's, or one like it) keeps ``given`` alone.

    Raises:
        ReversalMismatchError: at the end of the backward pass, if the function gave something else there.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(_Repeated(function), *given)


class _Repeated:
    """The function, whose second call and later ones must do what the first did."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._context = contextvars.copy_context()  # autograd's thread of a device has another
        self._generators = random_state.capture(())  # a device's own is set back by PyTorch
        self._print: Tensor | None = None

    def __call__(self, *given: Any) -> Any:
        if self._print is None:
            result = self._function(*given)
            self._print = _checksums(result)
            return result
        now = random_state.capture(())
        random_state.restore(self._generators)
        try:
            result = self._context.copy().run(self._function, *given)
        finally:
            random_state.restore(now)
        same = (_checksums(result) == self._print).all()
        # at the end: no layer waits for the device
        Variable._execution_engine.queue_callback(partial(_refuse, same))
        return result


def _checksums(result: Any) -> Tensor:
    return torch.stack([checksum(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])


def _refuse(same: Tensor) -> None:
    if not bool(same):
        raise ReversalMismatchError(
            "a layer computed other numbers when activation checkpointing called it again: code inside the model gives "
            "another result at each call (it draws from a generator of its own, or counts calls), or a kernel is not "
            "deterministic. The gradients of this backward pass are wrong: drop them (zero_grad), and train without "
            "gradient checkpointing"
        )
