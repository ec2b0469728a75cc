"""Leaves on the memory of a model's parameters, which stand for these in its modules.

Parameters may be computed: ``torch.func.functional_call`` gives a model what was made of other tensors, which may be
parameters of the same model. A gradient by such a one and by what it was made of, asked for at once, would go through
it: to what it was made of now, and there once more when the finished gradient is handed to autograd. Hooks of tensors
that keep their gradient (``retain_grad``) would hear both. A graph that begins with leaves ends there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from rwkv_rev.bptt.strategy import LossInputs


class StandIns:
    """Leaves in the places of those of ``tensors`` that were computed; of ``every`` one where that is asked for.

    Attributes:
        leaves: one for each of the tensors, in their order: those that were not computed stand for themselves.
    """

    def __init__(self, tensors: Sequence[Tensor], *, every: bool = False) -> None:
        self.leaves = [
            tensor.detach().requires_grad_(tensor.requires_grad) if every or not tensor.is_leaf else tensor
            for tensor in tensors
        ]
        pairs = zip(tensors, self.leaves, strict=True)
        self._by_id = {id(tensor): (tensor, leaf) for tensor, leaf in pairs if tensor is not leaf}

    def of_inputs(self, inputs: "LossInputs") -> "LossInputs":
        """The same batch, of which documents begin with leaves."""
        borders = inputs.borders
        if borders is None or not self._by_id:
            return inputs
        starts = tree_map(lambda value: self._by_id.get(id(value), (value, value))[1], borders.starts)
        return replace(inputs, borders=replace(borders, starts=starts))

    @contextmanager
    def within(self, model: Any) -> Iterator[None]:
        """Inside, the modules of ``model`` hold the leaves."""
        replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        modules: Iterator[nn.Module] = model.modules() if self._by_id else iter(())
        for module in modules:
            owned: dict[str, Any] = module._parameters
            replaced += [(owned, name, one) for name, one in owned.items() if id(one) in self._by_id]
        try:
            for owned, name, tensor in replaced:
                owned[name] = self._by_id[id(tensor)][1]
            yield
        finally:
            for owned, name, tensor in replaced:
                owned[name] = tensor
