"""Tensors that a chunk's loss depends on although the sweeps do not know them.

The gradient of the context is summed over the chunks for the model's parameters, the initial state and the input
embeddings. A tensor that requires a gradient and reaches the graph by another way (the closure of a hook, a plain
attribute of a module) would silently get none. A chunk's graph knows its leaves: they are looked at once per loss.

A tensor that was computed of parameters before a chunk and is used in several has one graph for all of them, which the
first gradient through it uses up. Nodes that were in the graph of an earlier chunk tell which parameters these were.

The layers of a chunk have graphs of their own, too, cut where one hands on to the next. A leaf that was made for one of
them has no gradient from another: a tensor that code of others keeps in one layer and reads in a later one.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from rwkv_rev.errors import StrategyError

_USED_UP = "backward through the graph a second time"
"""What PyTorch says of it."""
_WAY_OUT = {"the head": "bptt='full' and a loss of your own on the logits", "the final norm": "bptt='full'"}
_WAY_OUT_OF_LAYERS = (
    "bptt='full', or hand it on from block to block in what a hook returns (docs/python.md, 'Hooks')"
)
"""What works where a tensor is kept in one layer and read in another."""
_SEEN = "rwkv_rev"
"""Under this name a node's metadata have the look that found it."""


class Differentiated(NamedTuple):
    """What of a chunk has a graph of its own: a layer, or what is below and above the layers.

    Attributes:
        where: in words.
        outputs: what is computed.
        made: the leaves that were made for this graph.
    """

    where: str
    outputs: Iterable[Tensor]
    made: Iterable[Tensor]


class OutsideLeaves:
    """Looks for leaves other than ``known`` ones."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {id(tensor) for tensor in known}
        self._found: list[weakref.ref[Tensor]] = []
        self._made: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._in_chunks: set[int] = set()
        self._in_layers: set[int] = set()

    def look(self, *parts: Differentiated) -> None:
        """Note the unknown leaves of one chunk.

        Raises:
            StrategyError: for a leaf that was made for another of these graphs, naming both.
        """
        made = [(tensor, part.where) for part in parts for tensor in part.made]
        self._made = {id(tensor): (weakref.ref(tensor), where) for tensor, where in made}
        chunk = object()
        for number, part in enumerate(parts):
            leaves, nodes = _walk(_nodes(part.outputs))
            self.note(leaves, part.made, part.where)
            earlier, below = [], []
            for node in nodes:
                seen, where = node.metadata.setdefault(_SEEN, (chunk, number))
                if seen is not chunk:
                    earlier.append(node)
                elif where != number:
                    below.append(node)
            self._in_chunks.update(map(id, _walk(earlier)[0]))
            self._in_layers.update(map(id, _walk(below)[0]))

    def note(self, leaves: Iterable[Tensor], made: Iterable[Tensor], where: str) -> None:
        """The same for the leaves of one graph that were found already."""
        own = {id(tensor) for tensor in made}
        for leaf in leaves:
            if id(leaf) in self._known or id(leaf) in own:
                continue
            other, owner = self._made.get(id(leaf), (None, ""))
            if other is not None and other() is leaf:
                raise StrategyError(
                    f"{where} reads a tensor that was made of what {owner} is handed and kept there, and its gradient "
                    f"would not come back to there: use {_WAY_OUT.get(where, _WAY_OUT_OF_LAYERS)}"
                )
            self._found.append(weakref.ref(leaf))

    @contextmanager
    def naming(self, model: Any) -> Iterator[None]:
        """Says of what the graph was made that two chunks, or two layers of one, go through.

        Raises:
            StrategyError: in the place of PyTorch's error, naming parameters.
        """
        try:
            yield
        except RuntimeError as error:
            if _USED_UP not in str(error):
                raise
            # the first chunk that is differentiated finds what layers share
            shared = self._in_chunks or self._in_layers
            names = [name for name, parameter in model.named_parameters() if id(parameter) in shared]
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            where, why = "chunks or layers", "it was kept from an earlier call, or made before the loss"
            if self._in_chunks:
                where = "chunks"
            elif self._in_layers:
                where, why = "layers", "it was kept from the call of another, or made before the loss"
            raise StrategyError(
                f"a tensor made of {names[0] + more if names else 'trained weights'} is used in several {where}, and "
                f"its gradient can be taken once: {why}. Make it anew in each call of the module or hook that uses "
                "it, or use bptt='full'"
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
