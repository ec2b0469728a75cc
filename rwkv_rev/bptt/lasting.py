"""Recordings that last: a step that does the same work as the one before replays what that one was recorded as.

Weights are updated in place, so a recording sees the new ones; what the sweeps compute of them once, the plan, is
copied into the recorded one. Four recordings share one memory: a chunk of the first sweep, and the last, an inner and
the first chunk of the second. They are made at the end of the first step of a kind, which has compiled and loaded
every kernel, and whose last chunk shows whether the device waits for the host; at the begin of the second where an
optimizer may want the memory in between. They are kept for one kind of work per model, and dropped where the device
has little memory left beside them.

A kind of work is all that a launch may depend on but the numbers: shapes, strategy, precision, which parameters are
trained and where they lie, what modules go by (:mod:`rwkv_rev.module_settings`). Models with other code of others than
adapters of peft in them are never run so: it may do another thing at each call.
"""

import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_rev import random_state
from rwkv_rev.bptt import cuda_graphs
from rwkv_rev.bptt.backward_sweep import Sums, comparison, differentiate
from rwkv_rev.bptt.cuda_graphs import RecordingRunner
from rwkv_rev.bptt.recordings import BackwardRecording, ForwardRecording, cloned, same_kind
from rwkv_rev.bptt.runner import Runner
from rwkv_rev.bptt.strategy import Chunk, planned_lengths
from rwkv_rev.cells.block import ExactStates, Plans
from rwkv_rev.cells.contract import tensors_of, values_like
from rwkv_rev.module_settings import settings
from rwkv_rev.wkv.dispatch import choose_kernel

if TYPE_CHECKING:
    from rwkv_rev.bptt.sweep import Sweep
    from rwkv_rev.distributed.context_group import ContextGroup

LEAST_FREE = 0.05
"""Share of the device's memory that must be free beside recordings, for what comes between two losses."""

OPTIMIZER_ROOM = 4
"""Bytes, by those of the trained parameters, that a first optimizer step may want: gradients, AdamW's two, one more."""


class Kept:
    """What is kept for a model: the kind of work of its last step, and its recordings if that comes again.

    ``wanted``: the device waited for the host in the first such step. ``refused``: there was no memory for them.
    ``holds_memory``: recordings are gone, and the allocator still keeps what they ran in.
    """

    def __init__(self, kind: Any, *, wanted: bool = False, refused: bool = False) -> None:
        self.kind = kind
        self.wanted = wanted
        self.refused = self.holds_memory = refused
        self.recordings: Recordings | None = None


_kept: "weakref.WeakKeyDictionary[nn.Module, Kept]" = weakref.WeakKeyDictionary()


def recordings_for(sweep: "Sweep") -> "Recordings | None":
    """The recordings of a sweep's kind of work, made now if they are wanted; None where there are none."""
    model: Any = sweep.model
    kept = _kept.get(model)
    if kept is None or kept.kind is None:
        return None
    same = kept.kind == kind_of(sweep)
    if not same and kept.recordings is not None:
        kept.recordings, kept.holds_memory = None, True
    if kept.holds_memory:  # which is needed by what comes now
        kept.holds_memory = False
        torch.cuda.empty_cache()
    if not same or kept.refused or not kept.wanted:
        return None
    if kept.recordings is not None and not kept.recordings.take_plan(sweep):
        kept.recordings = None  # other widths of remnants
    if kept.recordings is None:
        try:
            kept.recordings = cuda_graphs.attempt(lambda: Recordings(sweep), memory_is_a_reason=False)
        except torch.OutOfMemoryError:
            drop(sweep)
            torch.cuda.empty_cache()
    return kept.recordings


def recordings_of_all(sweep: "Sweep", group: "ContextGroup") -> "Recordings | None":
    """:func:`recordings_for`, where ranks share a context: all of them have recordings, or none.

    What NCCL sends is recorded by all ranks or by none. Recording itself sends nothing.
    """
    found = recordings_for(sweep)
    if group.everywhere(found is not None):
        return found
    if found is not None:
        drop(sweep)
    return None


def note(sweep: "Sweep", sums: Sums, *, waits: bool) -> None:
    """After a step without lasting recordings: keep what was done, and whether the device waited for the host.

    If it did, recordings are made now where there is room for them, and take over the step's ``sums``.
    """
    model: Any = sweep.model
    kind, before = kind_of(sweep), _kept.get(model)
    if before is not None and before.kind == kind and before.refused:
        return
    kept = _kept[model] = Kept(kind, wanted=waits)
    if not waits or kind is None:
        return
    trained = sum(tensor.nbytes for tensor in sweep.parameters.tensors)
    with suppress(torch.OutOfMemoryError):  # then the next step tries it, with nothing in the way
        made = cuda_graphs.attempt(lambda: Recordings(sweep, sums.parameters), memory_is_a_reason=False)
        if made is not None and made.leaves(OPTIMIZER_ROOM * trained):
            made.hand_over(sweep, sums)
            kept.recordings = made
            return
    kept.holds_memory = True


