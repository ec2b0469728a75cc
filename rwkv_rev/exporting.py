"""What ``torch.export`` needs while it traces.

There is no data then to choose a way by, and the way that suits all is taken. The state comes out as a tuple of its
tensors: a class would have to be registered as a tree, by which sharding tools would then cast it to half precision.
"""

from typing import TYPE_CHECKING, Any

import torch

from rwkv_rev.errors import StrategyError

if TYPE_CHECKING:
    from rwkv_rev.state import ModelState


def exporting() -> bool:
    return torch.compiler.is_exporting()


def refuse_tracing(loss: bool = False) -> None:
    """Refuse what no graph of one call can hold: a gradient by two sweeps, a loss, and sizes that are tensors.

    Args:
        loss: whether one is asked for.

    Raises:
        StrategyError: while ``torch.jit.trace`` runs, and while ``torch.export`` does with gradients or a loss.
    """
    if torch.jit.is_tracing():
        raise StrategyError(
            "torch.jit.trace cannot follow this model: use torch.export.export, in torch.no_grad()"
        )
    if exporting() and (loss or torch.is_grad_enabled()):
        raise StrategyError(
            "torch.export takes the logits of this model, without gradients: export in torch.no_grad(), without labels"
        )


def exportable(state: "ModelState") -> Any:
    """The state, while tracing the tuple of its tensors."""
    return tuple(state.tensors()) if exporting() else state
