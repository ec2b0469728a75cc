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

Both sweeps do the same arithmetic on the same chunk shapes; the states of the random generators before each chunk are
kept and set back for the second sweep. Under float16 each chunk's graph is differentiated with a loss scale, lowered
until it is finite. On a GPU all chunks that do the same work are replays of one recording
(:mod:`rwkv_rev.bptt.cuda_graphs`).

Every number that both sweeps compute is compared: the input of each layer, what it does to its memory, its token
shifts, and the memory before the chunk. That is looked at once per chunk on the CPU, and at the end of the sweep on a
GPU (one transfer); either way before any gradient is returned. The last chunk, and the top layer's output where
nothing draws there, are computed in the second sweep alone: loss and gradient come from the same numbers.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.bptt import cuda_graphs
from rwkv_rev.bptt.strategy import (
    Chunk,
    LanguageModel,
    LossInputs,
    LossResult,
    Strategy,
    devices,
    flatten_states,
    float16_gradients,
    in_order,
    trainable,
    uncached,
    unchanged,
)
from rwkv_rev.cells.block import (
    BEFORE_THE_STATE,
    BlockAdvanced,
    BlockAgain,
    BlockForwards,
    BlockReplay,
    ExactStates,
    FloatStates,
    Plans,
)
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.foreign_code import Strangers
from rwkv_rev.loss import FinishedGradients, add_gradients, scaled, sum_of, wide
from rwkv_rev.outside_leaves import OutsideLeaves
from rwkv_rev.random_state import GeneratorStates
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.reversal.fixed_point import FixedPoint
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.state import RwkvRevState


class Record(NamedTuple):
    """What a chunk puts on the tape.

    Attributes:
        raised: [L, B, H] bool, on the device: heads whose grid rose, the one thing that a record's size depends on;
            None where nothing does.
        tensors: the record, a list of tensors per layer, from ``raised`` on the host.
        coarse: [L, B, H] bool, heads that :meth:`~rwkv_rev.reversal.fixed_point.FixedPoint.coarse` finds after the
            chunk; None for states without a grid.
    """

    raised: Tensor | None
    tensors: Callable[[Tensor | None], list[list[Tensor]]]
    coarse: Tensor | None = None

    def start(self) -> Callable[[], list[list[Tensor]]]:
        """A function that gives the record; called a chunk later, it does not wait for the device."""
        raised = None if self.raised is None else start_copy(self.raised)
        return lambda: self.tensors(None if raised is None else raised())


class Replayed(NamedTuple):
    """All layers of a chunk computed again: output [B, C, D], layers, and [L] bool, which are as they were before."""

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
        prints: of every layer in the first chunk.
        tape: records of all chunks but the first and the last.
        places: where the model may draw random numbers.
        random: the generators' states before each chunk.
        graphs: whether CUDA graphs may stand for chunks.
        strangers: code of others inside the model.
        half: whether gradients of a chunk need a loss scale.
    """

    model: LanguageModel
    inputs: LossInputs
    chunks: list[Chunk]
    plans: dict[int, list[Plans]]
    first: list[ExactStates]
    prints: list[Tensor]
    tape: Tape
    places: set[torch.device]
    random: list[GeneratorStates]
    graphs: bool
    strangers: Strangers
    half: bool


class SweepResult(NamedTuple):
    """Loss, state after the last token, sums of the parameters' gradients, those by the first state and embeddings."""

    loss: Tensor
    end: RwkvRevState
    parameters: list[Tensor | None]
    state: list[Tensor]
    embeds: list[Tensor | None]


