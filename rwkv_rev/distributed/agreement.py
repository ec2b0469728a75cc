"""What a context group's ranks are given: one and the same batch, looked at before anything is computed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv_rev.distributed.context_group import ContextGroup
from rwkv_rev.distributed.shards import is_sharded
from rwkv_rev.errors import ContextParallelError, StrategyError
from rwkv_rev.reversal.fingerprint import as_words, fingerprint

if TYPE_CHECKING:
    from rwkv_rev.bptt.strategy import LossInputs

DIMENSION = "cp"
"""The name of a mesh's dimension over which contexts are split, as accelerate calls it."""


def context_group(given: Any, *, reduce_gradients: bool = True) -> ContextGroup | None:
    """The context group of a process group or a device mesh; None for one of a single rank.

    Raises:
        ContextParallelError: for what is no such thing, or a mesh whose dimension is not to be told.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ContextParallelError(
            "no processes are there to share a context: start several by torchrun, and call "
            "torch.distributed.init_process_group before set_context_parallel"
        )
    group = given
    if isinstance(given, dist.device_mesh.DeviceMesh):
        names = given.mesh_dim_names or ()
        if given.ndim > 1 and DIMENSION not in names:
            raise ContextParallelError(
                f"the device mesh has {given.ndim} dimensions, none of which is called {DIMENSION!r}: give one of "
                "them, as in mesh['cp']"
            )
        group = given.get_group(DIMENSION if given.ndim > 1 else None)
    if not isinstance(group, dist.ProcessGroup):
        raise ContextParallelError(
            "set_context_parallel takes a torch.distributed process group or a device mesh, not a "
            f"{type(given).__name__}"
        )
    found = ContextGroup(group, reduce_gradients=reduce_gradients)
    return found if found.size > 1 else None


def refuse_cells(cells: Iterable[Any]) -> None:
    """Refuse cells whose state cannot be passed from rank to rank.

    Raises:
        StrategyError: names the first one.
    """
    for cell in cells:
        if not cell.passes_between_ranks:
            raise StrategyError(
                f"the state of a {type(cell).__name__} is not passed between ranks: context parallelism is for RWKV-4, "
                "5, 6 and 7. Split batches over the processes instead (DistributedDataParallel)"
            )


def refuse_beside(return_logits: bool, output_hidden_states: bool) -> None:
    """Refuse what would have to be gathered from all ranks.

    Raises:
        StrategyError: for either.
    """
    if return_logits or output_hidden_states:
        asked = "return_logits" if return_logits else "output_hidden_states beside a loss"
        raise StrategyError(
            f"{asked} is not there under context parallelism, where each rank has a part of every chunk: call the "
            "model without labels and without gradients, or set_context_parallel(None)"
        )


SMALL = 2**20
"""Bytes of a tensor below which looking at it takes the device less time than the host takes to launch that."""
COLUMNS = 4096
"""Words in a row of the table whose sums are compared."""
WEIGHTS = "the weights or buffers"
MODULES = "what modules go by (scales of adapters, eps, what is switched on)"
SETTINGS = "the gradient settings (strategy, chunk_length, remnants, training or not, what is trained)"
OTHERWISE = {
    WEIGHTS: "start all ranks from the same weights, additions included: the same seed before they are made, or "
    "torch.distributed.broadcast",
    MODULES: "make the same model on every rank of the group",
    SETTINGS: "make the same calls on every rank of the group",
}


def agree(inputs: "LossInputs", settings: str, going_by: object, model: nn.Module) -> None:
    """Refuse ranks that were given different batches, settings, weights or buffers; all of them raise.

    Of weights that are spread over ranks each has its own part, which is not compared.

    Args:
        going_by: what modules go by beside their tensors, of one ``repr`` where it is the same.

    Raises:
        ContextParallelError: names what differs, and where.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    group = inputs.group
    assert group is not None
    device = inputs.targets.device
    state = inputs.state.tensors()

    def of(*tensors: Tensor | None) -> Tensor:
        there = [tensor for tensor in tensors if tensor is not None]
        shapes = crc32(repr([(str(tensor.dtype), tuple(tensor.shape)) for tensor in there]).encode())
        return fingerprint(*there).to(device) + shapes if there else torch.tensor(-1, device=device)

    mask = None if inputs.valid is None else inputs.valid.to(torch.int32)
    begins = None if inputs.borders is None else inputs.borders.at.to(torch.int32)
    divisor = (
        inputs.divisor
        if isinstance(inputs.divisor, Tensor)
        else torch.tensor(float(inputs.divisor), device=device)
    )
    known = {
        SETTINGS: torch.tensor(
            crc32((settings + repr([(tuple(p.shape), p.requires_grad) for p in parameters])).encode()),
            device=device,
        ),
        MODULES: torch.tensor(crc32(repr(going_by).encode()), device=device),
        WEIGHTS: _weights([*parameters, *buffers], device),
        "the input": of(inputs.input_ids, inputs.inputs_embeds),
        "the labels": of(inputs.targets),
        "what tokens count": of(inputs.weights),
        "the attention mask": of(mask),
        "the borders of documents": of(begins),
        "what the loss is divided by": of(divisor.double()),
        "the state": of(*state),
    }
    found = group.gather(torch.stack([value.to(torch.int64) for value in known.values()]))
    wrong = (found != found[:1]).nonzero().tolist()
    if wrong:
        rank, which = wrong[0]
        name = list(known)[which]
        batch = "give every rank of the group the whole batch (only data-parallel groups have batches of their own)"
        raise ContextParallelError(
            f"{name} of rank {rank} of the context group is not that of rank 0: {OTHERWISE.get(name, batch)}"
        )


def _weights(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Checksum, int64, of all whole tensors and of the places of their words: small ones of a dtype together."""
    whole = [tensor.detach().contiguous().view(-1) for tensor in tensors if not is_sharded(tensor)]
    looked_at = [each for each in whole if each.nbytes >= SMALL]
    small = [each for each in whole if 0 < each.nbytes < SMALL]
    for kind in dict.fromkeys((each.dtype, each.device) for each in small):
        looked_at.append(torch.cat([each for each in small if (each.dtype, each.device) == kind]))
    found = [sums.to(device) for each in looked_at for sums in _sums_by_place(each)]
    return fingerprint(torch.cat(found)) if found else torch.zeros((), dtype=torch.int64, device=device)


def _sums_by_place(tensor: Tensor) -> list[Tensor]:
    """Sums of words in rows and in columns, int64, in which two that have changed places show; in two launches."""
    words = as_words(tensor)
    rows = words.numel() // COLUMNS
    table, rest = words[: rows * COLUMNS].view(rows, COLUMNS), words[rows * COLUMNS :].to(torch.int64)
    sums = [table.sum(1, dtype=torch.int64), table.sum(0, dtype=torch.int64)] if rows else []
    return [*sums, rest] if len(rest) else sums
