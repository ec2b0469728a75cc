"""A model whose weights are spread over the processes block by block (FSDP2), in a run: trained, saved, put together.

Each process keeps a part of every weight, of its gradient and of the optimizer's state; the sweeps gather a block's
weights where they need them (:mod:`rwkv_rev.distributed.sharded_blocks`). Checkpoints and the output are those of one
process: tensors are gathered one after another, and the first process keeps them in host memory while it writes. So a
run goes on with any number of processes, sharded or not; of a checkpoint each process reads its own rows alone.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from rwkv_rev.distributed.shards import is_sharded, placing, reshard

_APART = "rwkv_rev_apart"


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Spread a model over all processes, in place and onto their devices; its blocks one by one, the rest together."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    setattr(model, _APART, lambda function: function())
    register_fsdp_forward_method(model, _APART)


def apart(model: Any, function: Callable[[], Any]) -> Any:
    """What a function gives that calls parts of a model, with all that is outside of the blocks whole meanwhile.

    Where the model is sharded each process must call this, and the parts as often.
    """
    return getattr(model, _APART, lambda function: function())(function)


class Sharded(nn.Module):
    """A sharded model as the trainer calls it: a wrapper, which accelerate does not wrap again.

    Args:
        module: the model.
        arithmetic: the autocast of each forward pass.
    """

    def __init__(self, module: nn.Module, arithmetic: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.module = module
        self.arithmetic = arithmetic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.arithmetic():
            return self.module(*args, **kwargs)


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """This process's parts of what is trained, by name."""
    reshard(model.modules())  # what an evaluation has left whole
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor in host memory, in the first process; every process must call this."""
    found: Any = tensor.detach()
    found = found.full_tensor() if is_sharded(found) else found.clone()
    return found.cpu().contiguous() if dist.get_rank() == 0 else None


def whole_weights(model: Any) -> dict[str, Tensor]:
    """What is trained, whole, in the first process (else empty); every process must call this."""
    found = {name: whole(parameter) for name, parameter in trained_parameters(model).items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def whole_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state as of one process, in the first (else without tensors); every process must call this."""
    state = optimizer.state_dict()
    found = {
        index: {name: whole(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": found if dist.get_rank() == 0 else {}}


def take_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Load what :func:`whole_state` gave, or one process's optimizer: this process's part of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: _own(value, parameters[index]) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def take_weights(model: Any, folder: Path) -> None:
    """Load what is trained from a checkpoint into a model, sharded or not: this process's part alone is read."""
    # peft's files name no adapter
    own = {name.replace(".default.", "."): tensor for name, tensor in trained_parameters(model).items()}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in own.keys() & set(tensors.keys()):
                first, last = _rows(own[name])
                part: Any = own[name].detach()
                part = part.to_local() if is_sharded(part) else part
                part.copy_(tensors.get_slice(name)[first:last])


def _rows(parameter: Tensor) -> tuple[int, int]:
    """Which rows of a parameter this process keeps: FSDP2 gives each as many, and the last ones what is left."""
    if not is_sharded(parameter):
        return 0, len(parameter)
    sharded: Any = parameter
    each = -(-sharded.shape[0] // sharded.device_mesh.size())
    first = min(each * sharded.device_mesh.get_local_rank(), sharded.shape[0])
    return first, first + sharded.to_local().shape[0]


def _own(value: Any, parameter: Tensor) -> Any:
    """This process's part of a tensor of the optimizer's state; one number is everybody's."""
    if not isinstance(value, Tensor) or value.dim() == 0 or not is_sharded(parameter):
        return value
    first, last = _rows(parameter)
    return placing(parameter)(value[first:last].to(parameter.device, copy=True))
