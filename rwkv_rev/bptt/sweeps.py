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
draws. Under float16 autocast each chunk's graph is differentiated with a loss scale, lowered until it is finite.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.bptt import random_state
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
from rwkv_rev.loss import FinishedGradients, add_gradients, cross_entropy_gradients
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.state import RwkvRevState

HALF_PRECISION_LOSS_SCALE = 2.0**15
SMALLEST_LOSS_SCALE = 2.0**-10


class ChunkGradients(NamedTuple):
    """Gradients of one chunk: its loss, by parameter, by the state before it, by its embeddings."""

    loss: Tensor
    parameters: list[Tensor | None]
    state: list[Tensor]
    embeds: Tensor | None


class TwoSweeps(Strategy):
    """Base of the strategies that recover exact boundary states."""

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
    ) -> Callable[[], list[list[Tensor]]]:
        """What to put on the tape for a chunk, as a function that is called one chunk later.

        The delay lets values that depend on the data reach the host while the device computes the next chunk.
        """

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
    ) -> BlockReplay:
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
            random: list[list[Tensor]] = []
            last = self._forward_sweep(model, chunks, plans, first, tape, random if draws else None)
            outcome["tape_bytes"] = tape.peak_nbytes

            total = torch.zeros((), device=device)
            sums: list[Tensor | None] = [None] * len(parameters)
            embeds: list[Tensor | None] = []
            state_gradients = _initial_state_gradients(inputs)
            states, final = last, None
            for chunk in reversed(chunks):
                record = tape.pop() if 0 < chunk.index < len(chunks) - 1 else None
                known = {0: first, len(chunks) - 1: last}.get(chunk.index)
                if draws:
                    random_state.restore(random[chunk.index], device)
                replay = self._replayer(model, chunk, plans[chunk.length], states, known, record)
                gradients, states, end = self._chunk_gradients(
                    model, chunk, replay, parameters, state_gradients, device
                )
                if final is None:
                    final = end
                    # whoever draws after this loss goes on from the last token, not from the first chunk
                    following = random_state.capture(device) if draws else None
                total = total + gradients.loss
                sums = add_gradients(sums, gradients.parameters)
                gradients.parameters.clear()  # or they would stay in memory during the next chunk
                state_gradients = gradients.state
                embeds.append(gradients.embeds)
            if draws and following is not None:
                random_state.restore(following, device)
            self.finish(outcome)
        assert final is not None
        return (
            total,
            tuple(final.tensors()),
            _in_order(leaves, inputs, parameters, sums, state_gradients, embeds),
        )

    @torch.no_grad()
    def _forward_sweep(
        self,
        model: LanguageModel,
        chunks: list[Chunk],
        plans: dict[int, list[Plans]],
        states: list[ExactStates],
        tape: Tape,
        random: list[list[Tensor]] | None,
    ) -> list[ExactStates]:
        pending: Callable[[], list[list[Tensor]]] | None = None
        for chunk in chunks:
            if random is not None:
                random.append(random_state.capture(chunk.inputs.targets.device))
            if chunk is chunks[-1]:
                break
            mask = chunk.mask()
            x = chunk.embed(model, chunk.embeds())
            after: list[ExactStates] = []
            remnants: list[Remnants] = []
            for block, state, plan in zip(model.blocks, states, plans[chunk.length], strict=True):
                x, advanced, remnant = block.advance(x, state, mask, plan)
                after.append(advanced)
                remnants.append(remnant)
            if pending is not None:
                tape.push(pending())
                pending = None
            if chunk.index > 0:
                pending = self.record(model, states, after, remnants)
            states = after
        if pending is not None:
            tape.push(pending())
        return states

    def _replayer(
        self,
        model: LanguageModel,
        chunk: Chunk,
        plans: list[Plans],
        after: list[ExactStates],
        known: list[ExactStates] | None,
        record: list[list[Tensor]] | None,
    ) -> Callable[[Tensor], tuple[Tensor, list[BlockReplay]]]:
        """A function from the chunk's embedded input to its top hidden states and every layer's replay."""

        def run(x: Tensor) -> tuple[Tensor, list[BlockReplay]]:
            mask = chunk.mask()
            replays = []
            for layer, block in enumerate(model.blocks):
                if record is None:
                    assert known is not None
                    replay = block.replay(
                        x, known[layer], mask, plans=plans[layer], checkpointed=model.checkpoints_blocks
                    )
                else:
                    replay = self.recover(model, layer, x, after[layer], record[layer], chunk, plans[layer])
                x = replay.out
                replays.append(replay)
            return x, replays

        return run

    def _chunk_gradients(
        self,
        model: LanguageModel,
        chunk: Chunk,
        replay: Callable[[Tensor], tuple[Tensor, list[BlockReplay]]],
        parameters: list[Tensor],
        incoming: list[Tensor] | None,
        device: torch.device,
    ) -> tuple[ChunkGradients, list[ExactStates], RwkvRevState]:
        half = (
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        )
        scale = HALF_PRECISION_LOSS_SCALE if half else 1.0
        random = random_state.capture(device) if half else None
        while True:
            gradients, states, end = self._scaled_gradients(model, chunk, replay, parameters, incoming, scale)
            if not half or scale <= SMALLEST_LOSS_SCALE or _all_finite(gradients):
                return _unscaled(gradients, scale), states, end
            scale /= 16
            random_state.restore(random or [], device)

    def _scaled_gradients(
        self,
        model: LanguageModel,
        chunk: Chunk,
        replay: Callable[[Tensor], tuple[Tensor, list[BlockReplay]]],
        parameters: list[Tensor],
        incoming: list[Tensor] | None,
        scale: float,
    ) -> tuple[ChunkGradients, list[ExactStates], RwkvRevState]:
        embeds = chunk.embeds()
        with torch.enable_grad():
            if embeds is not None:
                embeds = embeds.detach().requires_grad_()
            x, replays = replay(chunk.embed(model, embeds))
            hidden = model.normalize(x)
        starts = flatten_states([replay.start for replay in replays])
        ends = flatten_states([replay.end for replay in replays])
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
        end = RwkvRevState.stack([_detached(replay.end) for replay in replays])
        return (
            ChunkGradients(loss, to_parameters, state, found[-1] if embeds is not None else None),
            [replay.states for replay in replays],
            end,
        )