class TwoSweeps(Strategy):
    """Base of the strategies that recover exact boundary states.

    ``repeatable`` says that all inner chunks do the same work, so that a CUDA graph of one can stand for them, and
    ``exact`` that the states before them are recovered to the bit.
    """

    repeatable = False
    exact = True

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        parameters: list[Tensor] = list(model.parameters())
        leaves = trainable(parameters, inputs)
        if not torch.is_grad_enabled() or not leaves:
            return self.untrained(model, inputs)
        found = self.check(model, parameters)
        outcome: dict[str, Any] = {}

        def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
            with unchanged(model, [*parameters, *found.buffers]), uncached(inputs.targets.device):
                return self._sweep(model, inputs, parameters, leaves, outcome, found)

        loss, *state = FinishedGradients.apply(compute, *leaves)
        return LossResult(loss, RwkvRevState(*state), outcome)

    # --- what a strategy fills in -------------------------------------------------------------------------------

    def begin(self, model: LanguageModel, inputs: LossInputs) -> None:
        """Called before the first chunk; refuses what cannot work."""

    def prepare(self, states: list[ExactStates]) -> list[ExactStates]:
        """The exact states the sweep starts from."""
        return states

    @abstractmethod
    def record(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> Record:
        """What to put on the tape for a chunk, beside what is compared."""

    @abstractmethod
    def recover(self, after: ExactStates, record: list[Tensor], plans: Plans) -> BlockAgain:
        """How a layer computes a chunk again, from the exact states after it and its part of the record."""

    def recovered(self, layer: int, replay: BlockReplay) -> None:
        """Called when a layer has computed an inner chunk again."""

    def finish(self, outcome: dict[str, Any]) -> None:
        """Called after the last chunk; adds to the report."""

    # --- the sweeps ---------------------------------------------------------------------------------------------

    def _sweep(
        self,
        model: LanguageModel,
        inputs: LossInputs,
        parameters: list[Tensor],
        leaves: list[Tensor],
        outcome: dict[str, Any],
        found: Strangers,
    ) -> tuple[Tensor, tuple[Tensor, ...], list]:
        self.begin(model, inputs)
        for block in model.blocks:
            block.time_mix.refuse_changing()
        chunks = inputs.chunks(self.chunk_length)
        plans = {
            length: [block.plan(length) for block in model.blocks] for length in {c.length for c in chunks}
        }
        device = inputs.targets.device
        outcome.update(strategy=self.name, chunk_length=self.chunk_length)
        places, half = devices(parameters, inputs), float16_gradients(parameters, device)
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        with Tape(self.tape, device, self.tape_dir) as tape:
            first = self.prepare(
                [block.exact(_detached(inputs.state.layer(i))) for i, block in enumerate(model.blocks)]
            )
            foreign = bool(found.declared)
            plain = not foreign and not half and not model.checkpoints_blocks
            graphs = self.repeatable and plain and cuda_graphs.worthwhile(chunks, device)
            work = Work(model, inputs, chunks, plans, first, [], tape, places, [], graphs, found, half)
            last, coarse = self._forward_sweep(work)
            outcome["tape_bytes"] = tape.peak_nbytes
            result = self._backward_sweep(work, last, wanted)
            self.finish(outcome)
        _warn_of_coarse_heads(coarse)
        return (
            result.loss,
            tuple(result.end.tensors()),
            in_order(leaves, _roles(inputs, wanted, result)),
        )

    @torch.no_grad()
    def _forward_sweep(self, work: Work) -> tuple[list[ExactStates], Tensor | None]:
        """Exact states before the last chunk, and heads that were coarse at any border; fills the tape."""
        model, _, chunks, plans, states, prints, tape, places, random, graphs, found, _ = work
        whole_output = bool(found.declared)  # a hook hears the top layer too
        pending: Callable[[], list[list[Tensor]]] | None = None
        graph: cuda_graphs.ForwardGraph | None = None
        coarse: Tensor | None = None

        def advance(chunk: Chunk, states: list[ExactStates]) -> tuple[list[ExactStates], Record]:
            advanced = _advance(model, chunk, states, plans[chunk.length], whole_output=whole_output)
            after = [layer.states for layer in advanced]
            return after, self.compared(model, states, advanced)._replace(coarse=_coarse_heads(after))

        random.append(random_state.capture(places))
        for chunk in chunks[:-1]:
            if chunk.index == 0:
                pace = cuda_graphs.Pace(chunk.inputs.targets.device) if graphs else None
                advanced = _advance(model, chunk, states, plans[chunk.length], whole_output=True)
                prints.extend(layer.print for layer in advanced)
                states = [layer.states for layer in advanced]
                coarse = _coarse_heads(states)
                random.append(random_state.capture(places))
                draws = not random[0].same(random[1])
                # the top layer's output is needed only to draw there what the second sweep will draw
                whole_output = whole_output or draws
                graphs = pace is not None and not draws and pace.waits_for_host()
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
                record = graph.record
            else:
                pending, states = record.start(), after
            if coarse is not None and record.coarse is not None:
                coarse |= record.coarse
            now = random_state.capture(places)
            random.append(random[-1] if now.same(random[-1]) else now)  # one copy where nothing is drawn
        if pending is not None:
            tape.push(pending())
        return cuda_graphs.cloned(states) if graph is not None else states, coarse

    def _backward_sweep(self, work: Work, states: list[ExactStates], parameters: list[Tensor]) -> SweepResult:
        """Gradients of all chunks, from the last, whose exact ``states`` before it are given, to the first."""
        model, inputs, chunks, plans, first, prints, tape, places, random, graphs, strange, half = work
        device = inputs.targets.device
        outside = OutsideLeaves(parameters)
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
            replay = self._replayer(model, chunk, plans[chunk.length], after, record, after)
            return _scaled_gradients(model, chunk, replay, parameters, incoming, 1.0, None)

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
            random_state.restore(random[chunk.index])
            known = first if chunk.index == 0 else states
            tensors = [[of_layer] for of_layer in prints] if chunk.index == 0 < len(chunks) - 1 else None
            if record is not None:
                tensors = record.tensors()
            after = states if chunk.index < len(chunks) - 1 else None
            replay = self._replayer(model, chunk, plans[chunk.length], known, tensors, after)
            # recorded after a chunk that has compiled and loaded every kernel, if enough of them are left
            recordable = (
                graphs and cuda_graphs.repeats(chunk, chunks) and chunk.index >= cuda_graphs.FEWEST_CHUNKS
            )
            pace = cuda_graphs.Pace(device) if recordable else None
            look = outside if strange.brings_tensors and (end is None or strange.declared) else None
            found = _chunk_gradients(
                model, chunk, replay, parameters, incoming, look, places if half else None
            )
            states, incoming = found.states, found.gradients.state
            if end is None:
                end = found.end
                # whoever draws after this loss goes on from the last token, not from the first chunk
                following = random_state.capture(places)
            loss = found.gradients.loss.clone() if loss is None else loss.add_(found.gradients.loss)
            if found.exactly is not None:
                checks.append((chunk.index, found.exactly))
                if device.type != "cuda":  # there once, at the end: no chunk waits for the one before
                    _compare(checks, chunks, loss)
            sums = add_gradients(sums, found.gradients.parameters)
            embeds.append(found.gradients.embeds)
            del found, replay  # or the chunk's gradients would stay in memory during the next one
            if pace is not None and record is not None:
                graphs = pace.waits_for_host()
                if graphs:
                    new = partial(cuda_graphs.BackwardGraph, model, parameters, sums, loss)
                    graph = cuda_graphs.attempt(partial(new, chunk, states, record, incoming, differentiate))
                    graphs = graph is not None
        assert loss is not None and end is not None and incoming is not None and following is not None
        _compare(checks, chunks, loss)
        outside.refuse()
        random_state.restore(following)
        return SweepResult(loss, end, sums, incoming, embeds)

    def _replayer(
        self,
        model: LanguageModel,
        chunk: Chunk,
        plans: list[Plans],
        states: list[ExactStates],
        record: list[list[Tensor]] | None,
        after: list[ExactStates] | None,
    ) -> Callable[[Tensor], Replayed]:
        """A function of the chunk's embedded input.

        ``states`` are those after it, or before an end; ``after`` those that the chunk after it began with.
        """
        inner = record is not None and chunk.index > 0

        def run(x: Tensor) -> Replayed:
            mask = chunk.mask()
            layers: list[BlockReplay] = []
            exactly: list[Tensor] = []
            for layer, block in enumerate(model.blocks):
                again = BlockAgain(states[layer], plans[layer])
                if inner:
                    assert record is not None
                    again = self.recover(states[layer], record[layer][2:], plans[layer])
                again = replace(
                    again,
                    checkpointed=model.checkpoints_blocks,
                    after=after[layer] if after is not None and self.exact else None,
                )
                x, replay = block(x, again, mask)
                layers.append(replay)
                if record is not None and (self.exact or chunk.index == 0 or layer == 0):
                    printed = record[layer][0]
                    found = replay.print
                    if (
                        printed.numel() > found.numel()
                    ):  # the top layer's output, where both sweeps compute it
                        found = torch.cat([found, checksum(x)[None]])
                    if inner and not self.exact:  # what depends on no rebuilt state
                        found, printed = found[:BEFORE_THE_STATE], printed[:BEFORE_THE_STATE]
                    same = (found == printed).all()
                    if inner and self.exact:
                        memory = block.time_mix.memory_print(replay.states[0].memory)
                        same &= (memory == record[layer][1]).all()
                    if replay.handed_on is not None:
                        same &= replay.handed_on
                    exactly.append(same)
                if inner:
                    self.recovered(layer, replay)
            return Replayed(x, layers, torch.stack(exactly) if exactly else None)

        return run

    def compared(
        self, model: LanguageModel, before: list[ExactStates], advanced: list[BlockAdvanced]
    ) -> Record:
        """:meth:`record`, with each layer's print and the checksum of the memory before it in front."""
        record = self.record(before, advanced)
        front = [
            [layer.print, *([block.time_mix.memory_print(time.memory)] if self.exact else [layer.print])]
            for block, (time, _), layer in zip(model.blocks, before, advanced, strict=True)
        ]

        def tensors(raised: Tensor | None) -> list[list[Tensor]]:
            return [[*one, *other] for one, other in zip(front, record.tensors(raised), strict=True)]

        return record._replace(tensors=tensors)


def _chunk_gradients(
    model: LanguageModel,
    chunk: Chunk,
    replay: Callable[[Tensor], Replayed],
    parameters: list[Tensor],
    incoming: list[Tensor] | None,
    outside: OutsideLeaves | None,
    half: set[torch.device] | None,
) -> ChunkResult:
    """``half`` says where the model may draw, if gradients need a loss scale, and is None if not."""
    if half is None:
        return _scaled_gradients(model, chunk, replay, parameters, incoming, 1.0, outside)
    random = random_state.capture(half)

    def gradients(loss_scale: float) -> tuple[ChunkResult, list[Tensor | None]]:
        random_state.restore(random)
        found = _scaled_gradients(model, chunk, replay, parameters, incoming, loss_scale, outside)
        return found, [*found.gradients.parameters, *found.gradients.state, found.gradients.embeds]

    found, unscaled = scaled(gradients)
    *others, embeds = unscaled
    to_parameters, to_state = others[: len(parameters)], others[len(parameters) :]
    return found._replace(
        gradients=ChunkGradients(found.gradients.loss, to_parameters, cast(list[Tensor], to_state), embeds)
    )


def _scaled_gradients(
    model: LanguageModel,
    chunk: Chunk,
    replay: Callable[[Tensor], Replayed],
    parameters: list[Tensor],
    incoming: list[Tensor] | None,
    scale: float,
    outside: OutsideLeaves | None,
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
    head_gradients: list[Tensor | None] = [None] * len(parameters)
    loss = torch.zeros((), device=hidden.device, dtype=wide(hidden.dtype))
    made = [*starts, *([embeds] if embeds is not None else [])]
    if chunk.predicts:
        loss, to_hidden, head_gradients = chunk.loss(model, hidden, parameters, scale, outside)
        outputs.append(hidden)
        output_gradients.append(to_hidden)
    if outside is not None:
        outside.look([hidden, *ends], made)
    if incoming is not None:
        outputs += ends
        output_gradients += [(g * scale).to(end.dtype) for g, end in zip(incoming, ends, strict=True)]
    wanted = [*parameters, *made]
    found: list[Tensor | None] = [None] * len(wanted)
    pairs = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if o.requires_grad]
    if pairs:
        found = list(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        )
    to_parameters, to_starts = found[: len(parameters)], found[len(parameters) :][: len(starts)]
    # copies: a gradient may be a view of one of the chunk's length, which would stay in memory with it
    state = [torch.zeros_like(s) if g is None else g.clone() for s, g in zip(starts, to_starts, strict=True)]
    to_embeds = None
    if embeds is not None:
        to_embeds = torch.zeros_like(embeds) if found[-1] is None else found[-1]
    return ChunkResult(
        ChunkGradients(
            loss,
            [sum_of(g, of_head) for g, of_head in zip(to_parameters, head_gradients, strict=True)],
            state,
            to_embeds,
        ),
        [layer.states for layer in layers],
        RwkvRevState.stack([_detached(layer.end) for layer in layers]),
        exactly,
    )


def _advance(
    model: LanguageModel, chunk: Chunk, states: list[ExactStates], plans: list[Plans], *, whole_output: bool
) -> list[BlockAdvanced]:
    """All layers of one chunk forwards; without ``whole_output`` the top channel mix has no output."""
    mask = chunk.mask()
    x = chunk.embed(model, chunk.embeds())
    advanced: list[BlockAdvanced] = []
    blocks = model.blocks
    for number, (block, state, plan) in enumerate(zip(blocks, states, plans, strict=True)):
        x, layer = block(x, BlockForwards(state, plan, whole_output or number < len(blocks) - 1), mask)
        advanced.append(layer)
    if whole_output:
        advanced[-1] = advanced[-1]._replace(print=torch.cat([advanced[-1].print, checksum(x)[None]]))
    return advanced


def _compare(checks: list[tuple[int, Tensor]], chunks: list[Chunk], loss: Tensor) -> None:
    """Take the checks off the list.

    A loss that is not finite is not looked into: infinities and NaN have no bits to rely on, and it is conspicuous.

    Raises:
        ReversalMismatchError: a layer did not compute the same in both sweeps.
    """
    taken = checks.copy()
    checks.clear()
    if not taken or bool(torch.cat([exactly for _, exactly in taken]).all()) or not bool(loss.isfinite()):
        return
    for index, exactly in taken:
        if not exactly.all():
            layer, chunk = int((~exactly).nonzero()[0]), chunks[index]
            raise ReversalMismatchError(
                f"layer {layer} computed other numbers for chunk {index} (tokens {chunk.start} to {chunk.stop - 1}) "
                "in the second sweep than in the first. Likely causes: code inside the model that gives another "
                "result at each call (it draws from a generator of its own, counts calls, changes weights or "
                "buffers), a non-deterministic kernel, another autocast. Try "
                "torch.use_deterministic_algorithms(True), or bptt='full', which computes everything once"
            )


def _coarse_heads(states: list[ExactStates]) -> Tensor | None:
    """[L, B, H] bool, see :meth:`~rwkv_rev.reversal.fixed_point.FixedPoint.coarse`; None for states without a grid."""
    grids = [time.memory for time, _ in states if isinstance(time.memory, FixedPoint)]
    return torch.stack([grid.coarse() for grid in grids]) if grids else None


def _warn_of_coarse_heads(coarse: Tensor | None) -> None:
    if coarse is None or not bool(coarse.any()):
        return
    layer, _, head = coarse.nonzero()[0].tolist()
    warnings.warn(
        f"the state of layer {layer}, head {head} ({int(coarse.any(1).sum())} heads in all) has been many thousand "
        "times larger earlier in this context, and its grid stays as coarse as that needed: gradients through it "
        "are off by more than 1e-4. bptt='checkpoint' has the same grid; 'full' has none",
        stacklevel=2,
    )


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


def _roles(
    inputs: LossInputs, parameters: list[Tensor], found: SweepResult
) -> list[tuple[Tensor, Tensor | None]]:
    """Everything that the loss was differentiated by, with its gradient; a tensor may have several roles."""
    layers = [found.state[i : i + 3] for i in range(0, len(found.state), 3)]
    stacked = [torch.stack([layer[k].detach() for layer in layers]) for k in (0, 2, 1)]
    roles: list[tuple[Tensor, Tensor | None]] = [
        *zip(parameters, found.parameters, strict=True),
        *zip(inputs.state.tensors(), stacked, strict=True),
    ]
    if inputs.inputs_embeds is not None:
        pieces = [piece for piece in reversed(found.embeds) if piece is not None]
        roles.append((inputs.inputs_embeds, torch.cat(pieces, dim=1)))
    return roles
