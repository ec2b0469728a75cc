"""What ``torch.export`` needs while it traces.

There is no data then to choose a way by, and the way that suits all is taken. The state comes out as a tuple of its
tensors: a class would have to be registered as a tree, by which sharding tools would then cast it to half precision.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rwkv_rev.state import ModelState


def exporting() -> bool:
    return torch.compiler.is_exporting()


def exportable(state: "ModelState") -> Any:
    """The state, while tracing the tuple of its tensors."""
    return tuple(state.tensors()) if exporting() else state
