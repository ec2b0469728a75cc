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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.bptt.backward_sweep import Sums, differentiate
from rwkv_rev.bptt.chunk_gradients import chunk_gradients
from rwkv_rev.bptt.runner import Runner
from rwkv_rev.bptt.strategy import Chunk, LanguageModel
from rwkv_rev.cells.block import ExactStates
from rwkv_rev.loss import add_gradients
from rwkv_rev.reversal.tape import FlatRecord, Tape

if TYPE_CHECKING:
    from rwkv_rev.bptt.sweep import Sweep

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


class RecordingRunner(Runner):
    """Runs chunks by replaying the launches of one of them, where a first chunk shows that the device waits."""

    def __init__(self, sweep: "Sweep") -> None:
        super().__init__(sweep)
        self._records = True
        self._forward: ForwardRecording | None = None
        self._backward: BackwardRecording | None = None

    def advance(self, chunk: Chunk, states: list[ExactStates]) -> list[ExactStates]:
        if chunk.index == 0:
            pace = Pace(self.sweep.device)
            after = super().advance(chunk, states)
            now = random_state.capture(self.sweep.places)
            draws = not now.same(self.sweep.random[0])
            self._records = not draws and pace.waits_for_host()
            return after
        # the first two chunks have made, compiled and loaded all that is made once
        repeated = repeats(chunk, self.sweep.chunks)
        if self._records and self._forward is None and chunk.index > 1 and repeated:
            self._forward = attempt(partial(ForwardRecording, self.sweep, chunk, states))
            self._records = self._forward is not None
        if self._forward is None or not repeated:
            return super().advance(chunk, states)
        self._flush()
        after, coarse = self._forward.run(chunk, states, self.sweep.tape)
        self.sweep.note_coarse(coarse)
        return after

    def turn(self, states: list[ExactStates]) -> list[ExactStates]:
        states = super().turn(states)
        if self._forward is not None:
            states, self._forward = cloned(states), None
        return states

    def differentiate(
        self, chunk: Chunk, states: list[ExactStates], to_end: list[list[Tensor]] | None, sums: Sums
    ) -> tuple[list[ExactStates], list[list[Tensor]]]:
        sweep = self.sweep
        record = sweep.tape.pop_flat() if sweep.is_inner(chunk) else None
        if self._backward is not None and record is not None and to_end is not None:
            if repeats(chunk, sweep.chunks) and self._backward.fits(record):
                return self._backward.run(chunk, states, record, to_end)
            # the memory of its recording is needed now
            states, to_end = cloned(states), [[g.clone() for g in layer] for layer in to_end]
            self._leave()
        elif self._backward is not None:
            states, to_end = cloned(states), [[g.clone() for g in layer] for layer in to_end or []]
            self._leave()
        random_state.restore(sweep.random[chunk.index])
        # recorded after a chunk that has compiled and loaded every kernel, if enough of them are left
        recordable = self._records and repeats(chunk, sweep.chunks) and chunk.index >= FEWEST_CHUNKS
        pace = Pace(sweep.device) if recordable else None
        tensors = None if record is None else record.tensors()
        before, to_start = differentiate(sweep, chunk, states, tensors, to_end, sums)
        if pace is not None and record is not None and pace.waits_for_host():
            new = partial(BackwardRecording, sweep, sums, chunk, before, record, to_start)
            self._backward = attempt(new)
            self._records = self._backward is not None
        elif pace is not None:
            self._records = False
        return before, to_start

    def _leave(self) -> None:
        assert self._backward is not None
        self._backward.finish()
        self._backward = None
        torch.cuda.empty_cache()


class ForwardRecording:
    """A chunk of the forward sweep: tokens and exact states in; exact states and the tape's record out.

    Args:
        chunk: one of the chunks to be run; its length and batch size count, its tokens do not.
        states: likewise.
    """

    def __init__(self, sweep: "Sweep", chunk: Chunk, states: list[ExactStates]) -> None:
        self._chunk = _static(chunk)
        self._before = cloned(states)

        def run() -> tuple[list[ExactStates], Any, FlatRecord]:
            advanced, record = sweep.advance(self._chunk, self._before)
            flat_record = FlatRecord.of(record.tensors(None), sweep.device)
            return [layer.states for layer in advanced], record, flat_record

        self._graph, (self._after, self._record, self._flat) = _record(run, sweep.device)

    def run(
        self, chunk: Chunk, states: list[ExactStates], tape: Tape
    ) -> tuple[list[ExactStates], Tensor | None]:
        """Put the record of ``chunk`` on the tape; states and coarse parts after it, which hold until the next run."""
        _load(self._chunk, chunk)
        _copy_states(self._before, states)
        self._graph.replay()
        sizes = None if self._record.sizes is None else self._record.sizes.cpu()
        if sizes is not None and sizes.any():
            tape.push(self._record.tensors(sizes))
        else:
            tape.push_flat(self._flat)
        return self._after, self._record.coarse


