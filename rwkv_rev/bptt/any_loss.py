"""Any loss on the same two sweeps: the hidden states of a long context as one differentiable operation.

Where somebody computes a loss of their own, from logits or hidden states, the model does not know it when the context
is read. The forward pass is then the first sweep, which hands out the hidden states of every chunk [B, C, D]; the
backward pass is the second one, given the gradient by each chunk's hidden states instead of computing a loss. Kept in
between are the tape and the hidden states, O(T D) numbers, instead of a graph of some 30 T L D; by choice in host
memory, as is then the gradient by them, of which each chunk's part comes to the device when its turn is.

The backward pass runs under the forward's autocast, kernels, random draws, parameters and training or evaluation mode,
whatever thread autograd calls it in. What else modules go by (:mod:`rwkv_rev.module_settings`) must be what it was, but
for what their own calls change each time. So must trained weights, of which checksums are kept as well: 42 ms for 10^8
float32 on two cores, and 6 us for each tensor, twice. Ids, masks and borders are copied.
"""

import contextvars
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from rwkv_rev import random_state
from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.autograd.one_thread import one_thread
from rwkv_rev.autograd.outside_leaves import OutsideLeaves
from rwkv_rev.autograd.stand_ins import StandIns
from rwkv_rev.autograd.withheld_hooks import hooks_withheld
from rwkv_rev.bptt.backward_sweep import LIKELY_CAUSES, backward_sweep
from rwkv_rev.bptt.chunk_gradients import Found
from rwkv_rev.bptt.forward_sweep import forward_sweep
from rwkv_rev.bptt.hidden_states import HiddenStates
from rwkv_rev.bptt.kept_tensors import what_is_kept_is_trained
from rwkv_rev.bptt.leaves import in_order, trainable
from rwkv_rev.bptt.runner import Runner
from rwkv_rev.bptt.strategy import (
    Chunk,
    LanguageModel,
    LossInputs,
)
from rwkv_rev.bptt.sweeps import TwoSweeps, roles, warning_of_coarse_heads
from rwkv_rev.bptt.uncached import uncached
from rwkv_rev.bptt.unchanged import changed_tensor, unchanged, watched
from rwkv_rev.bptt_settings import BpttSettings
from rwkv_rev.errors import ReversalMismatchError, StrategyError
from rwkv_rev.foreign import overriding
from rwkv_rev.foreign.search import Strangers
from rwkv_rev.loss import in_dtypes
from rwkv_rev.model_now import model_now
from rwkv_rev.module_settings import Place, Settings, first_change, notes_of, settings
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.state import ModelState

logger = logging.get_logger(__name__)


def hidden_states(
    strategy: TwoSweeps,
    model: LanguageModel,
    inputs: LossInputs,
    found: Strangers,
    *,
    on_host: bool = False,
) -> tuple[Tensor, ModelState]:
    """Normalised hidden states [B, T, D] of ``inputs`` and the state after them, both differentiable, once.

    Args:
        found: code of others inside the model, of which none may be unknown.
        on_host: whether the hidden states are handed out in host memory.
    """
    if inputs.input_ids is not None:  # often a buffer that the next batch is written to; masks are copies
        inputs = replace(inputs, input_ids=inputs.input_ids.clone())
    parameters: list[Tensor] = list(model.parameters())
    leaves = trainable(parameters, inputs)
    with one_thread():  # another thread's loss puts code of its own into the model meanwhile
        reading = _Reading(strategy, model, inputs, parameters, leaves, found, on_host)
        hidden, *state = _HiddenStates.apply(reading, *leaves)
    return hidden, type(inputs.state)(*state)


class _HiddenStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reading: "_Reading", *leaves: Tensor) -> Any:
        ctx.set_materialize_grads(False)  # what nothing reaches has no gradient, as opposed to zeros
        ctx.reading = reading
        ctx.dtypes = [tensor.dtype for tensor in leaves]
        return reading.forward()

    @staticmethod
    @first_order
    def backward(ctx: Any, to_hidden: Tensor | None, *to_state: Tensor | None) -> Any:
        if ctx.reading is None:
            raise StrategyError(
                "the gradient of these hidden states was already taken, and the tape that it needs is used up: call "
                "the model again, or use bptt='full', whose graph can be kept"
            )
        reading, ctx.reading = ctx.reading, None
        with torch.inference_mode(False):  # whose tensors no graph may hold
            given = [g.clone() if g is not None and g.is_inference() else g for g in (to_hidden, *to_state)]
            found = reading.context.run(reading.backward, given[0], given[1:])
        return (None, *in_dtypes(found, ctx.dtypes))


