"""A chunk's work in either sweep recorded as a CUDA graph, and replayed for other chunks on the same shapes.

A recording reads and writes tensors of its own: :meth:`run` copies a chunk's tokens and states in and gives what came
out, which holds until the next run. It runs the same kernels on the same shapes as without: the same bits.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rwkv_rev.autograd.stand_ins import StandIns
from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.bptt.backward_sweep import Sums
from rwkv_rev.bptt.chunk_gradients import chunk_gradients
from rwkv_rev.bptt.strategy import Chunk, LossInputs
from rwkv_rev.cells.block import ExactStates, FloatStates
from rwkv_rev.cells.contract import detached
from rwkv_rev.loss import add_gradients
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.reversal.tape import FlatRecord, Tape

if TYPE_CHECKING:
    from rwkv_rev.bptt.sweep import Sweep

_streams: dict[torch.device, torch.cuda.Stream] = {}
"""Where recordings are made, one per device: libraries keep a workspace for every stream they have seen."""

T = TypeVar("T")


class ForwardRecording:
    """A chunk of the forward sweep: tokens and exact states in; exact states and the tape's record out.

    Args:
        chunk: one of the chunks to be run; its length and batch size count, its tokens do not.
        states: likewise.
        pool: memory that recordings which never run at once share; one of its own when None.

    Attributes:
        prints: of every layer in the last run.
        compared: of every layer in the last run, likewise (:class:`.records.Record`).
        record: what the last run would put on the tape if no size depended on the data.
    """

    def __init__(
        self, sweep: "Sweep", chunk: Chunk, states: list[ExactStates], pool: Any | None = None
    ) -> None:
        self._chunk = static(chunk)
        self._before = cloned(states)
        self._needs_more: Callable[[], Tensor] | None = None

        def run() -> tuple[list[ExactStates], Any, Tensor | None, FlatRecord, list[Tensor]]:
            advanced, record = sweep.advance(self._chunk, self._before)
            flat_record = FlatRecord.of(record.tensors(None), sweep.device)
            prints, excess = [layer.print for layer in advanced], record.excess()
            more = None if excess is None else excess.any()
            return [layer.states for layer in advanced], record, more, flat_record, prints

        self._launches, found = _capture(run, sweep.device, pool)
        self.after, self._capture, self._more, self.record, self.prints = found
        self.compared = self._capture.compared

    def run(self, chunk: Chunk, states: list[ExactStates]) -> tuple[list[ExactStates], Tensor | None]:
        """States and coarse parts after ``chunk``, which hold until the next run."""
        load(self._chunk, chunk)
        copy_states(self._before, states)
        self._launches.replay()
        self._needs_more = None if self._more is None else start_copy(self._more)
        return self.after, self._capture.coarse

    def keep(self, tape: Tape) -> Callable[[], None]:
        """Keep the last run's record, before the next run; what is returned puts it on a tape.

        It waits for the last run where its size depends on the data.
        """
        if self._needs_more is not None and self._needs_more():
            whole = FlatRecord.of(self._capture.tensors(self._capture.sizes.cpu()), self.record.data.device)
        else:
            whole = FlatRecord(self.record.data.clone(), self.record.layouts)
        return lambda: tape.push_flat(whole)


class BackwardRecording:
    """A chunk of the backward sweep: exact states, record and gradient by the states after it in; those before it out.

    Each run adds to ``sums``, where a missing one is filled in.

    Args:
        chunk, states, record, to_end: of one of the chunks to be run; their values do not count. ``states`` are those
            after it where there is a ``record``, and for the first chunk; else those before it.
        pool: as of :class:`ForwardRecording`.
        halves: whether it is recorded as two graphs: until the chunk has been computed again and compared, and the
            rest. The host learns from the first what it waits for, while the device is busy with the second.

    Attributes:
        touched: which parameters it gives a gradient.
        states: exact ones before the chunk of the last run. to_start: gradients by their values.
        end: values of the states after it.
    """

    def __init__(
        self,
        sweep: "Sweep",
        sums: Sums,
        chunk: Chunk,
        states: list[ExactStates],
        record: FlatRecord | None,
        to_end: list[list[Tensor]] | None,
        pool: Any | None = None,
        *,
        halves: bool = False,
    ) -> None:
        self._chunk = static(chunk)
        cut = _Cut() if halves else None
        self._given = cloned(states)
        self._capture = None if record is None else FlatRecord(record.data.clone(), record.layouts)
        self._to_end = None if to_end is None else [[g.clone() for g in layer] for layer in to_end]
        self._first: list[ExactStates] = []
        self._prints: list[Tensor] = []
        if chunk.index == 0:
            self._first, self._prints = cloned(sweep.first), [print_.clone() for print_ in sweep.prints[0]]
            sweep = replace(sweep, first=self._first, prints={0: self._prints})
        parameters = sweep.parameters
        parameters.find()
        known = [total is not None for total in sums.parameters]
        self.touched = [False] * len(known)
        self._made = [index for index, there in enumerate(known) if not there]
        for index, parameter in enumerate(parameters.tensors):
            if sums.parameters[index] is None:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                sums.parameters[index] = torch.zeros_like(parameter, dtype=wide)
        totals, loss = [total for total in sums.parameters if total is not None], sums.loss
        assert loss is not None

        def take(indices: Sequence[int], gradients: Sequence[Tensor | WeightProduct | None]) -> None:
            for index, gradient in zip(indices, gradients, strict=True):
                self.touched[index] |= gradient is not None
            add_gradients([totals[index] for index in indices], gradients)

        def run() -> tuple[list[ExactStates], list[list[Tensor]], Tensor | None, list[FloatStates]]:
            self.touched = [False] * len(known)
            tensors = None if self._capture is None else self._capture.tensors()
            # Autograd sums the gradients of a leaf on the stream that was current when its graph node was made. That
            # of a parameter is older than the recording, and what runs on another stream cannot be recorded.
            fresh = StandIns(parameters.tensors, every=True)
            with fresh.within(sweep.model):
                found = chunk_gradients(
                    sweep.model,
                    self._chunk,
                    sweep.replayer(self._chunk, self._given, tensors),
                    sweep.objective,
                    parameters.replaced(fresh.leaves),
                    self._to_end,
                    take,
                    compared=cut,
                )
            loss.add_(found.loss)
            end = [tuple(detached(values) for values in layer) for layer in found.end]
            return found.states, found.to_start, found.exactly, end

        try:
            self._launches, found = _capture(run, sweep.device, pool, cut)
        except BaseException:
            self.touched = [False] * len(known)  # what was launched while recording has not run
            self.finish(sums)
            raise
        self.states, self.to_start, self._exactly, self.end = found

    def fits(self, states: list[ExactStates], record: FlatRecord | None) -> bool:
        """Whether a chunk with these states and this record can be run."""
        if (record is None) != (self._capture is None):
            return False
        if record is not None and self._capture is not None and record.layouts != self._capture.layouts:
            return False
        return same_kind(self._given, states)

    def run(
        self,
        sweep: "Sweep",
        sums: Sums,
        chunk: Chunk,
        states: list[ExactStates],
        record: FlatRecord | None,
        to_end: list[list[Tensor]] | None,
        compared: Callable[[], None] = lambda: None,
    ) -> tuple[list[ExactStates], list[list[Tensor]]]:
        """States before the chunk and gradients by them; both hold until the next run.

        ``compared`` is called when the check of this chunk is among those of ``sums``, between the halves.
        """
        load(self._chunk, chunk)
        copy_states(self._given, states)
        if self._capture is not None and record is not None:
            self._capture.data.copy_(record.data)
        if self._to_end is not None and to_end is not None:
            _copy([g for layer in self._to_end for g in layer], [g for layer in to_end for g in layer])
        if self._first:
            copy_states(self._first, sweep.first)
            _copy(self._prints, sweep.prints[0])

        def noted() -> None:
            if self._exactly is not None:
                sums.checks.append((chunk.index, self._exactly.clone()))
            compared()

        self._launches.replay(noted)
        return self.states, self.to_start

    def finish(self, sums: Sums) -> None:
        """Make sums that nothing was added to None again."""
        for index in self._made:
            if not self.touched[index]:
                sums.parameters[index] = None


def cloned(states: list[ExactStates]) -> list[ExactStates]:
    """The same exact states on memory of their own."""
    return [
        tuple(state.of_computed([tensor.clone() for tensor in state.computed()]) for state in layer)
        for layer in states
    ]


class _Cut:
    """Called by work while it is recorded: what follows goes into another graph."""

    def __init__(self) -> None:
        self.begin_another: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.begin_another()


class _Launches:
    """The graphs of some work, one after another."""

    def __init__(self) -> None:
        self.captured = [torch.cuda.CUDAGraph()]

    def replay(self, behind_first: Callable[[], None] = lambda: None) -> None:
        """Launch them; ``behind_first`` is called when the first one has been launched."""
        first, *others = self.captured
        first.replay()
        behind_first()
        for other in others:
            other.replay()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for garbage: what another model leaves behind may hold graphs and events, and freeing
    them asks for calls that end a recording.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _capture(
    run: Callable[[], T], device: torch.device, pool: Any | None = None, cut: _Cut | None = None
) -> tuple[_Launches, T]:
    """Graphs of ``run``, whose kernels have all run before, and the tensors that replays fill.

    It is one graph, or those that ``run`` is cut into by calling ``cut``.
    """
    torch.cuda.empty_cache()  # the graph has memory of its own: what chunks before it used is free for that
    launches = _Launches()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream = _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
    mode = "thread_local"  # other threads (a process group's watchdog) may use the device meanwhile
    recorder = torch.cuda.graph(launches.captured[0], pool=pool, stream=stream, capture_error_mode=mode)

    def begin_another() -> None:
        launches.captured[-1].capture_end()
        another = torch.cuda.CUDAGraph()
        vars(recorder).update(cuda_graph=another)  # which is ended in its place
        another.capture_begin(pool, capture_error_mode=mode)
        launches.captured.append(another)

    if cut is not None:
        cut.begin_another = begin_another
    try:
        with (
            torch.cuda.device(device),
            # where recording fails, torch.cuda.graph leaves its own stream the current one
            torch.cuda.stream(torch.cuda.current_stream(device)),
            _uncollected(),
            recorder,
        ):
            result = run()
    except BaseException:
        # and the allocator believing that recording goes on, during which it takes no memory back
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    return launches, result


def static(chunk: Chunk) -> Chunk:
    """A chunk on memory of its own, into which :func:`load` puts the tokens and targets of others like it."""
    inputs = chunk.inputs
    assert inputs.input_ids is not None
    part = slice(chunk.start, chunk.stop)
    own = replace(
        inputs,
        input_ids=inputs.input_ids[:, part].clone(),
        valid=None,
        targets=inputs.targets[:, part].clone(),
        weights=None if inputs.weights is None else inputs.weights[:, part].clone(),
        state=inputs.state.detach(),  # whatever graph it had is the caller's
        final_state_gradient=None,
        refuse=LossInputs.refuse,
        divisor=torch.as_tensor(inputs.divisor, dtype=torch.float64, device=inputs.targets.device).clone(),
    )
    return type(chunk)(own, chunk.index, 0, chunk.length, predicts=True, is_full=True)


def load(static: Chunk, chunk: Chunk) -> None:
    part = slice(chunk.start, chunk.stop)
    assert static.inputs.input_ids is not None and chunk.inputs.input_ids is not None
    static.inputs.input_ids.copy_(chunk.inputs.input_ids[:, part])
    static.inputs.targets.copy_(chunk.inputs.targets[:, part])
    if static.inputs.weights is not None and chunk.inputs.weights is not None:
        static.inputs.weights.copy_(chunk.inputs.weights[:, part])
    assert isinstance(static.inputs.divisor, Tensor)
    static.inputs.divisor.fill_(chunk.inputs.divisor)


def same_kind(one: list[ExactStates], other: list[ExactStates]) -> bool:
    """Whether two lists of states have tensors of the same shapes and dtypes."""
    pairs = zip(_computed(one), _computed(other), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def copy_states(targets: list[ExactStates], sources: list[ExactStates]) -> None:
    _copy(_computed(targets), _computed(sources))


def _computed(states: list[ExactStates]) -> list[Tensor]:
    """The tensors that make up exact states, in a fixed order."""
    return [tensor for layer in states for state in layer for tensor in state.computed()]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    # by dtype: PyTorch copies lists of one dtype in one launch
    for dtype in dict.fromkeys(target.dtype for target in targets):
        pairs = [pair for pair in zip(targets, sources, strict=True) if pair[0].dtype == dtype]
        if any(torch.promote_types(dtype, source.dtype) != dtype for _, source in pairs):
            raise RuntimeError(f"a recording that takes {dtype} was given states that are wider")
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
