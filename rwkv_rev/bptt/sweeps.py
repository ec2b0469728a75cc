"""Two sweeps over the chunks: states forward, then gradients backward, in memory that does not grow with T.

*Forward sweep*, without graph: chunk by chunk, exact states forward, and what is needed to come back onto the tape;
no head, no loss, nothing for the last chunk. *Backward sweep*: from the last chunk to the first, layer by layer
upward, recover the state before the chunk, compute the chunk again with graph, then its loss, then one
``autograd.grad`` into which the state gradients of the chunk after it are injected. Parameter gradients are summed
in float32 or wider.

Both sweeps run inside the forward pass of one autograd function (:class:`rwkv_rev.loss.FinishedGradients`), under
the caller's autocast; its backward pass scales and returns the finished gradients. Cost: one forward pass without
head more than ordinary back-propagation. The first chunk starts at the given state and the last one ends the forward
sweep, so neither needs the tape.

Both sweeps do the same arithmetic on the same chunk shapes; random generators are captured per chunk where dropout
draws. Under float16 autocast each chunk's graph is differentiated with a loss scale, lowered until it is finite. On a
GPU all chunks that do the same work are replays of one recording (:mod:`rwkv_rev.bptt.cuda_graphs`).

Whether states were rebuilt to the bit is looked at once per chunk on the CPU, and at the end of the sweep on a GPU
(one transfer); either way before any gradient is returned.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.bptt import cuda_graphs, random_state
from rwkv_rev.bptt.strategy import (
    Chunk,
    LanguageModel,
    LossInputs,
    LossResult,
    Strategy,
    flatten_states,
    trainable,
    uncached_autocast,
)
from rwkv_rev.cells.block import BlockReplay, ExactStates, FloatStates, Plans, Remnants
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.loss import FinishedGradients, add_gradients, cross_entropy_gradients
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.state import RwkvRevState

HALF_PRECISION_LOSS_SCALE = 2.0**15
SMALLEST_LOSS_SCALE = 2.0**-10


class Record(NamedTuple):
    """What a chunk puts on the tape.

    Attributes:
        raised: [L, B, H] bool, on the device: heads whose grid rose, the one thing that a record's size depends on;
            None where nothing does.
        tensors: the record, a list of tensors per layer, from ``raised`` on the host.
    """

    raised: Tensor | None
    tensors: Callable[[Tensor | None], list[list[Tensor]]]

    def start(self) -> Callable[[], list[list[Tensor]]]:
        """A function that gives the record; called a chunk later, it does not wait for the device."""
        raised = None if self.raised is None else start_copy(self.raised)
        return lambda: self.tensors(None if raised is None else raised())


class Recovered(NamedTuple):
    """A layer's chunk computed again; ``exactly``, a bool scalar, where the state before it had to be rebuilt."""

    replay: BlockReplay
    exactly: Tensor | None


class Replayed(NamedTuple):
    """All layers of a chunk computed again: output [B, C, D], layers, and [L] bool, see :class:`Recovered`."""

    out: Tensor
    layers: list[BlockReplay]
    exactly: Tensor | None


class ChunkGradients(NamedTuple):
    """Gradients of one chunk: its loss, by parameter, by the state before it, by its embeddings."""

    loss: Tensor
    parameters: list[Tensor | None]
    state: list[Tensor]
    embeds: Tensor | None


class ChunkResult(NamedTuple):
    """What the backward sweep takes from one chunk.

    ``states`` are the exact ones before it, ``end`` the state after it, ``exactly`` as in :class:`Replayed`.
    """

    gradients: ChunkGradients
    states: list[ExactStates]
    end: RwkvRevState
    exactly: Tensor | None


class Work(NamedTuple):
    """What both sweeps go through.

    Attributes:
        chunks: of the batch ``inputs``.
        plans: of every layer, by the length of a chunk.
        first: exact states before the first chunk.
        tape: records of all chunks but the first and the last.
        random: the generators' states before each chunk, where the model draws.
        graphs: whether CUDA graphs may stand for chunks.
    """

    model: LanguageModel
    inputs: LossInputs
    chunks: list[Chunk]
    plans: dict[int, list[Plans]]
    first: list[ExactStates]
    tape: Tape
    random: list[list[Tensor]] | None
    graphs: bool


