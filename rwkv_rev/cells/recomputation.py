"""Computing again instead of keeping: cheap results that a product has read, and whole blocks.

:func:`not_kept` spares what elementwise formulas gave and a linear map reads: mixes of two tokens, squares. They are
some ten of the thirty vectors that a token and layer would keep, and one launch gives them again.

Activation checkpointing (:func:`checkpointed`) computes the same numbers again, or says that it did not.

``torch.utils.checkpoint`` sets back PyTorch's generators alone, compares shapes alone, and stops a recomputation as
soon as it has what it needs. Here Python's and numpy's generators are set back, too, and what comes out is compared.
"""

import contextvars
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from rwkv_rev.wkv.dispatch import choose_kernel

DEVICES = ("cuda",)
"""Where computing again costs less than memory is worth: on a CPU new memory is what an elementwise formula costs."""


_CAST = "ToCopyBackward0"
_VIEWS = frozenset({"ReshapeAliasBackward0", "UnsafeViewBackward0", "ViewBackward0"})


def not_kept(results: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> AbstractContextManager[None]:
    """Inside, autograd keeps none of ``results``, nor what autocast makes of them for a linear map.

    Where the backward pass wants one, ``make()`` gives them again.

    Args:
        results: what is read inside.
        make: gives the same bits, from tensors that are kept anyway; called without graph.

    Elsewhere than on :data:`DEVICES`, without the kernels that do it in one launch, and where somebody else says what
    autograd keeps (``saved_tensors_hooks``, as activation checkpointing does), nothing is done.
    """
    wanted = torch.is_grad_enabled() and results[0].device.type in DEVICES
    if not wanted or _others_pack():
        return nullcontext()
    if results[0].device.type == "cuda" and choose_kernel(None, results[0]) != "triton":
        return nullcontext()
    again = _MadeAgain(results, make)
    return torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack)


def _others_pack() -> bool:
    """Whether hooks of somebody else say what autograd keeps, or PyTorch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return True
    hooks = top(True)
    return hooks is not None and not isinstance(getattr(hooks[0], "__self__", None), _MadeAgain)


class _MadeAgain:
    """What stands in a graph for results that are made again."""

    def __init__(self, results: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> None:
        self._places = {tensor.data_ptr(): index for index, tensor in enumerate(results)}
        self._nodes = {(tensor.grad_fn, tensor.output_nr): index for index, tensor in enumerate(results)}
        self._nodes.pop((None, 0), None)
        self._looks = [_look(tensor) for tensor in results]
        self._make = make
        self._made: list[Tensor] = []
        self._given_out = self._kept = 0

    def pack(self, tensor: Tensor) -> Any:
        index = self._places.get(tensor.data_ptr())
        # one that was written to since is another than what can be made again
        if index is None or self._looks[index] != _look(tensor):
            index = self._cast_of(tensor)
            if index is None:
                # one that a function gave, kept by that function as it is, would be a circle, which nobody frees
                return tensor.detach(), tensor._version
        self._kept += 1
        return index, (tensor.dtype, tensor.shape)

    def _cast_of(self, tensor: Tensor) -> int | None:
        """The result that autocast has made ``tensor`` of for a linear map, if it is nothing more than that."""
        node = tensor.grad_fn
        while node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
        if node is None or node.name() != _CAST:
            return None
        index = self._nodes.get(node.next_functions[0])
        if index is None or (tensor.numel(), tensor._version) != (self._looks[index][0], 0):
            return None
        return index if tensor.is_contiguous() else None

    def unpack(self, packed: Any) -> Tensor:
        what, how = packed
        if isinstance(what, Tensor):
            if what._version != how:  # which PyTorch leaves to whoever packs
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{list(what.shape)}, expected version {how} but it is at {what._version}"
                )
            return what
        if not self._made:
            with torch.no_grad():
                self._made = list(self._make())
        dtype, shape = how
        result = self._made[what].to(dtype).view(shape)
        self._given_out += 1
        if self._given_out == self._kept:  # nobody will ask again, unless the graph is kept
            self._made, self._given_out = [], 0
        return result


def _look(tensor: Tensor) -> tuple[int, torch.dtype, int, bool]:
    return tensor.numel(), tensor.dtype, tensor._version, tensor.is_contiguous()


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
