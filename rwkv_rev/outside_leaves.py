"""Tensors that a chunk's loss depends on although the sweeps do not know them.

The gradient of the context is summed over the chunks for the model's parameters, the initial state and the input
embeddings. A tensor that requires a gradient and reaches the graph by another way (the closure of a hook, a plain
attribute of a module) would silently get none. A chunk's graph knows its leaves: they are looked at once per loss.

A tensor that was computed of parameters before a chunk and is used in several has one graph for all of them, which the
first gradient through it uses up. Nodes that were in the graph of an earlier chunk tell which parameters these were.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rwkv_rev.errors import StrategyError

_USED_UP = "backward through the graph a second time"
"""What PyTorch says of it."""
_SEEN = "rwkv_rev"
"""Under this name a node's metadata have the look that found it."""


class OutsideLeaves:
    """Looks for leaves other than ``known`` ones."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {id(tensor) for tensor in known}
        self._found: list[weakref.ref[Tensor]] = []
        self._shared: set[int] = set()

    def look(self, outputs: Iterable[Tensor], made: Iterable[Tensor] = ()) -> None:
        """Note the unknown leaves of ``outputs``, of one chunk; those in ``made`` were made for this graph."""
        leaves, nodes = _walk(_nodes(outputs))
        self.note(leaves, made)
        this = object()
        shared = [node for node in nodes if node.metadata.setdefault(_SEEN, this) is not this]
        self._shared.update(map(id, _walk(shared)[0]))

    def note(self, leaves: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """The same for leaves that were found already."""
        known = self._known | {id(tensor) for tensor in made}
        for leaf in leaves:
            if id(leaf) not in known:
                self._found.append(weakref.ref(leaf))

    @contextmanager
    def naming(self, model: Any) -> Iterator[None]:
        """Says of what the graph was made that two chunks go through.

        Raises:
            StrategyError: in the place of PyTorch's error, naming parameters.
        """
        try:
            yield
        except RuntimeError as error:
            if _USED_UP not in str(error):
                raise
            names = [name for name, parameter in model.named_parameters() if id(parameter) in self._shared]
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise StrategyError(
                f"a tensor made of {names[0] + more if names else 'trained weights'} is used in several chunks, and "
                "its gradient can be taken once: it was kept from an earlier call, or made before the loss. Make it "
                "anew in each call of the module or hook that uses it, or use bptt='full'"
            ) from error

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
                if isinstance(leaf, nn.Parameter):
                    raise StrategyError(
                        f"an nn.Parameter of shape {list(leaf.shape)} takes part in the model but is registered in "
                        "none of its modules, so it would get no gradient: register it in one (for a loss of your own: "
                        "of model.model, which computes the hidden states) and make what is computed of it anew in "
                        "each call that uses it, or use bptt='full'"
                    )
                raise StrategyError(
                    f"a tensor of shape {list(leaf.shape)} that requires a gradient takes part in the model but is "
                    "not among its parameters, so it would get none: register it as an nn.Parameter of one of the "
                    "model's modules (for a loss of your own: of model.model, which computes the hidden states)"
                )


def leaves_of(outputs: Iterable[Tensor], given: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaf tensors that ``outputs`` have a graph to; one of ``given`` is a leaf, however it was computed."""
    return _walk(_nodes(outputs), given)[0]


def _nodes(outputs: Iterable[Tensor]) -> list[Any]:
    return [output.grad_fn for output in outputs if output.grad_fn is not None]


def _walk(waiting: list[Any], given: Iterable[Tensor] = ()) -> tuple[list[Tensor], list[Any]]:
    """Leaves below some nodes, as of :func:`leaves_of`, and the nodes from these to those."""
    ends = {(tensor.grad_fn, tensor.output_nr): tensor for tensor in given if not tensor.is_leaf}
    seen = set()
    leaves, nodes = [], []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        else:
            nodes.append(node)
        for edge in node.next_functions:
            if edge in ends:
                leaves.append(ends[edge])
            elif edge[0] is not None:
                waiting.append(edge[0])
    return leaves, nodes
