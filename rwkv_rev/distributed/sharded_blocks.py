"""Blocks whose weights are spread over processes (FSDP2, ``fully_shard(block)``), run chunk by chunk.

Rajbhandari et al. 2020, "ZeRO", stage 3: each process keeps a part of every weight, of its gradient and of what the
optimizer keeps for it. A block's weights are whole while it is computed, and freed after it. FSDP2's own hooks stand
around one forward and one backward pass of a block; the sweeps compute a block once per chunk forwards, once more with
graph, and pull its gradient back when all blocks above have been pulled back. So they take those hooks off meanwhile,
and gather and reduce for themselves:

    for each chunk forwards, each block:               gather, compute, free
    for each chunk backwards, each block, upwards:     gather, compute with graph, free
                              each block, downwards:   gather, pull back, free, reduce and scatter the gradients

A graph keeps the whole weights themselves, whose storage is emptied and filled again under it, as FSDP2 does. Sums of
gradients are kept of this process's part alone, in float32 or wider, and so they are reduced; like FSDP2's they are
the mean over the processes. Processes with fewer chunks than others go along with the gathering, and add nothing.

Bytes sent per chunk: three times the weights in the dtype in which they are computed, and once in float32.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from rwkv_rev.distributed.shards import reshard, shared_with
from rwkv_rev.errors import StrategyError

if TYPE_CHECKING:
    from rwkv_rev.cells.block import Plans, ResidualBlock
    from rwkv_rev.distributed.context_group import ContextGroup

# PyTorch gave both other names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SMALL = 2**16
"""Weights of fewer numbers stay whole between uses: plans hold on to them."""


class _Weight:
    """One parameter, in ``places`` of modules: this process's part, and the whole while it is at hand."""

    def __init__(self, part: DTensor, index: int | None, dtype: torch.dtype | None) -> None:
        self.part, self.index = part, index
        self.places: list[tuple[nn.Module, str]] = []
        *self.replicas, self.group = (part.device_mesh.get_group(at) for at in range(part.device_mesh.ndim))
        self.ranks = dist.get_world_size(self.group)
        shape = part.shape if part.dim() else torch.Size([1])
        self.rows = math.ceil(shape[0] / self.ranks)  # of each process; the last ones may have fewer
        local = part.to_local()
        self.own_rows = local.shape[0] if part.dim() else 1
        dtype = part.dtype if dtype is None or not part.is_floating_point() else dtype
        whole = torch.empty(part.shape, dtype=dtype, device=local.device)
        self.whole = nn.Parameter(whole, requires_grad=part.requires_grad)
        self.nbytes = whole.untyped_storage().nbytes()
        self.row_size = math.prod(part.shape[1:])
        self.stays = part.numel() < SMALL

    def put(self, parameter: Any) -> None:
        """The whole or the part, in the places of the parameter."""
        for module, name in self.places:
            module._parameters[name] = parameter

    def padded(self) -> Tensor:
        """Bytes of this process's part, [rows ...]."""
        local = self.part.to_local().detach().to(self.whole.dtype)
        missing = self.rows - self.own_rows
        if missing:
            local = torch.cat([local, local.new_zeros(missing, *local.shape[1:])])
        return local.contiguous().view(-1).view(torch.uint8)

    def fill(self, parts: Tensor) -> None:
        """The whole from every process's bytes [W, n]; not seen by graphs, as the numbers are those of before."""
        self.whole.untyped_storage().resize_(self.nbytes)
        rows = (
            parts.contiguous()
            .view(-1)
            .view(self.whole.dtype)
            .view(self.ranks * self.rows, *self.whole.shape[1:])
        )
        self.whole.data.copy_(rows[: self.whole.shape[0]])

    def free(self) -> None:
        if not self.stays:
            self.whole.untyped_storage().resize_(0)

    def by_process(self, gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gradient of the whole as every process's part, [W, n] in ``dtype``."""
        shape = self.whole.shape
        rows = torch.zeros(self.ranks * self.rows, *shape[1:], dtype=dtype, device=self.whole.device)
        if gradient is not None:
            rows[: shape[0]] = gradient
        return rows.view(self.ranks, -1)

    def own(self, reduced: Tensor) -> Tensor:
        """This process's part of a reduced gradient."""
        return reduced.view(self.rows, *self.whole.shape[1:])[: self.own_rows].clone()


class ShardedBlock:
    """A block that is called as the sweeps call one, with its weights whole meanwhile.

    Args:
        places: indices, by their ids, of the parameters that a loss is differentiated by.
    """

    def __init__(self, block: "ResidualBlock", places: dict[int, int]) -> None:
        self.block = block
        dtypes: dict[int, torch.dtype | None] = {}
        for unit in block.modules():  # from outside inwards
            if isinstance(unit, FSDPModule):
                dtypes |= dict.fromkeys(map(id, unit.modules()), _parameter_dtype(unit))
        weights: dict[int, _Weight] = {}
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    known = weights.setdefault(
                        id(parameter), _Weight(parameter, places.get(id(parameter)), dtypes.get(id(module)))
                    )
                    known.places.append((module, name))
        # bytes of several dtypes lie behind each other: the widest first, so that each begins where it may
        self._weights = sorted(weights.values(), key=lambda weight: -weight.whole.element_size())
        self._trained = [weight for weight in self._weights if weight.index is not None]
        self.leaves: dict[int, Tensor] = {
            weight.index: weight.whole for weight in self._trained if weight.index is not None
        }
        """The whole weights by the indices of their parameters, for graphs; their numbers are there while at hand."""

    def __call__(self, *arguments: Any) -> Any:
        with self.at_hand():
            return self.block(*arguments)

    def planned(self, lengths: Mapping[int, int | None]) -> "list[Plans]":
        """The block's plans for chunks of these lengths, of which this rank has so many tokens."""
        with self.at_hand():
            self.block.refuse_changing()
            return [self.block.plan(length, piece) for length, piece in lengths.items()]

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """The weights whole inside, and in their modules' places."""
        self._gather()
        for weight in self._weights:
            weight.put(weight.whole)
        try:
            yield
        finally:
            for weight in self._weights:
                weight.put(weight.part)
                weight.free()

    @torch.no_grad()
    def _gather(self) -> None:
        weights = self._weights
        if not weights:
            return
        own = torch.cat([weight.padded() for weight in weights])
        parts = own.new_empty(weights[0].ranks * own.numel())
        _all_gather(parts, own, group=weights[0].group)
        sizes = [weight.rows * weight.row_size * weight.whole.element_size() for weight in weights]
        for weight, part in zip(weights, parts.view(weights[0].ranks, -1).split(sizes, dim=1), strict=True):
            weight.fill(part)

    @torch.no_grad()
    def reduced(self, indices: Sequence[int], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of parameters, by the whole ones for this block's: of those this process's part, the mean over all.

        Every process must call this.
        """
        found = dict(zip(indices, gradients, strict=True))
        weights = self._trained
        if not weights:
            return list(gradients)
        dtype = functools.reduce(torch.promote_types, (w.whole.dtype for w in weights), torch.float32)
        parts = torch.cat([w.by_process(found.get(cast(int, w.index)), dtype) for w in weights], dim=1)
        own = parts.new_empty(parts.shape[1])
        _reduce_scatter(own, parts.view(-1), group=weights[0].group)
        for group in weights[0].replicas:
            dist.all_reduce(own, group=group)
        own /= weights[0].part.device_mesh.size()
        sizes = [w.rows * w.row_size for w in weights]
        found |= {cast(int, w.index): w.own(part) for w, part in zip(weights, own.split(sizes), strict=True)}
        return [found[index] for index in indices]


class ShardedBlocks:
    """All blocks of a model, of which some or all are sharded."""

    def __init__(self, blocks: "Sequence[ResidualBlock]", wanted: Sequence[Tensor], chunks: int) -> None:
        places = {id(tensor): index for index, tensor in enumerate(wanted)}
        self.blocks = [ShardedBlock(block, places) for block in blocks]
        self.missing = most_of_all(blocks, chunks) - chunks
        """How many chunks other processes have more than this one."""

    def wait_forwards(self) -> None:
        """Go along with chunks that this process does not have, forwards."""
        for _ in range(self.missing):
            self._pass()

    def wait_backwards(self, take: Callable[[Sequence[int], Sequence[Any]], None]) -> None:
        """The same backwards; ``take`` is given this process's parts of what the others find there."""
        for _ in range(self.missing):
            self._pass()
            for block in reversed(self.blocks):
                with block.at_hand():
                    pass
                indices = list(block.leaves)
                take(indices, block.reduced(indices, [None] * len(indices)))

    def _pass(self) -> None:
        for block in self.blocks:
            with block.at_hand():
                pass


def most_of_all(blocks: Iterable[nn.Module], number: int) -> int:
    """The largest of the numbers of all processes that share the blocks, each of which must call this."""
    blocks = list(blocks)
    reshard(blocks)
    part = next(p for block in blocks for p in block.parameters() if isinstance(p, DTensor))
    most = torch.tensor([number], device=part.to_local().device)
    for dimension in range(part.device_mesh.ndim):
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=part.device_mesh.get_group(dimension))
    return int(most)


def units_outside(model: nn.Module) -> list[FSDPModule]:
    """What is sharded beside the blocks of a model: embedding, norm, head."""
    blocks: Iterable[nn.Module] = getattr(model, "blocks", ())
    inside = {id(part) for block in blocks for part in block.modules()}
    return [
        unit
        for unit in model.modules()
        if isinstance(unit, FSDPModule) and inside.isdisjoint(map(id, cast(nn.Module, unit).modules()))
    ]


def gather_for_others(blocks: Iterable[nn.Module], times: int) -> None:
    """Gather what a forward pass through the blocks gathers by FSDP2's own hooks, and free it."""
    units = list(chain.from_iterable(block.modules() for block in blocks))
    for _ in range(times):
        for module in units:
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()


@contextmanager
def unhooked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules without FSDP2's hooks inside, and with those of others."""
    removed = []
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(map(_of_fsdp, hooks.values())):
                removed.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if _of_fsdp(hook)]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, all_ in removed:
            hooks.clear()
            hooks.update(all_)