class SweepResult(NamedTuple):
    """Loss, state after the last token, sums of the parameters' gradients, those by the first state and embeddings."""

    loss: Tensor
    end: RwkvRevState
    parameters: list[Tensor | None]
    state: list[Tensor]
    embeds: list[Tensor | None]


class TwoSweeps(Strategy):
    """Base of the strategies that recover exact boundary states.

    ``repeatable`` says that all inner chunks do the same work, so that a CUDA graph of one can stand for them.
    """

    repeatable = False

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        leaves = trainable(model, inputs)
        if not torch.is_grad_enabled() or not leaves:
            return self.stream(model, inputs)
        outcome: dict[str, Any] = {}

        def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
            with uncached_autocast(inputs.targets.device):
                return self._sweep(model, inputs, leaves, outcome)

        loss, *state = FinishedGradients.apply(compute, *leaves)
        return LossResult(loss, RwkvRevState(*state), outcome)

    # --- what a strategy fills in -------------------------------------------------------------------------------

    def begin(self, model: LanguageModel, inputs: LossInputs) -> None:
        """Called before the first chunk; refuses what cannot work."""

    def prepare(self, states: list[ExactStates]) -> list[ExactStates]:
        """The exact states the sweep starts from."""
        return states

    @abstractmethod
    def record(
        self,
        model: LanguageModel,
        before: list[ExactStates],
        after: list[ExactStates],
        remnants: list[Remnants],
    ) -> Record:
        """What to put on the tape for a chunk."""

    @abstractmethod
    def recover(
        self,
        model: LanguageModel,
        layer: int,
        x: Tensor,
        after: ExactStates,
        record: list[Tensor],
        chunk: Chunk,
        plans: Plans,
    ) -> Recovered:
        """Layer ``layer`` of a chunk with graph, its exact states before the chunk recovered from ``record``."""

    def finish(self, outcome: dict[str, Any]) -> None:
        """Called after the last chunk; adds to the report."""

    # --- the sweeps ---------------------------------------------------------------------------------------------

    def _sweep(
        self, model: LanguageModel, inputs: LossInputs, leaves: list[Tensor], outcome: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], list]:
        self.begin(model, inputs)
        chunks = inputs.chunks(self.chunk_length)
        plans = {
            length: [block.plan(length) for block in model.blocks] for length in {c.length for c in chunks}
        }
        device = inputs.targets.device
        outcome.update(strategy=self.name, chunk_length=self.chunk_length)
        parameters = [leaf for leaf in model.parameters() if leaf.requires_grad]  # type: ignore[attr-defined]
        with Tape(self.tape, device, self.tape_dir) as tape:
            first = self.prepare(
                [block.exact(_detached(inputs.state.layer(i))) for i, block in enumerate(model.blocks)]
            )
            draws = random_state.draws(model)
            plain = not draws and not _half(device) and not model.checkpoints_blocks
            graphs = self.repeatable and plain and cuda_graphs.worthwhile(chunks, device)
            work = Work(model, inputs, chunks, plans, first, tape, [] if draws else None, graphs)
            last = self._forward_sweep(work)
            outcome["tape_bytes"] = tape.peak_nbytes
            found = self._backward_sweep(work, last, parameters)
            self.finish(outcome)
        return (
            found.loss,
            tuple(found.end.tensors()),
            _in_order(leaves, inputs, parameters, found),
        )

    @torch.no_grad()
    def _forward_sweep(self, work: Work) -> list[ExactStates]:
        """Exact states before the last chunk; fills the tape."""
        model, _, chunks, plans, states, tape, random, graphs = work
        pending: Callable[[], list[list[Tensor]]] | None = None
        graph: cuda_graphs.ForwardGraph | None = None
        draws = random is not None

        def advance(chunk: Chunk, states: list[ExactStates]) -> tuple[list[ExactStates], Record]:
            after, remnants = _advance(model, chunk, states, plans[chunk.length], draws=draws)
            return after, self.record(model, states, after, remnants)

        for chunk in chunks[:-1]:
            if random is not None:
                random.append(random_state.capture(chunk.inputs.targets.device))
            if chunk.index == 0:
                pace = cuda_graphs.Pace(chunk.inputs.targets.device) if graphs else None
                states, _ = _advance(model, chunk, states, plans[chunk.length], draws=draws)
                graphs = pace is not None and pace.waits_for_host()
                continue
            # the first two chunks have made, compiled and loaded all that is made once
            if graphs and graph is None and chunk.index > 1 and cuda_graphs.repeats(chunk, chunks):
                graph = cuda_graphs.attempt(partial(cuda_graphs.ForwardGraph, chunk, states, advance))
                graphs = graph is not None
            replayed = graph is not None and cuda_graphs.repeats(chunk, chunks)
            if not replayed:
                after, record = advance(chunk, states)
            # only now: the device is busy with the next chunk
            if pending is not None:
                tape.push(pending())
                pending = None
            if replayed:
                assert graph is not None
                states = graph.run(chunk, states, tape)
            else:
                pending, states = record.start(), after
        if pending is not None:
            tape.push(pending())
        if random is not None:
            random.append(random_state.capture(chunks[-1].inputs.targets.device))
        return cuda_graphs.cloned(states) if graph is not None else states

    def _backward_sweep(self, work: Work, states: list[ExactStates], parameters: list[Tensor]) -> SweepResult:
        """Gradients of all chunks, from the last, whose exact ``states`` before it are given, to the first."""
        model, inputs, chunks, plans, first, tape, random, graphs = work
        device = inputs.targets.device
        loss: Tensor | None = None
        sums: list[Tensor | None] = [None] * len(parameters)
        embeds: list[Tensor | None] = []
        checks: list[tuple[int, Tensor]] = []
        incoming = _final_state_gradients(inputs)
        end, following = None, None
        graph: cuda_graphs.BackwardGraph | None = None

        def differentiate(
            chunk: Chunk,
            after: list[ExactStates],
            record: list[list[Tensor]],
            incoming: list[Tensor],
            parameters: list[Tensor],
        ) -> ChunkResult:
            replay = self._replayer(model, chunk, plans[chunk.length], after, record)
            return self._scaled_gradients(model, chunk, replay, parameters, incoming, 1.0)

        for chunk in reversed(chunks):
            record = tape.pop_flat() if 0 < chunk.index < len(chunks) - 1 else None
            if graph is not None and record is not None and graph.fits(chunk, record, chunks):
                assert incoming is not None
                states, incoming, exactly = graph.run(chunk, states, record, incoming)
                if exactly is not None:
                    checks.append((chunk.index, exactly))
                continue
            if graph is not None:  # the memory of its recording is needed now
                states, incoming = cuda_graphs.cloned(states), [g.clone() for g in incoming or []]
                graph.finish()
                graph = None
                torch.cuda.empty_cache()
            if random is not None:
                random_state.restore(random[chunk.index], device)
            if record is None:
                known = first if chunk.index == 0 else states
                replay = self._replayer(model, chunk, plans[chunk.length], known, None)
            else:
                replay = self._replayer(model, chunk, plans[chunk.length], states, record.tensors())
            # recorded after a chunk that has compiled and loaded every kernel, if enough of them are left
            recordable = (
                graphs and cuda_graphs.repeats(chunk, chunks) and chunk.index >= cuda_graphs.FEWEST_CHUNKS
            )
            pace = cuda_graphs.Pace(device) if recordable else None
            found = self._chunk_gradients(model, chunk, replay, parameters, incoming, device)
            states, incoming = found.states, found.gradients.state
            if found.exactly is not None:
                checks.append((chunk.index, found.exactly))
                if device.type != "cuda":  # there once, at the end: no chunk waits for the one before
                    _compare(checks)
            if end is None:
                end = found.end
                # whoever draws after this loss goes on from the last token, not from the first chunk
                following = random_state.capture(device) if random is not None else None
            loss = found.gradients.loss.clone() if loss is None else loss.add_(found.gradients.loss)
            sums = add_gradients(sums, found.gradients.parameters)
            embeds.append(found.gradients.embeds)
            del found, replay  # or the chunk's gradients would stay in memory during the next one
            if pace is not None and record is not None:
                graphs = pace.waits_for_host()
                if graphs:
                    new = partial(cuda_graphs.BackwardGraph, model, parameters, sums, loss)
                    graph = cuda_graphs.attempt(partial(new, chunk, states, record, incoming, differentiate))
                    graphs = graph is not None
        _compare(checks)
        if following is not None:
            random_state.restore(following, device)
        assert loss is not None and end is not None and incoming is not None
        return SweepResult(loss, end, sums, incoming, embeds)

    def _replayer(
        self,
        model: LanguageModel,
        chunk: Chunk,
        plans: list[Plans],
        states: list[ExactStates],
        record: list[list[Tensor]] | None,
    ) -> Callable[[Tensor], Replayed]:
        """A function of the chunk's embedded input; ``states`` are those before it, or after it with a ``record``."""

        def run(x: Tensor) -> Replayed:
            mask = chunk.mask()
            layers: list[BlockReplay] = []
            exactly: list[Tensor] = []
            for layer, block in enumerate(model.blocks):
                if record is None:
                    replay = block.replay(
                        x, states[layer], mask, plans=plans[layer], checkpointed=model.checkpoints_blocks
                    )
                else:
                    replay, rebuilt = self.recover(
                        model, layer, x, states[layer], record[layer], chunk, plans[layer]
                    )
                    if rebuilt is not None:
                        exactly.append(rebuilt)
                x = replay.out
                layers.append(replay)
            return Replayed(x, layers, torch.stack(exactly) if exactly else None)

        return run

    def _chunk_gradients(
        self,
        model: LanguageModel,
        chunk: Chunk,
        replay: Callable[[Tensor], Replayed],
        parameters: list[Tensor],
        incoming: list[Tensor] | None,
        device: torch.device,
    ) -> ChunkResult:
        half = _half(device)
        scale = HALF_PRECISION_LOSS_SCALE if half else 1.0
        random = random_state.capture(device) if half else None
        while True:
            found = self._scaled_gradients(model, chunk, replay, parameters, incoming, scale)
            if not half or scale <= SMALLEST_LOSS_SCALE or _all_finite(found.gradients):
                return found._replace(gradients=_unscaled(found.gradients, scale))
            scale /= 16
            random_state.restore(random or [], device)

    def _scaled_gradients(
        self,
        model: LanguageModel,
        chunk: Chunk,
        replay: Callable[[Tensor], Replayed],
        parameters: list[Tensor],
        incoming: list[Tensor] | None,
        scale: float,
    ) -> ChunkResult:
        embeds = chunk.embeds()
        with torch.enable_grad():
            if embeds is not None:
                embeds = embeds.detach().requires_grad_()
            x, layers, exactly = replay(chunk.embed(model, embeds))
            hidden = model.normalize(x)
        starts = flatten_states([layer.start for layer in layers])
        ends = flatten_states([layer.end for layer in layers])
        outputs, output_gradients = [], []
        head_parameters = [p for p in model.head.parameters() if p.requires_grad]
        head_gradients: list[Tensor | None] = [None] * len(head_parameters)
        loss = torch.zeros((), device=hidden.device)
        if chunk.predicts:
            loss, to_hidden, head_gradients = cross_entropy_gradients(
                hidden,
                model.head,
                chunk.targets(),
                head_parameters,
                scale=1 / chunk.inputs.divisor,
                vocab_size=model.vocab_size,
                loss_scale=scale,
            )
            outputs.append(hidden)
            output_gradients.append(to_hidden)
        if incoming is not None:
            outputs += ends
            output_gradients += [(g * scale).to(end.dtype) for g, end in zip(incoming, ends, strict=True)]
        wanted = [*parameters, *starts, *([embeds] if embeds is not None else [])]
        found: list[Tensor | None] = [None] * len(wanted)
        pairs = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if o.requires_grad]
        if pairs:
            found = list(
                torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            )
        to_parameters, to_starts = (
            found[: len(parameters)],
            found[len(parameters) : len(parameters) + len(starts)],
        )
        of_head = {id(p): g for p, g in zip(head_parameters, head_gradients, strict=True)}
        to_parameters = [_sum(g, of_head.get(id(p))) for p, g in zip(parameters, to_parameters, strict=True)]
        # copies: a gradient may be a view of one of the chunk's length, which would stay in memory with it
        state = [
            torch.zeros_like(s) if g is None else g.clone() for s, g in zip(starts, to_starts, strict=True)
        ]
        return ChunkResult(
            ChunkGradients(loss, to_parameters, state, found[-1] if embeds is not None else None),
            [layer.states for layer in layers],
            RwkvRevState.stack([_detached(layer.end) for layer in layers]),
            exactly,
        )