def _detached(states: FloatStates) -> FloatStates:
    time, channel = states
    assert time.memory is not None
    return (
        type(time)(time.shift.detach(), time.memory.detach()),
        type(channel)(channel.shift.detach(), None),
    )


def _initial_state_gradients(inputs: LossInputs) -> list[Tensor] | None:
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
    leaves: list[Tensor],
    inputs: LossInputs,
    parameters: list[Tensor],
    sums: list[Tensor | None],
    state_gradients: list[Tensor] | None,
    embeds: list[Tensor | None],
) -> list[Tensor | None]:
    """The finished gradients in the order of ``leaves``."""
    assert state_gradients is not None
    by_tensor: dict[int, Tensor | None] = {id(p): g for p, g in zip(parameters, sums, strict=True)}
    layers = [state_gradients[i : i + 3] for i in range(0, len(state_gradients), 3)]
    stacked = [torch.stack([layer[k].detach() for layer in layers]) for k in (0, 2, 1)]
    by_tensor.update({id(t): g for t, g in zip(inputs.state.tensors(), stacked, strict=True)})
    if inputs.inputs_embeds is not None:
        pieces = [piece for piece in reversed(embeds) if piece is not None]
        by_tensor[id(inputs.inputs_embeds)] = torch.cat(pieces, dim=1) if pieces else None
    return [by_tensor.get(id(leaf)) for leaf in leaves]
