"""Both sweeps' work on one chunk as CUDA graphs, so that a GPU does not wait for the host to launch it.

A layer's chunk is some 200 kernel launches, 9 ms of host time, whatever the chunk's length: in short chunks the GPU is
idle for most of a sweep. All inner chunks of a context do exactly the same, so their launches are recorded once per
sweep and replayed for every one of them, where a first chunk shows that the GPU does wait (:class:`Pace`). A replay
runs the same kernels on the same shapes: the results are the same bits as without graphs.

Chunks that differ (the first, the last, masked ones, those in which a grid rose) and sweeps that draw random numbers
or retry with another loss scale run without a graph. ``RWKV_REV_CUDA_GRAPHS=0`` turns graphs off.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import Chunk, LanguageModel
from rwkv_rev.cells.block import ExactStates
from rwkv_rev.cells.cell import CellState
from rwkv_rev.cells.token_shift import Border
from rwkv_rev.loss import add_gradients
from rwkv_rev.reversal.fixed_point import FixedPoint
from rwkv_rev.reversal.tape import FlatRecord, Tape

SWITCH = "RWKV_REV_CUDA_GRAPHS"
FEWEST_CHUNKS = 6
"""Inner chunks below which recording, which costs the host as much as running a chunk or two, does not pay."""

HOST_BOUND = 0.1
"""Where less than this share of the launching time is left to wait for the device, the device has waited before."""

_failures: list[str] = []
_streams: dict[torch.device, torch.cuda.Stream] = {}
"""Where recordings are made, one per device: libraries keep a workspace for every stream they have seen."""

T = TypeVar("T")


def worthwhile(chunks: list[Chunk], device: torch.device) -> bool:
    """Whether sweeps over ``chunks`` should use graphs."""
    return (
        device.type == "cuda"
        and os.environ.get(SWITCH, "1") != "0"
        and not _failures
        and sum(repeats(chunk, chunks) for chunk in chunks) >= FEWEST_CHUNKS
    )


def repeats(chunk: Chunk, chunks: list[Chunk]) -> bool:
    """Whether ``chunk`` does the same work as the other inner chunks."""
    inner = 0 < chunk.index < len(chunks) - 1
    return inner and chunk.is_full and chunk.predicts and chunk.inputs.input_ids is not None


class Pace:
    """Tells of the work launched between its making and :meth:`waits_for_host` whether the device was kept busy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._start = time.perf_counter()

    def waits_for_host(self) -> bool:
        launched = time.perf_counter() - self._start
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._start - launched < HOST_BOUND * launched


def attempt(make: Callable[[], T]) -> T | None:
    """What ``make`` returns, or None with a warning where a graph cannot be recorded; then none is tried again.

    Running out of memory is such a case too: the chunk before fitted without a graph.
    """
    try:
        return make()
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        _failures.append(str(cause))
        reason = str(cause).splitlines()[0]
        warnings.warn(f"CUDA graphs are not used, short chunks train more slowly: {reason}", stacklevel=2)
        return None


class ForwardGraph:
    """A chunk of the forward sweep: tokens and exact states in; exact states and the tape's record out.

    Args:
        chunk: one of the chunks to be run; its length and batch size count, its tokens do not.
        states: likewise.
        work: from a chunk and the states before it to the states after it and its :class:`~.sweeps.Record`.

    Attributes:
        record: the last run's, which holds until the next run.
    """

    def __init__(
        self,
        chunk: Chunk,
        states: list[ExactStates],
        work: Callable[[Chunk, list[ExactStates]], tuple[list[ExactStates], Any]],
    ) -> None:
        self._chunk = _static(chunk)
        self._before = cloned(states)

        def run() -> tuple[list[ExactStates], Any, FlatRecord]:
            after, record = work(self._chunk, self._before)
            none = None if record.raised is None else torch.zeros(record.raised.shape, dtype=torch.bool)
            return after, record, FlatRecord.of(record.tensors(none), chunk.inputs.targets.device)

        self._graph, (self._after, self.record, self._flat) = _record(run, chunk.inputs.targets.device)

    def run(self, chunk: Chunk, states: list[ExactStates], tape: Tape) -> list[ExactStates]:
        """Put the record of ``chunk`` on the tape; the states returned hold until the next run."""
        _load(self._chunk, chunk)
        _copy_states(self._before, states)
        self._graph.replay()
        raised = None if self.record.raised is None else self.record.raised.cpu()
        if raised is not None and raised.any():
            tape.push(self.record.tensors(raised))
        else:
            tape.push_flat(self._flat)
        return self._after