class _Reading:
    """One context that was read, until its gradient is taken."""

    def __init__(
        self,
        strategy: TwoSweeps,
        model: LanguageModel,
        inputs: LossInputs,
        parameters: list[Tensor],
        leaves: list[Tensor],
        found: Strangers,
        on_host: bool,
    ) -> None:
        self._apart = StandIns(parameters)
        inputs = self._apart.of_inputs(inputs)
        self._strategy, self._model, self._inputs = strategy, model, inputs
        self._leaves = leaves
        self._watched = watched(parameters, found)
        self._versions = [tensor._version for tensor in self._watched]
        self._wanted = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums = _checksums(self._wanted)  # fused optimizers change numbers and no version
        self._read = _read_again(inputs)
        self._versions_read = [tensor._version for _, tensor in self._read]
        self._modes = overriding.foreign_modes()  # declared
        self._autocast = _autocast_now(inputs.targets.device)
        self._as_it_was = model_now(cast(nn.Module, model))
        self.context = contextvars.copy_context()  # autograd's thread of a device has another
        tape = Tape(strategy.tape, inputs.targets.device, strategy.tape_dir)
        self._keeping = partial(what_is_kept_is_trained, model, found)
        with uncached(inputs.targets.device), self._apart.within(model):
            self._sweep = strategy.begin_sweep(model, inputs, self._apart.leaves, found, tape)
        self._sweep.hidden = HiddenStates(on_host=on_host)
        self._runner = Runner(self._sweep)
        self._lifted = [cell.lifts for block in model.blocks for cell in block.cells]
        self._last: list[Any] = []
        self._settings: list[Settings] = []
        self._notes: set[Place] = set()

    def forward(self) -> tuple[Tensor, ...]:
        """Hidden states [B, T, D] and the tensors of the state after them."""
        sweep = self._sweep
        with (
            torch.no_grad(),
            unchanged(self._model, self._watched),
            uncached(sweep.device),
            self._apart.within(self._model),
        ):
            with self._keeping():
                self._last = forward_sweep(sweep, self._runner)
            # calls have gone before the last chunk's: what these change, they change each time
            before = self._settings_now() if sweep.strangers.more else []
            with self._keeping():
                end = sweep.advance_last(self._last)
            self._settings = self._settings_now()
            self._notes = notes_of(before, self._settings)
        warning_of_coarse_heads(sweep)()
        assert sweep.hidden is not None
        hidden, sweep.hidden = sweep.hidden.whole(), None
        return (hidden, *type(self._inputs.state).stack(end).tensors())

    def backward(self, to_hidden: Tensor | None, to_state: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the leaves; None for what a loss does not reach."""
        sweep, kind = self._sweep, type(self._inputs.state)
        sweep.objective = objective = _Given(to_hidden, sweep.hidden_prints)
        to_end = _by_layer(kind, to_state, len(self._model.blocks))
        now = random_state.capture(sweep.places)
        try:
            with torch.no_grad(), self._autocast(), uncached(sweep.device):
                self._lift_as_before()
                self._refuse_another_model()
                with (
                    overriding.functions_as_before(self._modes),
                    self._as_it_was(),
                    hooks_withheld(self._leaves),
                    unchanged(self._model, self._watched),
                    self._apart.within(self._model),
                    self._keeping(),
                    sweep.tape,
                ):
                    result = backward_sweep(sweep, self._runner, self._last, to_end)
                    result.refuse()
        finally:
            random_state.restore(now)
        objective.compare()
        return in_order(self._leaves, roles(self._inputs, self._wanted, result))

    def _lift_as_before(self) -> None:
        """Choose the cells' kind of memory that this context was read with: other losses choose theirs."""
        cells = [cell for block in self._model.blocks for cell in block.cells]
        for cell, lifts in zip(cells, self._lifted, strict=False):
            cell.lift(lifts)

    def _refuse_another_model(self) -> None:
        """Refuse to compute the context again by a model that is not what it was, even where outputs would be the same.

        Raises:
            StrategyError: naming the first thing that changed and is not put back for the second sweep.
        """
        advice = "take the gradient first and change the model then, or use bptt='full'"
        changed = changed_tensor(self._model, self._watched, self._versions)
        if changed is None:
            changed = self._other_numbers()
        for (name, tensor), version in zip(self._read, self._versions_read, strict=True):
            if tensor._version != version:
                changed, advice = name, "take the gradient first, or hand over a copy"
        mode = overriding.first_change(self._modes, overriding.foreign_modes())
        if mode is not None:
            changed = mode
            advice = "take the gradient under the same modes, or use bptt='full'"
        if changed is None:
            with self._as_it_was():
                changed = first_change(self._settings, self._settings_now(), self._notes)
            if changed is None:
                return
            if changed.endswith("hooks"):
                # peft puts hooks for tasks and for several adapters on the layers for the length of a call
                advice = "use bptt='full', or give the model labels, whose loss has its gradient in the forward pass"
            elif not changed.startswith("the module "):
                advice += ". A note that is no setting may be in an object of its own (types.SimpleNamespace)"
        raise StrategyError(
            f"{changed} was changed between the forward pass that gave these hidden states and its gradient, which "
            f"computes the context again: {advice}"
        )

    def _other_numbers(self) -> str | None:
        """The name of a trained parameter whose numbers changed, though its version did not; not seen where freed."""
        before, now = self._sums, _checksums(self._wanted)
        different = (before != now).logical_and_(before != 0).logical_and_(now != 0).nonzero()
        if not len(different):
            return None
        changed = self._wanted[int(different[0])]
        named = cast(nn.Module, self._model).named_parameters()
        return next((name for name, parameter in named if parameter is changed), "a parameter")

    def _settings_now(self) -> list[Settings]:
        return settings(cast(nn.Module, self._model), versions=True)


def _read_again(inputs: LossInputs) -> list[tuple[str, Tensor]]:
    """Tensors of the caller that the second sweep reads once more, by name; those of inference have no version."""
    tensors = [("inputs_embeds", inputs.inputs_embeds), *(("the state", t) for t in inputs.state.tensors())]
    return [(name, tensor) for name, tensor in tensors if tensor is not None and not tensor.is_inference()]


def _checksums(tensors: list[Tensor]) -> Tensor:
    """Of the numbers of each tensor, int64 [n] on the first one's device; 0 where sharding has freed its memory."""
    sums = [
        checksum(t) if t.untyped_storage().nbytes() else torch.zeros((), dtype=torch.int64, device=t.device)
        for t in tensors
    ]
    return torch.stack([one.to(tensors[0].device) for one in sums]) if sums else torch.zeros(0, device="cpu")


def _by_layer(
    kind: type[ModelState], given: list[Tensor | None], layers: int
) -> list[list[Tensor | None]] | None:
    """Gradients by the tensors of a state [L, ...], by layer in the order of its cells; None without any."""
    if all(gradient is None for gradient in given):
        return None
    by_name = dict(zip(kind.names(), given, strict=True))
    ordered = [by_name[name] for _, parts in kind.cells for name in parts]
    return [[None if g is None else g[layer] for g in ordered] for layer in range(layers)]


class _Given:
    """The objective whose gradient by the hidden states [B, T, D] is given, if any; ``prints`` are theirs, by chunk."""

    def __init__(self, to_hidden: Tensor | None, prints: dict[int, Tensor]) -> None:
        self._to_hidden, self._prints = to_hidden, prints
        self._same: list[Tensor] = []

    def __call__(
        self,
        model: LanguageModel,
        chunk: Chunk,
        hidden: Tensor,
        parameters: list[Tensor],
        loss_scale: float,
        outside: OutsideLeaves | None,
    ) -> Found:
        self._same.append(checksum(hidden) == self._prints[chunk.index])
        if self._to_hidden is None:
            return torch.zeros((), device=hidden.device), None, []
        to_hidden = self._to_hidden[:, chunk.start : chunk.stop].to(hidden.device, non_blocking=True)
        return torch.zeros((), device=hidden.device), to_hidden * loss_scale, []

    def compare(self) -> None:
        """Once for all chunks: none waits for the device. A gradient that is not finite is not looked into.

        Raises:
            ReversalMismatchError: hidden states were others than those that were handed out.
        """
        finite = self._to_hidden is None or bool(self._to_hidden.isfinite().all())
        if not bool(torch.stack(self._same).all()) and finite:
            raise ReversalMismatchError(
                f"the final norm computed other numbers in the second sweep than in the first. {LIKELY_CAUSES}"
            )


def _autocast_now(device: torch.device) -> Any:
    """A function that gives a context in which autocast is what it is now, on the device and on the CPU."""
    kinds = {kind: _autocast_of(kind) for kind in {"cpu", device.type}}

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (enabled, dtype) in kinds.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    return again


def _autocast_of(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def tell_of_whole_graph(bptt: BpttSettings) -> None:
    """Warn once where a context would have been cut into chunks, had the model computed the loss."""
    logger.warning_once(
        f"the graph of a whole context is stored: bptt={bptt.strategy!r} was not taken for this loss on logits or "
        "hidden states. Such a gradient is exact, its memory grows with the context; bptt='reversible' keeps it flat "
        "(without output_hidden_states, use_cache=True, or code that is not position-wise), bptt='full' means it"
    )
