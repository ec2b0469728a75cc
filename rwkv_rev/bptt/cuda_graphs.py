"""Both sweeps' work on one chunk as CUDA graphs, so that a GPU does not wait for the host to launch it.

A layer's chunk is some 300 kernel launches, 10 ms of host time, whatever the chunk's length: below about 16,384
tokens the GPU would be idle for most of a sweep. Every interior chunk of a context does exactly the same, so its
launches are recorded once per sweep (at the cost of one chunk) and replayed for all others. A replay runs the same
kernels on the same shapes: the results are the same bits as without graphs.

Chunks that differ (the first, the last, masked ones, those in which a grid rose) and sweeps that draw random numbers
run without a graph. ``RWKV_REV_CUDA_GRAPHS=0`` turns graphs off.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import Chunk, LossInputs
from rwkv_rev.cells.block import ExactStates, Remnants
from rwkv_rev.cells.cell import CellState
from rwkv_rev.reversal.fixed_point import FixedPoint

SWITCH = "RWKV_REV_CUDA_GRAPHS"
FEWEST_CHUNKS = 8
"""Recording costs about as much as two chunks without a graph; below this many interior chunks it does not pay."""

STATIC = -1
"""Index of a chunk that stands for whatever was last loaded into it."""

_failed: list[str] = []

T = TypeVar("T")


def worthwhile(chunks: list[Chunk], device: torch.device, *, plain: bool) -> bool:
    """Whether a sweep over ``chunks`` should use graphs; ``plain`` says that it draws and retries nothing."""
    return (
        plain
        and device.type == "cuda"
        and os.environ.get(SWITCH, "1") != "0"
        and not _failed
        and len(chunks) - 2 >= FEWEST_CHUNKS
        and chunks[0].inputs.input_ids is not None
    )


def repeats(chunk: Chunk, chunks: list[Chunk]) -> bool:
    """Whether ``chunk`` does the same work as the other interior chunks."""
    return 0 < chunk.index < len(chunks) - 1 and chunk.is_full and chunk.predicts


def static_chunk(chunk: Chunk) -> Chunk:
    """A chunk on memory of its own, into which :func:`load` puts the tokens and targets of others like it."""
    inputs = chunk.inputs
    assert inputs.input_ids is not None
    part = slice(chunk.start, chunk.stop)
    own = LossInputs(
        input_ids=inputs.input_ids[:, part].clone(),
        inputs_embeds=None,
        valid=None,
        targets=inputs.targets[:, part].clone(),
        divisor=inputs.divisor,
        state=inputs.state,
    )
    return Chunk(own, STATIC, 0, chunk.length, predicts=True, is_full=True)


def load(static: Chunk, chunk: Chunk) -> None:
    """Put the tokens and targets of ``chunk`` into ``static``."""
    part = slice(chunk.start, chunk.stop)
    assert static.inputs.input_ids is not None and chunk.inputs.input_ids is not None
    static.inputs.input_ids.copy_(chunk.inputs.input_ids[:, part])
    static.inputs.targets.copy_(chunk.inputs.targets[:, part])


def record(work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of ``work``, whose kernels have all run before, and the tensors its replays will fill."""
    torch.cuda.empty_cache()  # the graph gets memory of its own; what chunks before it used is free for that
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (a process group's watchdog) may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def attempt(make: Callable[[], T]) -> T | None:
    """A graph, or None with a warning where this device or PyTorch cannot record one; then none is tried again."""
    try:
        return make()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _failed.append(str(error))
        reason = str(error).splitlines()[0]
        warnings.warn(f"CUDA graphs are not used, training is slower: {reason}", stacklevel=2)
        return None


@dataclass
class ForwardGraph:
    """One chunk of the forward sweep: tokens and exact states in, exact states and remnants out."""

    graph: torch.cuda.CUDAGraph
    chunk: Chunk
    before: list[ExactStates]
    after: list[ExactStates]
    remnants: list[Remnants]

    @classmethod
    def of(
        cls,
        chunk: Chunk,
        states: list[ExactStates],
        work: Callable[[Chunk, list[ExactStates]], tuple[list[ExactStates], list[Remnants]]],
    ) -> "ForwardGraph":
        own, before = static_chunk(chunk), cloned(states)
        graph, (after, remnants) = record(lambda: work(own, before))
        return cls(graph, own, before, after, remnants)

    def run(self, chunk: Chunk, states: list[ExactStates]) -> None:
        """Run on ``chunk`` from ``states``; fills ``before``, ``after`` and ``remnants``."""
        load(self.chunk, chunk)
        copy_states(self.before, states)
        self.graph.replay()


def cloned(states: list[ExactStates]) -> list[ExactStates]:
    """The same states on memory of their own."""
    return [(_cloned(time), _cloned(channel)) for time, channel in states]


def copy_states(targets: list[ExactStates], sources: list[ExactStates]) -> None:
    """Copy exact states in place."""
    copy_all(state_tensors(targets), state_tensors(sources))


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors in place, those that are not the same already."""
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.data_ptr() != s.data_ptr()]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


def state_tensors(states: list[ExactStates]) -> list[Tensor]:
    """The tensors that make up exact states, in a fixed order."""
    tensors: list[Tensor] = []
    for pair in states:
        for state in pair:
            tensors += [state.shift, *_memory_tensors(state.memory)]
    return tensors


def _memory_tensors(memory: Any) -> list[Tensor]:
    if memory is None:
        return []
    if isinstance(memory, FixedPoint):
        return [memory.mantissa, memory.exponent, memory.value(), memory.fingerprint()]
    return [memory]


def _cloned(state: CellState) -> CellState:
    memory = state.memory
    if isinstance(memory, FixedPoint):
        memory = FixedPoint(*(tensor.clone() for tensor in _memory_tensors(memory)))
    elif memory is not None:
        memory = memory.clone()
    return CellState(state.shift.clone(), memory)
