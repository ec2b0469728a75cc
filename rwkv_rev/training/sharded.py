"""An optimizer whose state is spread over the processes: AdamW keeps 8 bytes per weight, here divided by their number.

Rajbhandari et al. 2020, "ZeRO", stage 1: parameters are dealt to the processes by size; each updates its own from the
gradients that data-parallel reduction left everywhere, then broadcasts them: as many bytes per step as a reduction of
the gradients sends. Every number is updated as by the whole optimizer. Checkpoints hold the whole state in the inner
optimizer's own layout, so that a run goes on with another number of processes, sharded or not; while one is written,
the first process holds that state in host memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Settings = dict[str, Any]


class ShardedOptimizer(torch.optim.Optimizer):
    """``inner`` spread over the processes: each updates, and keeps the state of, its share.

    Args:
        inner: an optimizer before its first step, over the same parameters in every process; its update is elementwise,
            its state tensors of a parameter's shape, or scalars. It keeps this process's share of the parameters.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in inner.param_groups], inner.defaults)
        self.inner = inner
        self._rank = dist.get_rank()
        self._parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._owners = deal([p.numel() for p in self._parameters], dist.get_world_size())
        mine = {id(self._parameters[index]) for index in self._owned()}
        for group in inner.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in mine]
        self._gathered: dict[int, dict[str, Any]] = {}

    def step(self, closure: Any = None) -> Any:
        """Update this process's share, then give it to the others."""
        self._hand_down()
        outcome = self.inner.step(closure)
        with torch.no_grad():
            sent = [
                dist.broadcast(parameter.data, src=owner, async_op=True)
                for parameter, owner in zip(self._parameters, self._owners, strict=True)
            ]
        for handle in sent:
            handle.wait()
        return outcome

    def gather(self) -> None:
        """Bring the whole state to the first process, for :meth:`state_dict`; every process must call this."""
        own = {index: self.inner.state.get(self._parameters[index], {}) for index in self._owned()}
        for index, owner in enumerate(self._owners):
            names: list[Any] = [sorted(own[index]) if owner == self._rank else None]
            dist.broadcast_object_list(names, src=owner)
            state = {
                name: self._send_to_first(index, owner, own.get(index, {}).get(name)) for name in names[0]
            }
            if self._rank == 0 and state:
                self._gathered[index] = state

    def release(self) -> None:
        """Forget what :meth:`gather` brought."""
        self._gathered = {}

    def state_dict(self) -> dict[str, Any]:
        """In the inner optimizer's layout; the state is there after :meth:`gather`, in the first process."""
        return super().state_dict() | {"state": dict(self._gathered)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the settings, and this process's share of the state."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError("the saved optimizer has other parameters")
            group.update(_without_parameters(saved))
        self._hand_down()
        place = {id(p): i for i, p in enumerate(self._parameters)}
        inner = self.inner.state_dict()
        order = [place[id(p)] for group in self.inner.param_groups for p in group["params"]]
        saved_state = state_dict["state"]
        inner["state"] = {i: saved_state[index] for i, index in enumerate(order) if index in saved_state}
        self.inner.load_state_dict(inner)

    def _owned(self) -> list[int]:
        return [index for index, owner in enumerate(self._owners) if owner == self._rank]

    def _hand_down(self) -> None:
        """Learning rates and other settings, which schedules change, to the inner optimizer."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_without_parameters(group))

    def _send_to_first(self, index: int, owner: int, value: Any) -> Tensor | None:
        """One tensor of the state of parameter ``index``: float32 scalars, else of the parameter's shape."""
        like = self._parameters[index]
        if owner == 0:
            return value.cpu() if self._rank == 0 else None
        if self._rank not in (0, owner):
            return None
        scalar = torch.zeros(1, device=like.device)
        if self._rank == owner:
            scalar.fill_(float(value.dim() == 0))
            dist.send(scalar, dst=0)
            dist.send(value.to(like.device).reshape(-1).contiguous(), dst=0)
            return None
        dist.recv(scalar, src=owner)
        found = torch.zeros(1, device=like.device) if scalar.item() else torch.empty_like(like).reshape(-1)
        dist.recv(found, src=owner)
        return found.cpu().reshape(() if scalar.item() else like.shape)


def deal(sizes: list[int], processes: int) -> list[int]:
    """The process of each parameter: the largest first, to the process that has least."""
    load = [0] * processes
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner = load.index(min(load))
        owners[index] = owner
        load[owner] += sizes[index]
    return owners


def state_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state in this process."""
    found = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    found = found.inner if isinstance(found, ShardedOptimizer) else found
    return sum(
        getattr(tensor, "_local_tensor", tensor).nbytes
        for state in found.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    )


def _without_parameters(group: Settings) -> Settings:
    return {name: value for name, value in group.items() if name != "params"}
