"""Tensors that a chunk's loss depends on although the sweeps do not know them.

The gradient of the context is summed over the chunks for the model's parameters, the initial state and the input
embeddings. A tensor that requires a gradient and reaches the graph by another way (the closure of a hook, a plain
attribute of a module) would silently get none. A chunk's graph knows its leaves: they are looked at once per loss.
"""

import gc
import weakref
from collections.abc import Iterable

from torch import Tensor

from rwkv_rev.errors import StrategyError


class OutsideLeaves:
    """Looks for leaves other than ``known`` ones."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        known = list(known)
        self._known = {id(tensor) for tensor in known}
        self._computed = [tensor for tensor in known if not tensor.is_leaf]
        self._found: list[weakref.ref[Tensor]] = []

    def look(self, outputs: Iterable[Tensor], made: Iterable[Tensor] = ()) -> None:
        """Note the unknown leaves of ``outputs``; those in ``made`` were made for this graph."""
        self.note(leaves_of(outputs, self._computed), made)

    def note(self, leaves: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """The same for leaves that were found already."""
        known = self._known | {id(tensor) for tensor in made}
        for leaf in leaves:
            if id(leaf) not in known:
                self._found.append(weakref.ref(leaf))

    def refuse(self) -> None:
        """Refuse leaves that have outlived their graph; those made inside it are gone by now.

        Raises:
            StrategyError: naming the first one's shape.
        """
        if any(ref() is not None for ref in self._found):
            gc.collect()
        for ref in self._found:
            leaf = ref()
            if leaf is not None:
                raise StrategyError(
                    f"a tensor of shape {list(leaf.shape)} that requires a gradient takes part in the model but is "
                    "not among its parameters, so it would get none: register it as an nn.Parameter of one of the "
                    "model's modules (for a loss of your own: of model.model, which computes the hidden states)"
                )


def leaves_of(outputs: Iterable[Tensor], given: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaf tensors that ``outputs`` have a graph to; one of ``given`` is a leaf, however it was computed."""
    ends = {(tensor.grad_fn, tensor.output_nr): tensor for tensor in given if not tensor.is_leaf}
    seen = set()
    leaves = []
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for edge in node.next_functions:
            if edge in ends:
                leaves.append(ends[edge])
            elif edge[0] is not None:
                waiting.append(edge[0])
    return leaves
