"""DistributedDataParallel of a model whose graph it takes for static (``static_graph=True``).

In the first step it learns what is used, as soon as a gradient arrives at a tensor that it found in the output, and it
looks in PyTorch's trees of outputs (``torch.utils._pytree``). A state is a leaf there, on purpose: mixed precision of
FSDP casts the tensors of such trees, and a memory in 16 bits would be another. So the gradient of a loss of the state
alone would be each process's own, in every step and without a word.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rwkv_rev.errors import StrategyError


def refuse_lonely(states: Iterable[Tensor]) -> None:
    """Have a gradient of tensors of states refused where it is all that arrives in a static graph's first step."""
    active: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is None or not active.static_graph or _has_learned(active) or not torch.is_grad_enabled():
        return

    def look() -> None:
        if not _has_learned(active):
            raise StrategyError(
                "DistributedDataParallel(static_graph=True) finds no loss of a state, and would not average its "
                "gradient over the processes: add 0 * output.logits.sum() (of a model without head: "
                "0 * output.last_hidden_state.sum()) to the loss"
            )

    def arrived(_: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(look)

    for tensor in states:
        if tensor.requires_grad:
            tensor.register_hook(arrived)


def _has_learned(parallel: Any) -> bool:
    return bool(getattr(parallel, "_static_graph_delay_allreduce_enqueued", True))