def drop(sweep: "Sweep") -> None:
    """Drop the recordings of a model, and make none for this kind of work."""
    model: Any = sweep.model
    _kept[model] = Kept(kind_of(sweep), refused=True)


def forget(model: nn.Module) -> None:
    """Drop what is kept for a model and its parts, as if it had made no step.

    Recordings hold the communicator by which ranks share a context, and NCCL does not let go of it before they do.
    """
    for module in model.modules():
        _kept.pop(module, None)


def drop_all() -> None:
    """Drop all recordings, which the next steps make again."""
    _kept.clear()


def kind_of(sweep: "Sweep") -> Any:
    """All that the launches of a chunk may depend on, but numbers on the device; None where they may on more."""
    if not _can_last(sweep):
        return None
    model: Any = sweep.model
    kind, length = sweep.device.type, sweep.strategy.chunk_length
    found = (
        sweep.strategy.name,
        length,
        sweep.inputs.targets.shape[0],
        sweep.device,
        sweep.inputs.final_state_gradient is not None,
        sweep.inputs.weights is not None,
        [tensor.dtype for tensor in sweep.inputs.state.tensors()],
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,  # the older getter ends in an error where this was set
        choose_kernel(None, next(model.parameters())),
        sweep.inputs.group,
        settings(model),
    )
    # asked last: it waits for the device
    return found if all(plan.holds(plan) for plan in _each(sweep.plans[length])) else None


def _can_last(sweep: "Sweep") -> bool:
    length = sweep.strategy.chunk_length
    if sweep.strangers.more or sweep.inputs.input_ids is None:
        return False
    return planned_lengths(sweep.chunks).count(length) >= 2


class Recordings:
    """The four recordings of one kind of work, and the sums that a step's chunks add to.

    Args:
        sums: memory of these from a step that has ended; their own when None.

    Attributes:
        reserved: bytes of the memory that they run in.
    """

    def __init__(self, sweep: "Sweep", sums: list[Tensor | None] | None = None) -> None:
        length = sweep.strategy.chunk_length
        self._plans = sweep.plans[length]
        for plan in _each(self._plans):
            plan.prepare()
        tensors = sweep.parameters.tensors
        self._sums: list[Tensor | None] = [None] * len(tensors) if sums is None else sums.copy()
        self._device = sweep.device
        in_float64 = any(p.dtype == torch.float64 for p in sweep.model.parameters())
        dtype = torch.float64 if in_float64 else torch.float32
        self._loss = torch.zeros((), dtype=dtype, device=sweep.device)
        of_recordings = Sums(self._sums, None, loss=self._loss)  # type: ignore[arg-type]
        torch.cuda.empty_cache()
        others = torch.cuda.memory_reserved(sweep.device)
        pool = torch.cuda.graph_pool_handle()
        example = sweep.chunks[0]
        first, inner, last = (type(example)(example.inputs, i, 0, length, True, True) for i in (0, 1, 2))
        self.forward = ForwardRecording(sweep, inner, sweep.first, pool)
        if not same_kind(self.forward.after, sweep.first):
            # a state that was given in 16 bits goes on in 32; shapes and dtypes alone count here
            self.forward = ForwardRecording(sweep, inner, self.forward.after, pool)
        to_end = sweep.to_end()
        # shapes alone count here: nothing has run, and the numbers in these tensors are whatever was there
        sweep.prints[0] = [print_.clone() for print_ in self.forward.prints]
        several = replace(sweep, chunks=[first, inner, last])
        self.last = BackwardRecording(several, of_recordings, last, self.forward.after, None, to_end, pool)
        after, gradient = self.last.states, self.last.to_start
        self.inner = BackwardRecording(
            several, of_recordings, inner, after, self.forward.record, gradient, pool
        )
        after = self.inner.states
        self.first = BackwardRecording(
            several, of_recordings, first, after, None, gradient, pool, halves=True
        )
        self.reserved = torch.cuda.memory_reserved(sweep.device) - others

    def take_plan(self, sweep: "Sweep") -> bool:
        """Copy a sweep's plan into the recorded one, which takes its place there; False where it does not fit."""
        length = sweep.strategy.chunk_length
        old, new = _each(self._plans), _each(sweep.plans[length])
        if not all(plan.holds(other) for plan, other in zip(old, new, strict=True)):
            return False
        tensors, others = ([tensor for plan in plans for tensor in plan.tensors()] for plans in (old, new))
        if tensors:
            torch._foreach_copy_(tensors, others)
        sweep.plans[length] = self._plans
        return True

    def begin(self, sums: Sums) -> None:
        """Start a step's sums from zero."""
        there = [total for total in self._sums if total is not None]
        if there:
            torch._foreach_zero_(there)
        self._loss.zero_()
        sums.parameters[:] = self._sums
        sums.loss = self._loss

    def finish(self, sweep: "Sweep", sums: Sums) -> None:
        """Hand the sums of a step that was run so over: without those that nothing was added to."""
        each = (self.last.touched, self.inner.touched, self.first.touched)
        known = [any(flags) for flags in zip(*each, strict=True)]
        for index, total in enumerate(sums.parameters):
            if total is self._sums[index] and not known[index]:
                sums.parameters[index] = None
        self.hand_over(sweep, sums)
        assert sums.loss is not None
        sums.loss = sums.loss.clone()

    def hand_over(self, sweep: "Sweep", sums: Sums) -> None:
        """Copy what of a step's sums could be written to by the next one."""
        places, totals = [], []
        for index, (total, parameter) in enumerate(
            zip(sums.parameters, sweep.parameters.tensors, strict=True)
        ):
            if total is None or total is not self._sums[index]:
                continue
            if parameter.dtype in (torch.float16, total.dtype):  # else it is handed out in another dtype
                places.append(index)
                totals.append(total)
        copies = [torch.empty_like(total) for total in totals]
        if copies:
            torch._foreach_copy_(copies, totals)
        for index, copy in zip(places, copies, strict=True):
            sums.parameters[index] = copy

    def leaves(self, room: int = 0) -> bool:
        """Whether the device has memory left beside them, and ``room`` bytes more."""
        free, total = torch.cuda.mem_get_info(self._device)
        # what the allocator has and does not use is free as well, but for what recordings run in
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + idle - self.reserved >= LEAST_FREE * total + room