def _advance(
    model: LanguageModel, chunk: Chunk, states: list[ExactStates], plans: list[Plans], *, draws: bool
) -> tuple[list[ExactStates], list[Remnants]]:
    """All layers of one chunk forwards: exact states after it, and remnants.

    The top channel mix has no output unless the model ``draws``: then both sweeps have to draw the same numbers.
    """
    mask = chunk.mask()
    x = chunk.embed(model, chunk.embeds())
    after: list[ExactStates] = []
    remnants: list[Remnants] = []
    blocks = model.blocks
    for block, state, plan in zip(blocks, states, plans, strict=True):
        output = draws or block is not blocks[-1]
        x, advanced, remnant = block.advance(x, state, mask, plan, output=output)
        after.append(advanced)
        remnants.append(remnant)
    return after, remnants


def _compare(checks: list[tuple[int, Tensor]]) -> None:
    """Take the checks off the list.

    Raises:
        ReversalMismatchError: a layer's state before a chunk is not the one that was there.
    """
    taken = checks.copy()
    checks.clear()
    if not taken or bool(torch.cat([exactly for _, exactly in taken]).all()):
        return
    for chunk, exactly in taken:
        if not exactly.all():
            layer = int((~exactly).nonzero()[0])
            raise ReversalMismatchError(
                f"the state of layer {layer} before chunk {chunk} could not be rebuilt to the bit: the two sweeps "
                "computed different numbers. Likely causes: a non-deterministic kernel, weights or dropout changed "
                "between the sweeps, another autocast. Use torch.use_deterministic_algorithms(True) or "
                "bptt='checkpoint'"
            )


