"""A model whose contexts are shared by the ranks of a process group: what is asked of it, and its loss."""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.arguments import named
from rwkv_rev.bptt import choose_strategy, lasting
from rwkv_rev.bptt.piece import Piece
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.distributed.agreement import agree, context_group, refuse_beside, refuse_cells
from rwkv_rev.distributed.context_group import ContextGroup
from rwkv_rev.distributed.shards import auto_as_others
from rwkv_rev.errors import StrategyError
from rwkv_rev.module_settings import numbers_and_switches
from rwkv_rev.outputs import RwkvRevCausalLMOutput


class ContextParallel:
    """The part of a model with a head that shares contexts."""

    model: Any
    blocks: Any

    @named
    def set_context_parallel(self, group: Any, *, reduce_gradients: bool = True) -> None:
        """Split every chunk's tokens over the ranks of a process group, each of which is given the whole batch.

        Args:
            group: a ``torch.distributed`` process group, a device mesh of one dimension, or one with a dimension called
                ``cp``; None to compute contexts alone again. Chunks of C tokens are pieces of C / W, W its size.
            reduce_gradients: sum parameter gradients over the group, so that each rank has those of the whole context.
                If not, each has W times those of its own tokens: for a wrapper that takes their mean over all processes
                (DistributedDataParallel, ``fully_shard``), and would sum over the group once more.

        Losses, states and gradients are those of one process. Every rank makes the same calls. On GPUs, recorded
        launches hold the group: ``set_context_parallel(None)`` before ``destroy_process_group``, which waits for them.

        Raises:
            ContextParallelError: for what is no such group, or one that this process is not in.
            StrategyError: for a model whose state cannot be passed from rank to rank.
        """
        lasting.forget(self)  # type: ignore[arg-type]
        if group is not None:
            refuse_cells(cell for block in self.blocks for cell in block.cells)
        self.model.context_group = (
            None if group is None else context_group(group, reduce_gradients=reduce_gradients)
        )


def together(group: ContextGroup | None) -> AbstractContextManager[None]:
    """Around what ranks compute together; nothing for one alone."""
    return nullcontext() if group is None else group.together()


def shared_loss(
    model: Any, inputs: LossInputs, size: int, return_logits: bool, output_hidden_states: bool
) -> RwkvRevCausalLMOutput:
    """The loss of a batch that all ranks of the model's group were given, in chunks of ``size`` tokens.

    Raises:
        ContextParallelError: where they were given different ones.
        StrategyError: for what would have to be gathered from all ranks.
    """
    refuse_beside(return_logits, output_hidden_states)
    inputs.refuse()
    bptt = model.bptt
    inputs = replace(inputs, group=model.model.context_group, kind=Piece)
    settings = f"{bptt.strategy} {size} {bptt.remnants} {torch.is_grad_enabled()} {model.training}"
    agree(inputs, settings, numbers_and_switches(model), model)
    strategy = choose_strategy(
        auto_as_others(bptt.strategy, model.blocks),
        inputs.length,
        chunk_length=size,
        tape=bptt.tape,
        tape_dir=bptt.tape_dir,
        remnants=bptt.remnants,
    )
    result = strategy.loss(model, inputs)
    return RwkvRevCausalLMOutput(result.loss, None, result.state, report=result.report)


def refuse_accelerates_ranks() -> None:
    """Refuse contexts that accelerate splits for attention: each rank would take its tokens for the whole context.

    Raises:
        StrategyError: naming ``set_context_parallel``.
    """
    state: Any = sys.modules.get("accelerate.state")
    config = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    for name, what in (("cp_size", "context parallelism"), ("sp_size", "sequence parallelism")):
        if config is not None and (getattr(config, name, 1) or 1) > 1:
            raise StrategyError(
                f"accelerate's ParallelismConfig has {name} = {getattr(config, name)}: its {what} splits a context "
                "for attention, and a recurrent state would begin anew on each rank; leave it out and call "
                "model.set_context_parallel(group), or use rwkv-rev finetune --context-parallel"
            )


def refuse_own_loss(group: ContextGroup | None, tensors: Iterable[Tensor | None]) -> None:
    """Refuse hidden states with a gradient by any of ``tensors``, of which each rank of a group would have a part.

    Raises:
        StrategyError: where one of them wants one, or as :func:`refuse_accelerates_ranks`.
    """
    if not torch.is_grad_enabled():
        return
    refuse_accelerates_ranks()
    if group is None:
        return
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise StrategyError(
            "a loss of your own on logits or hidden states is not split over ranks: give the model labels (or "
            "shift_labels), read under torch.no_grad(), or set_context_parallel(None)"
        )