class BackwardRecording:
    """A chunk of the backward sweep: states after it, record, gradient by these states in; the same before it out.

    Each run adds to ``sums``, where a missing one is filled in.

    Args:
        chunk, states, record, to_end: of one of the chunks to be run; their values do not count.
    """

    def __init__(
        self,
        sweep: "Sweep",
        sums: Sums,
        chunk: Chunk,
        states: list[ExactStates],
        record: FlatRecord,
        to_end: list[list[Tensor]],
    ) -> None:
        self._chunk = _static(chunk)
        self._index = chunk.index
        self._after = cloned(states)
        self._record = FlatRecord(record.data.clone(), record.layouts)
        self._to_end = [[gradient.clone() for gradient in layer] for layer in to_end]
        self._sums = sums
        parameters = sweep.parameters
        known = [total is not None for total in sums.parameters]
        self._known = list(known)
        for index, parameter in enumerate(parameters.tensors):
            if sums.parameters[index] is None:
                sums.parameters[index] = torch.zeros_like(
                    parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)
                )
        totals, loss = [total for total in sums.parameters if total is not None], sums.loss
        assert loss is not None

        def take(indices: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
            for index, gradient in zip(indices, gradients, strict=True):
                self._known[index] |= gradient is not None
            add_gradients([totals[index] for index in indices], gradients)

        def run() -> tuple[list[ExactStates], list[list[Tensor]], Tensor | None]:
            self._known = list(known)
            with _stand_ins(sweep.model, parameters.tensors) as tensors:
                found = chunk_gradients(
                    sweep.model,
                    self._chunk,
                    sweep.replayer(self._chunk, self._after, self._record.tensors()),
                    sweep.objective,
                    parameters.replaced(tensors),
                    self._to_end,
                    take,
                )
            loss.add_(found.loss)
            return found.states, found.to_start, found.exactly

        try:
            self._graph, (self._states, self._to_start, self._exactly) = _record(run, record.data.device)
        except BaseException:
            self._known = known  # what was launched while recording has not run
            self.finish()
            raise

    def fits(self, record: FlatRecord) -> bool:
        """Whether a chunk with ``record`` can be run."""
        return record.layouts == self._record.layouts

    def run(
        self, chunk: Chunk, states: list[ExactStates], record: FlatRecord, to_end: list[list[Tensor]]
    ) -> tuple[list[ExactStates], list[list[Tensor]]]:
        """States before the chunk and gradients by them; both hold until the next run."""
        _load(self._chunk, chunk)
        _copy_states(self._after, states)
        self._record.data.copy_(record.data)
        torch._foreach_copy_(
            [gradient for layer in self._to_end for gradient in layer],
            [gradient for layer in to_end for gradient in layer],
        )
        self._graph.replay()
        if self._exactly is not None:
            self._sums.checks.append((chunk.index, self._exactly.clone()))
        return self._states, self._to_start

    def finish(self) -> None:
        """Make sums that nothing was added to None again."""
        for index, known in enumerate(self._known):
            if not known:
                self._sums.parameters[index] = None


def cloned(states: list[ExactStates]) -> list[ExactStates]:
    """The same exact states on memory of their own."""
    return [
        tuple(state.of_computed([tensor.clone() for tensor in state.computed()]) for state in layer)
        for layer in states
    ]


def _record(run: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of ``run``, whose kernels have all run before, and the tensors that its replays fill."""
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
            result = run()
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
    torch._foreach_copy_(_computed(targets), _computed(sources))


def _computed(states: list[ExactStates]) -> list[Tensor]:
    """The tensors that make up exact states, in a fixed order."""
    return [tensor for layer in states for state in layer for tensor in state.computed()]
