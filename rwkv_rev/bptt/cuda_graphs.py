"""Where chunks are run by recordings of their launches, so that a GPU does not wait for the host.

A layer's chunk is some 200 kernel launches, 9 ms of host time, whatever the chunk's length: in short chunks the GPU is
idle for most of a sweep. All inner chunks of a context do exactly the same. In the first step of its kind their
launches are recorded once per sweep, where a first chunk shows that the GPU does wait (:class:`Pace`); if the last one
shows it, too, the same work is run by recordings that last in the next step (:mod:`rwkv_rev.bptt.lasting`).

Chunks that differ (partly masked ones, a shorter last one, those in which a grid rose) and sweeps that draw random
numbers or retry with another loss scale run without a recording. ``RWKV_REV_CUDA_GRAPHS=0`` turns all of it off.
"""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.bptt.backward_sweep import Sums, differentiate
from rwkv_rev.bptt.recordings import BackwardRecording, ForwardRecording, cloned
from rwkv_rev.bptt.runner import Runner
from rwkv_rev.bptt.strategy import Chunk
from rwkv_rev.cells.block import ExactStates

if TYPE_CHECKING:
    from rwkv_rev.bptt.sweep import Sweep

SWITCH = "RWKV_REV_CUDA_GRAPHS"
FEWEST_CHUNKS = 6
"""Inner chunks below which recording, which costs the host as much as running a chunk or two, does not pay."""

HOST_BOUND = 0.1
"""Where less than this share of the launching time is left to wait for the device, the device has waited before."""

_failures: list[str] = []

T = TypeVar("T")


def possible(device: torch.device) -> bool:
    """Whether recordings can be made."""
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0" and not _failures


def worthwhile(chunks: Sequence[Chunk]) -> bool:
    """Whether recordings for one sweep alone pay."""
    return sum(repeats(chunk, chunks) for chunk in chunks) >= FEWEST_CHUNKS


def repeats(chunk: Chunk, chunks: Sequence[Chunk]) -> bool:
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


def attempt(make: Callable[[], T], *, memory_is_a_reason: bool = True) -> T | None:
    """What ``make`` returns, or None with a warning where a graph cannot be recorded; then none is tried again.

    Running out of memory is such a case too, unless the caller says otherwise: the chunk before fitted without a graph.
    """
    try:
        return make()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) and not memory_is_a_reason:
            raise
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        _failures.append(str(cause))
        reason = str(cause).splitlines()[0]
        warnings.warn(f"CUDA graphs are not used, short chunks train more slowly: {reason}", stacklevel=2)
        return None


class RecordingRunner(Runner):
    """Runs chunks by replaying the launches of one of them, where a first chunk shows that the device waits.

    Attributes:
        waits: whether it did in the last chunk of the step, when all that is made once had been made, and nothing
            was drawn.
    """

    def __init__(self, sweep: "Sweep") -> None:
        super().__init__(sweep)
        self._records = True
        self.waits = False
        self._draws = False
        self._forward: ForwardRecording | None = None
        self._backward: BackwardRecording | None = None

    def advance(self, chunk: Chunk, states: list[ExactStates]) -> list[ExactStates]:
        if chunk.index == 0:
            pace = Pace(self.sweep.device)
            after = super().advance(chunk, states)
            now = random_state.capture(self.sweep.places)
            self._draws = not now.same(self.sweep.random[0])
            waits = not self._draws and pace.waits_for_host()
            self._records = waits and worthwhile(self.sweep.chunks)
            return after
        # the first two chunks have made, compiled and loaded all that is made once
        repeated = repeats(chunk, self.sweep.chunks)
        if self._records and self._forward is None and chunk.index > 1 and repeated:
            self._flush()  # what the chunk before has kept tells how much room this one's records need
            self._forward = attempt(partial(ForwardRecording, self.sweep, chunk, states))
            self._records = self._forward is not None
        if self._forward is None or not repeated:
            return super().advance(chunk, states)
        put_on_the_tape = self._take_out()
        after, coarse = self._forward.run(chunk, states)
        put_on_the_tape()
        self._pending = partial(self._forward.keep, self.sweep.tape)
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
        if self._backward is not None and to_end is not None:  # there is a gradient after the last chunk
            if repeats(chunk, sweep.chunks) and self._backward.fits(states, record):
                return self._backward.run(sweep, sums, chunk, states, record, to_end)
            # the memory of its recording is needed now
            states, to_end = cloned(states), [[g.clone() for g in layer] for layer in to_end]
            self._leave(sums)
        random_state.restore(sweep.random[chunk.index])
        # recorded after a chunk that has compiled and loaded every kernel, if enough of them are left
        recordable = self._records and repeats(chunk, sweep.chunks) and chunk.index >= FEWEST_CHUNKS
        ends = chunk.index == 0 and not self._draws
        pace = Pace(sweep.device) if recordable or ends else None
        tensors = None if record is None else record.tensors()
        before, to_start = differentiate(sweep, chunk, states, tensors, to_end, sums, recorded=True)
        if ends and pace is not None:
            self.waits = pace.waits_for_host()
        elif pace is not None and record is not None and pace.waits_for_host():
            new = partial(BackwardRecording, sweep, sums, chunk, before, record, to_start)
            self._backward = attempt(new)
            self._records = self._backward is not None
        elif pace is not None:
            self._records = False
        return before, to_start

    def _leave(self, sums: Sums) -> None:
        assert self._backward is not None
        self._backward.finish(sums)
        self._backward = None
        torch.cuda.empty_cache()