def _half(device: torch.device) -> bool:
    """Whether float16 autocast is on: gradients of a chunk need a loss scale."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


def _detached(states: FloatStates) -> FloatStates:
    time, channel = states
    assert time.memory is not None
    return (
        type(time)(time.shift.detach(), time.memory.detach()),
        type(channel)(channel.shift.detach(), None),
    )


def _final_state_gradients(inputs: LossInputs) -> list[Tensor] | None:
    given = inputs.final_state_gradient
    if given is None:
        return None
    return flatten_states([given.layer(i) for i in range(given.wkv.shape[0])])


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second


def _unscaled(gradients: ChunkGradients, scale: float) -> ChunkGradients:
    if scale == 1:
        return gradients
    return ChunkGradients(
        gradients.loss,
        [None if g is None else g.float() / scale for g in gradients.parameters],
        [g.float() / scale for g in gradients.state],
        None if gradients.embeds is None else gradients.embeds.float() / scale,
    )


def _all_finite(gradients: ChunkGradients) -> bool:
    tensors = [g for g in [*gradients.parameters, *gradients.state] if g is not None]
    return bool(torch.stack([torch.isfinite(g).all() for g in tensors]).all())


def _in_order(
    leaves: list[Tensor], inputs: LossInputs, parameters: list[Tensor], found: SweepResult
) -> list[Tensor | None]:
    """The finished gradients in the order of ``leaves``."""
    by_tensor: dict[int, Tensor | None] = {
        id(p): g for p, g in zip(parameters, found.parameters, strict=True)
    }
    layers = [found.state[i : i + 3] for i in range(0, len(found.state), 3)]
    stacked = [torch.stack([layer[k].detach() for layer in layers]) for k in (0, 2, 1)]
    by_tensor.update({id(t): g for t, g in zip(inputs.state.tensors(), stacked, strict=True)})
    if inputs.inputs_embeds is not None:
        pieces = [piece for piece in reversed(found.embeds) if piece is not None]
        by_tensor[id(inputs.inputs_embeds)] = torch.cat(pieces, dim=1) if pieces else None
    return [by_tensor.get(id(leaf)) for leaf in leaves]