class NotingRunner(RecordingRunner):
    """Runs a step by recordings of its own, and notes what it did for the next one."""

    def finish(self, sums: Sums) -> None:
        note(self.sweep, sums, waits=self.waits)


class TogetherRunner(Runner):
    """Runs a step of ranks that share a context without recordings, and notes what it did for the next one."""

    def finish(self, sums: Sums) -> None:
        model: Any = self.sweep.model
        first, *others = self.sweep.random
        draws = any(other is not first for other in others)  # the same one where nothing is drawn
        before, kind = _kept.get(model), kind_of(self.sweep)
        if before is None or before.kind != kind or not before.refused:
            _kept[model] = Kept(kind, wanted=not draws)


class LastingRunner(Runner):
    """Runs every whole chunk of a step by recordings that were made in another."""

    def __init__(self, sweep: "Sweep", recordings: Recordings) -> None:
        super().__init__(sweep)
        self._recordings = recordings
        sweep.first = [  # with all that is computed of them, which three runs ask for
            tuple(state.of_computed(state.computed()) for state in layer) for layer in sweep.first
        ]

    def advance(self, chunk: Chunk, states: list[ExactStates]) -> list[ExactStates]:
        if not self._same(chunk):
            return super().advance(chunk, states)
        put_on_the_tape, forward = self._take_out(), self._recordings.forward
        after, coarse = forward.run(chunk, states)
        put_on_the_tape()  # only now: the device is busy with this chunk
        self.sweep.note_compared(forward.compared)
        if chunk.index == 0:
            self.sweep.prints[0] = [print_.clone() for print_ in forward.prints]
        else:
            self._pending = partial(forward.keep, self.sweep.tape)
        self.sweep.note_coarse(coarse)
        return after

    def turn(self, states: list[ExactStates]) -> list[ExactStates]:
        return cloned(super().turn(states))

    def begin(self, sums: Sums) -> None:
        self._recordings.begin(sums)

    def differentiate(
        self, chunk: Chunk, states: list[ExactStates], to_end: list[list[Tensor]] | None, sums: Sums
    ) -> tuple[list[ExactStates], list[list[Tensor]]]:
        sweep, made = self.sweep, self._recordings
        record = sweep.tape.pop_flat() if sweep.is_inner(chunk) else None
        ends = chunk.index == len(sweep.chunks) - 1
        recording = made.last if ends else made.first if chunk.index == 0 else made.inner
        fits = self._same(chunk) and chunk.predicts and recording.fits(states, record)
        if not fits:
            random_state.restore(sweep.random[chunk.index])
            tensors = None if record is None else record.tensors()
            return differentiate(sweep, chunk, states, tensors, to_end, sums, recorded=True)

        def compared() -> None:
            if chunk.index == 0:  # the last one to be compared: the host need not wait for its gradients
                sums.compare = comparison(sweep, sums)

        found = recording.run(sweep, sums, chunk, states, record, to_end, compared)
        if ends:
            sums.end = [
                tuple(values_like(values, [part.clone() for part in tensors_of(values)]) for values in layer)
                for layer in recording.end
            ]
        return found

    def finish(self, sums: Sums) -> None:
        self._recordings.finish(self.sweep, sums)
        group, leaves = self.sweep.inputs.group, self._recordings.leaves()
        if not (leaves if group is None else group.everywhere(leaves)):
            drop(self.sweep)

    def _same(self, chunk: Chunk) -> bool:
        return chunk.is_full and chunk.length == self.sweep.strategy.chunk_length


def _each(plans: list[Plans]) -> list[Any]:
    """The plans of all cells that have one."""
    return [plan for layer in plans for plan in layer if plan is not None]
