"""Official initialisation of a model's parts; that of a cell its architecture says (:mod:`rwkv_rev.architectures`).

Parts of somebody else's, such as the value head of a subclass, are initialised as transformers does: loading makes them
of memory that nobody has written to, and what nothing initialises would be whatever was there.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

_IN_CELLS: WeakSet[nn.Module] = WeakSet()
"""What cells that their architecture initialises were made with, themselves included."""

_NOT_BY_TRANSFORMERS = (nn.Bilinear, nn.EmbeddingBag, nn.PReLU, nn.RNNBase)
"""Layers that transformers' general initialisation leaves as they are, or most of them, though loading made them."""


def note_parts(cell: nn.Module, initialization: Mapping[type[nn.Module], Any]) -> None:
    """Note which modules of a new cell are initialised by the ``initialization`` of its architecture."""
    for module in cell.modules():
        if type(module) in initialization:
            _IN_CELLS.update(module.modules())


def initialize(module: nn.Module, model: Any, general: Callable[[nn.Module], None]) -> None:
    """Initialise what a module of ``model`` (a :class:`RwkvRevPreTrainedModel`) has itself, after its children.

    Args:
        general: transformers' own initialisation, for modules of somebody else's.
    """
    architecture = model.config.architecture
    if unstored := unstored_buffers(module):
        for layer, block in enumerate(getattr(model.base_model, "blocks", ())):
            for name in (name for _, name in block.names if getattr(block, name) is module):
                remake(unstored, lambda: architecture.cells(model.config, layer)[name])  # noqa: B023
    if (of_cell := architecture.initialization.get(type(module))) is not None:
        of_cell(module, model.config)
    elif isinstance(module, nn.ParameterList):
        for state in module:
            init.zeros_(state)
    elif isinstance(module, nn.Embedding) and _is_ours(module, model):
        init.uniform_(module.weight, a=-1e-4, b=1e-4)
    elif isinstance(module, nn.Linear) and module is getattr(model, "head", None):
        initialize_head(module)
    elif isinstance(module, nn.LayerNorm) or module not in _IN_CELLS:
        with init.guard_torch_init_functions():  # what was loaded stays
            if isinstance(module, _NOT_BY_TRANSFORMERS):
                module.reset_parameters()
            general(module)


def _is_ours(embedding: nn.Embedding, model: PreTrainedModel) -> bool:
    """Whether it is the model's own, or to become that (of another size), or in a cell: none beside these."""
    own = getattr(model.base_model, "embeddings", None)
    return (
        embedding in _IN_CELLS
        or (own is not None and any(part is embedding for part in own.modules()))
        or all(part is not embedding for part in model.modules())
    )


def unstored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that no file holds (``persistent=False``), by name."""
    stored = module.state_dict().keys() if any(True for _ in module.buffers()) else ()
    return {name: buffer for name, buffer in module.named_buffers() if name not in stored}


@torch.no_grad()
def remake(buffers: dict[str, Tensor], make: Callable[[], nn.Module]) -> None:
    """Give a cell's :func:`unstored_buffers` the values that its constructor gives them: loading leaves them unmade."""
    with torch.device("cpu"):  # loading constructs on the meta device
        made = dict(make().named_buffers())
    for name, buffer in buffers.items():
        buffer.copy_(made[name])


def initialize_head(head: nn.Linear) -> None:
    """The output head: orthogonal, half its natural size."""
    init.orthogonal_(head.weight, gain=0.5 * math.sqrt(max(1, head.out_features / head.in_features)))
