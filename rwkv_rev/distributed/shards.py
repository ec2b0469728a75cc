"""Parameters of which each process keeps a part: DTensors, as FSDP2 makes them of a module's parameters.

None of PyTorch's modules for them is imported before there is one.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from rwkv_rev.errors import StrategyError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process keeps a part of a tensor alone."""
    return hasattr(tensor, "full_tensor")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether it does so of any of them."""
    return any(map(is_sharded, tensors))


def blocks_are_sharded(blocks: Iterable[nn.Module]) -> bool:
    """Whether it does so of the weights of any block, though they may be whole for now (``reshard_after_forward``)."""
    return in_a_group() and any(
        hasattr(block, "reshard") or any_sharded(block.parameters()) for block in blocks
    )


def reshard(blocks: Iterable[nn.Module]) -> None:
    """Back to this process's parts of what a forward pass has left whole."""
    for block in blocks if in_a_group() else ():
        if (found := getattr(block, "reshard", None)) is not None:
            cast(Any, found)()


def refuse_sharded(parameters: Iterable[Tensor], strategy: str) -> None:
    """Refuse sharded blocks, for what needs them whole.

    Raises:
        StrategyError: naming the strategy.
    """
    if any_sharded(parameters):
        raise StrategyError(
            f"the model's blocks are sharded, and {strategy!r} needs them whole: shard the model as one unit, "
            "fully_shard(model), or use bptt = 'reversible', 'checkpoint' or 'full'"
        )


def refuse_zero3(parameters: Iterable[Tensor]) -> None:
    """Refuse weights that DeepSpeed's third stage has taken away, as it does until its own hooks run.

    Raises:
        StrategyError: naming FSDP2.
    """
    if any(hasattr(parameter, "ds_tensor") for parameter in parameters):
        raise StrategyError(
            "DeepSpeed ZeRO-3 gathers weights once per forward pass, by its own hooks, and chunks need them more "
            "often: shard the model by FSDP2 (fully_shard for each block, then for the model), or use bptt = 'full'"
        )


def auto_as_others(strategy: str, blocks: Iterable[nn.Module]) -> str:
    """``reversible`` for ``auto`` where blocks are sharded: the choice must not hang on each process's own length."""
    return "reversible" if strategy == "auto" and blocks_are_sharded(blocks) else strategy


def in_a_group() -> bool:
    """Whether there can be shards at all: in generation this is asked for every token."""
    return dist.is_available() and dist.is_initialized()


def shared_with(parameter: Tensor) -> set[int]:
    """The processes that have parts of a parameter, replicas too; none where it is here whole."""
    return set(cast(Any, parameter).device_mesh.mesh.flatten().tolist()) if is_sharded(parameter) else set()


def in_units(model: Any) -> bool:
    """Whether FSDP2 shards the model, or a part of it."""
    return in_a_group() and any(hasattr(module, "unshard") for module in model.modules())


def placing(parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """Makes the gradient of ``parameter`` of this process's part of it; as it is where the parameter is here whole."""
    if not is_sharded(parameter):
        return _same
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return partial(
        DTensor.from_local,
        device_mesh=parameter.device_mesh,
        placements=parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _same(gradient: Tensor) -> Tensor:
    return gradient