def _of_fsdp(hook: Callable[..., Any]) -> bool:
    hook = inspect.unwrap(hook)
    home = type(hook.__self__) if hasattr(hook, "__self__") else hook
    return getattr(home, "__module__", "").startswith("torch.distributed.fsdp")


def refuse_other_shards(
    blocks: "Sequence[ResidualBlock]",
    parameters: Sequence[Tensor],
    device: torch.device,
    group: "ContextGroup | None" = None,
) -> None:
    """Refuse what is sharded otherwise than FSDP2 shards a model's blocks, or parts of them.

    Args:
        group: that shares the context.

    Raises:
        StrategyError: for shards that FSDP2 did not make, along other dimensions, on another device, of weights that
            are not floating-point, for another reduction or another output than its own, and for processes that
            share a context where nobody would take the sum over them.
    """
    known = {id(parameter) for block in blocks for parameter in block.parameters()}
    where = "shard the model by fully_shard(block) for each block and then fully_shard(model)"
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        *replicas, last = parameter.placements
        if not parameter.is_floating_point():
            raise StrategyError(
                f"a sharded weight is of {parameter.dtype}, as quantised ones are, and chunks gather floating-point "
                "weights alone: shard the model unquantised, or use bptt = 'full'"
            )
        if (
            id(parameter) not in known
            or last != Shard(0)
            or any(placement != Replicate() for placement in replicas)
        ):
            raise StrategyError(
                f"a parameter of shape {list(parameter.shape)} is placed as {list(parameter.placements)}, as "
                f"fully_shard does not: {where}, or use bptt = 'full'"
            )
        common = set[int]() if group is None else group.ranks & shared_with(parameter)
        if group is not None and not (common == group.ranks or (len(common) == 1 and group.reduce_gradients)):
            raise StrategyError(
                "the model's blocks are sharded over other processes than those that share the context, and their "
                "gradients would not be summed over these: shard over all processes (mesh['dp', 'cp']._flatten()), or "
                "over mesh['dp'] with set_context_parallel(..., reduce_gradients=True)"
            )
        if parameter.device.type != device.type:
            raise StrategyError(
                "the model's shards are offloaded to another device, and chunks need them there: leave the offload "
                "policy out, or use bptt = 'full'"
            )
    for number, block in enumerate(blocks):
        for unit in block.modules():
            if isinstance(unit, FSDPModule) and _has_other_reduction(unit):
                raise StrategyError(
                    f"block {number} was given another reduction (set_gradient_divide_factor, set_all_reduce_hook), "
                    "and chunks take the mean over the processes: leave it out, or use bptt = 'full'"
                )


def _has_other_reduction(unit: Any) -> bool:
    """Whether FSDP2 was told to reduce a block's gradients otherwise than to their mean."""
    group = getattr(unit._get_fsdp_state(), "_fsdp_param_group", None)
    return any(
        getattr(group, name, None) is not None for name in ("gradient_divide_factor", "_all_reduce_hook")
    )


def _parameter_dtype(unit: Any) -> torch.dtype | None:
    """In which dtype the weights are computed, by FSDP2's policy; None for their own."""
    state = unit._get_fsdp_state()
    policy = getattr(state, "_mp_policy", None)
    if policy is not None and policy.output_dtype is not None:
        raise StrategyError(
            "the mixed precision policy of fully_shard has an output_dtype, which chunks do not follow: leave it "
            "out, or use bptt = 'full'"
        )
    dtype: torch.dtype | None = getattr(policy, "param_dtype", None)
    return dtype