class BackwardGraph:
    """A chunk of the backward sweep: states after it, record, gradient by these states in; the same before it out.

    Each run adds to ``loss`` and to ``sums``, where a missing one is filled in.

    Args:
        model: whose parameters the gradients are by.
        parameters: these, in the order of ``sums``.
        chunk, states, record, incoming: of one of the chunks to be run; their values do not count.
        work: from a chunk, the states after it, its record, their gradients, and the parameters (as tensors made for
            the recording) to a :class:`~.sweeps.ChunkResult`.
    """

    def __init__(
        self,
        model: LanguageModel,
        parameters: list[Tensor],
        sums: list[Tensor | None],
        loss: Tensor,
        chunk: Chunk,
        states: list[ExactStates],
        record: FlatRecord,
        incoming: list[Tensor],
        work: Callable[[Chunk, list[ExactStates], list[list[Tensor]], list[Tensor], list[Tensor]], Any],
    ) -> None:
        self._chunk = _static(chunk)
        self._after = cloned(states)
        self._record = FlatRecord(record.data.clone(), record.layouts)
        self._incoming = [gradient.clone() for gradient in incoming]
        self._sums = sums
        known = [total is not None for total in sums]
        self._known = known
        for index, parameter in enumerate(parameters):
            if sums[index] is None:
                sums[index] = torch.zeros_like(
                    parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)
                )

        def run() -> tuple[list[ExactStates], list[Tensor], Tensor | None]:
            with _stand_ins(model, parameters) as tensors:
                found = work(self._chunk, self._after, self._record.tensors(), self._incoming, tensors)
            gradients = found.gradients.parameters
            self._known = [was or new is not None for was, new in zip(known, gradients, strict=True)]
            add_gradients(sums, gradients)
            loss.add_(found.gradients.loss)
            return found.states, found.gradients.state, found.exactly

        try:
            self._graph, (self._states, self._outgoing, self._exactly) = _record(run, record.data.device)
        except BaseException:
            self._known = known  # what was launched while recording has not run
            self.finish()
            raise

    def fits(self, chunk: Chunk, record: FlatRecord, chunks: list[Chunk]) -> bool:
        """Whether ``chunk`` with ``record`` can be run."""
        return repeats(chunk, chunks) and record.layouts == self._record.layouts

    def run(
        self, chunk: Chunk, states: list[ExactStates], record: FlatRecord, incoming: list[Tensor]
    ) -> tuple[list[ExactStates], list[Tensor], Tensor | None]:
        """States before the chunk, gradients by them (both hold until the next run), and ``exactly``."""
        _load(self._chunk, chunk)
        _copy_states(self._after, states)
        self._record.data.copy_(record.data)
        torch._foreach_copy_(self._incoming, incoming)
        self._graph.replay()
        return self._states, self._outgoing, None if self._exactly is None else self._exactly.clone()

    def finish(self) -> None:
        """Make sums that nothing was added to None again."""
        for index, known in enumerate(self._known):
            if not known:
                self._sums[index] = None


def cloned(states: list[ExactStates]) -> list[ExactStates]:
    """The same exact states on memory of their own."""
    return [(_clone(time), _clone(channel)) for time, channel in states]


def _record(work: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of ``work``, whose kernels have all run before, and the tensors that its replays fill."""
    torch.cuda.empty_cache()  # the graph has memory of its own: what chunks before it used is free for that
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
    try:
        # thread_local: other threads (a process group's watchdog) may use the device meanwhile
        with (
            torch.cuda.device(device),
            # where recording fails, torch.cuda.graph leaves its own stream the current one
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = work()
    except BaseException:
        # and the allocator believing that recording goes on, during which it takes no memory back
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    return graph, result


@contextmanager
def _stand_ins(model: LanguageModel, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The model with other leaves on the same memory in place of ``parameters``, which are returned.

    Autograd sums the gradients of a leaf on the stream that was current when its graph node was made. That of a
    parameter is older than the recording, and what runs on another stream cannot be recorded.
    """
    fresh = {id(parameter): parameter.detach().requires_grad_() for parameter in parameters}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        owned: dict[str, Any] = module._parameters
        for name, parameter in owned.items():
            if id(parameter) in fresh:
                replaced.append((owned, name, parameter))
    try:
        for owner, name, parameter in replaced:
            owner[name] = fresh[id(parameter)]
        yield [fresh[id(parameter)] for parameter in parameters]
    finally:
        for owner, name, parameter in replaced:
            owner[name] = parameter


def _static(chunk: Chunk) -> Chunk:
    """A chunk on memory of its own, into which :func:`_load` puts the tokens and targets of others like it."""
    inputs = chunk.inputs
    assert inputs.input_ids is not None
    part = slice(chunk.start, chunk.stop)
    own = replace(
        inputs,
        input_ids=inputs.input_ids[:, part].clone(),
        valid=None,
        targets=inputs.targets[:, part].clone(),
    )
    return Chunk(own, chunk.index, 0, chunk.length, predicts=True, is_full=True)


def _load(static: Chunk, chunk: Chunk) -> None:
    part = slice(chunk.start, chunk.stop)
    assert static.inputs.input_ids is not None and chunk.inputs.input_ids is not None
    static.inputs.input_ids.copy_(chunk.inputs.input_ids[:, part])
    static.inputs.targets.copy_(chunk.inputs.targets[:, part])


def _copy_states(targets: list[ExactStates], sources: list[ExactStates]) -> None:
    torch._foreach_copy_(_state_tensors(targets), _state_tensors(sources))


def _state_tensors(states: list[ExactStates]) -> list[Tensor]:
    """The tensors that make up exact states, in a fixed order."""
    tensors: list[Tensor] = []
    for pair in states:
        for state in pair:
            tensors += [state.shift, *_memory_tensors(state.memory)]
            if state.carried is not None and state.border is not None:
                tensors += [state.carried, *state.border]
    return tensors


def _memory_tensors(memory: Any) -> list[Tensor]:
    if memory is None:
        return []
    if isinstance(memory, FixedPoint):
        return [memory.mantissa, memory.exponent, memory.value(), memory.fingerprint()]
    return [memory]


def _clone(state: CellState) -> CellState:
    tensors = [tensor.clone() for tensor in _memory_tensors(state.memory)]
    memory: Any = None
    if isinstance(state.memory, FixedPoint):
        memory = FixedPoint(*tensors)
    elif tensors:
        memory = tensors[0]
    carried = None if state.carried is None else state.carried.clone()
    border = None if state.border is None else Border(*(tensor.clone() for tensor in state.border))
    return CellState(state.shift.clone(), memory, carried, border)
