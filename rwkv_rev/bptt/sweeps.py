"""Two sweeps over the chunks: states forward, then gradients backward, in memory that does not grow with T.

*Forward sweep* (:mod:`rwkv_rev.bptt.forward_sweep`), without graph: chunk by chunk, exact states forward, and what is
needed to come back onto the tape; no head, no loss, nothing for the last chunk. *Backward sweep*
(:mod:`rwkv_rev.bptt.backward_sweep`): from the last chunk to the first, recover the states before the chunk, compute it
again with graph, then its loss, then pull the gradients back through it, those of the states after it included.
Parameter gradients are summed in float32 or wider.

Both sweeps run inside the forward pass of one autograd function (:class:`rwkv_rev.loss.FinishedGradients`), under
the caller's autocast; its backward pass scales and returns the finished gradients. Cost: one forward pass without
head more than ordinary back-propagation. The first chunk starts at the given state and the last one ends the forward
sweep, so neither needs the tape.

Both sweeps do the same arithmetic on the same chunk shapes; the states of the random generators before each chunk are
kept and set back for the second sweep. What runs a chunk, one launch after another or a recording of them, is a
:class:`~rwkv_rev.bptt.runner.Runner`, which the sweeps do not look into.

Every number that both sweeps compute is compared: the input of each layer, what it does to its memory, its token
shifts, and the memory before the chunk. That is looked at once per chunk on the CPU, and at the end of the sweep on a
GPU (one transfer; by recordings that last, before the first chunk's gradients are made); either way before any gradient
is returned. The last chunk, and the top layer's output where nothing draws there, are computed in the second sweep
alone: loss and gradient come from the same numbers.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rwkv_rev.autograd.stand_ins import StandIns
from rwkv_rev.bptt import cuda_graphs, lasting
from rwkv_rev.bptt.backward_sweep import SweepResult, backward_sweep, no_sums
from rwkv_rev.bptt.chunk_gradients import Parameters
from rwkv_rev.bptt.forward_sweep import forward_sweep
from rwkv_rev.bptt.kept_tensors import what_is_kept_is_trained
from rwkv_rev.bptt.leaves import devices, float16_gradients, in_order, trainable
from rwkv_rev.bptt.parts import Part, embeds_of_all, parts_of
from rwkv_rev.bptt.piece import over_the_group
from rwkv_rev.bptt.records import LayerRecord
from rwkv_rev.bptt.runner import Runner
from rwkv_rev.bptt.shared_tape import SharedTape
from rwkv_rev.bptt.strategy import (
    Chunk,
    LanguageModel,
    LossInputs,
    LossResult,
    Strategy,
    planned_lengths,
)
from rwkv_rev.bptt.sweep import Sweep
from rwkv_rev.bptt.uncached import uncached
from rwkv_rev.bptt.unchanged import unchanged, watched
from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.cells.at_once import of_all
from rwkv_rev.cells.block import BlockAdvanced, BlockAgain, BlockReplay, ExactStates, Plans
from rwkv_rev.cells.contract import detached
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.distributed.sharded_reading import gathered
from rwkv_rev.distributed.shards import any_sharded, in_units, reshard
from rwkv_rev.distributed.taking_part import zeros_for_missing
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign.search import Strangers
from rwkv_rev.loss import FinishedGradients, finished
from rwkv_rev.remnants import choose_remnants
from rwkv_rev.reversal.host_copy import start_copy
from rwkv_rev.reversal.memory import Remnant
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.state import ModelState


class TwoSweeps(Strategy):
    """Base of the strategies that recover exact boundary states.

    ``repeatable`` says that all inner chunks do the same work, so that a recording of one can stand for them, and
    ``exact`` that the states before them are recovered to the bit.
    """

    repeatable = False
    exact = True

    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        parameters: list[Tensor] = list(model.parameters())
        leaves = trainable(parameters, inputs) if torch.is_grad_enabled() else []
        if not leaves:
            return self.untrained(model, inputs)
        reshard(model.blocks)
        with gathered(cast(nn.Module, model)) as changed:
            if changed:
                parameters = list(model.parameters())
                leaves = trainable(parameters, inputs)
            return self._by_sweeps(model, inputs, parameters, leaves)

    def _by_sweeps(
        self, model: LanguageModel, inputs: LossInputs, parameters: list[Tensor], leaves: list[Tensor]
    ) -> LossResult:
        if any_sharded(parameters):
            from rwkv_rev.distributed.sharded_blocks import refuse_other_shards

            refuse_other_shards(model.blocks, parameters, inputs.targets.device, inputs.group)
        found = self.check(model, parameters, sharded_blocks=True)
        outcome: dict[str, Any] = {}

        def compute() -> tuple[Tensor, tuple[Tensor, ...], list]:
            with (
                unchanged(model, watched(parameters, found)),
                uncached(inputs.targets.device),
                what_is_kept_is_trained(model, found),
            ):
                return self._sweep(model, inputs, parameters, leaves, outcome, found)

        loss, *state = FinishedGradients.apply(compute, *leaves)
        return LossResult(loss, type(inputs.state)(*state), outcome)

    # --- what a strategy fills in -------------------------------------------------------------------------------

    def begin(self, model: LanguageModel, inputs: LossInputs) -> None:
        """Called before the first chunk; refuses what cannot work."""

    def prepare(self, states: list[ExactStates]) -> list[ExactStates]:
        """The exact states the sweep starts from."""
        return states

    @abstractmethod
    def keep(self, before: list[ExactStates], advanced: list[BlockAdvanced]) -> list[list[Remnant]]:
        """What each layer's cells need to come back to the states ``before`` a chunk."""

    @abstractmethod
    def recover(self, after: ExactStates, record: LayerRecord, plans: Plans) -> BlockAgain:
        """How a layer computes a chunk again, from the exact states after it and its part of the record."""

    def recovered(self, replay: BlockReplay, record: LayerRecord) -> None:
        """Called when a layer has computed an inner chunk again, with its part of the record."""

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
        outcome.update(strategy=self.name, chunk_length=self.chunk_length)
        apart = StandIns(parameters)
        inputs = apart.of_inputs(inputs)
        with apart.within(model), self._tape(model, inputs) as tape:
            parts = [Part(inputs)] if any_sharded(parameters) else parts_of(inputs, self.chunk_length)
            # all before the first one is computed: no part waits for the device later
            each = [part.inputs.chunks(self.chunk_length) for part in parts]
            whole = self.begin_sweep(model, inputs, apart.leaves, found, tape, each)
            sums, results = no_sums(whole), []
            for part, chunks in zip(parts, each, strict=True):
                sweep = whole.part(part.inputs, chunks) if len(parts) > 1 else whole
                runner = choose_runner(sweep, alone=sweep is whole)
                inputs.refuse()
                last = forward_sweep(sweep, runner)
                warn = warning_of_coarse_heads(sweep)
                outcome["tape_bytes"] = tape.peak_nbytes
                result = backward_sweep(sweep, runner, last, sweep.to_end(), sums)
                results.append(result)
                warn()
            if _lifts(model):
                outcome["remnants"] = "lifted"
            self.finish(outcome)
        result = replace(
            result,
            end=next(one.end for one, part in zip(results, parts, strict=True) if part.holds_last),
            to_first=next(one.to_first for one, part in zip(results, parts, strict=True) if part.holds_first),
            to_embeds=embeds_of_all(parts, [one.to_embeds for one in results], inputs.inputs_embeds),
        )
        found_roles = roles(inputs, [one for one in parameters if one.requires_grad], result)
        loss, gradients = over_the_group(inputs, result.loss, leaves, in_order(leaves, found_roles))
        if in_units(model):
            gradients = zeros_for_missing(gradients, leaves, parameters)
        gradients = finished(gradients, leaves)
        for one in results:
            one.refuse()  # only now: the device has been busy with the last chunk
        return loss, tuple(result.end.tensors()), gradients

    def _lifted(self, model: LanguageModel, inputs: LossInputs, parameters: list[Tensor]) -> bool:
        """Whether remnants are lifted, as set or chosen."""
        config = getattr(model, "config", None)  # a model of one's own blocks needs none
        if self.remnants != AUTO or not isinstance(config, RwkvRevConfig):
            return self.remnants == "lifted"
        chosen = choose_remnants(
            AUTO,
            self.name,
            config,
            chunk=self.chunk_length,
            device=inputs.targets.device,
            trains_all=all(parameter.requires_grad for parameter in parameters),
            shared=inputs.group is not None,
        )
        return chosen.kind == "lifted"

    def _tape(self, model: LanguageModel, inputs: LossInputs) -> Tape:
        device = inputs.targets.device
        if inputs.group is None:
            return Tape(self.tape, device, self.tape_dir)
        groups = 1 + len(model.blocks[0].cells)
        return SharedTape(self.tape, device, self.tape_dir, inputs.group, groups)

    def begin_sweep(
        self,
        model: LanguageModel,
        inputs: LossInputs,
        parameters: list[Tensor],
        found: Strangers,
        tape: Tape,
        parts: Sequence[Sequence[Chunk]] = (),
    ) -> Sweep:
        """What both sweeps go through, before the first chunk; for the model's own loss.

        ``parts``: chunks of the parts that the batch is swept through in, if not at once.
        """
        lifted = self._lifted(model, inputs, parameters)
        for block in model.blocks:
            block.lift(lifted)
        if inputs.group is not None and _lifts(model):
            raise StrategyError(
                "remnants = 'lifted' undoes a chunk that one process has whole, and this context is shared between "
                "processes: use remnants='whole'"
            )
        is_sharded = any_sharded(parameters)
        if not is_sharded:
            for block in model.blocks:
                block.refuse_changing()
        self.begin(model, inputs)
        chunks = parts[0] if len(parts) == 1 else inputs.chunks(self.chunk_length)
        lengths: dict[int, int | None]  # and tokens of a chunk that are run here
        if inputs.group is None:
            lengths = {length: None for part in parts or [chunks] for length in planned_lengths(part)}
        else:
            lengths = {c.planned_length: c.own_length for part in parts or [chunks] for c in part}
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        half = float16_gradients(parameters, inputs.targets.device)
        sharded = None
        if is_sharded:
            from rwkv_rev.distributed.sharded_blocks import ShardedBlocks

            if half:
                raise StrategyError(
                    "the model's blocks are sharded, and gradients in float16 need a scale that each process would "
                    "find for itself: use bfloat16, shard the model as one unit, or use bptt = 'full'"
                )
            sharded = ShardedBlocks(model.blocks, wanted, len(chunks))
            layers = [block.planned(lengths) for block in sharded.blocks]
            plans = {length: [layer[at] for layer in layers] for at, length in enumerate(lengths)}
        else:
            plans = {n: of_all(model.blocks, "plan", n, piece) for n, piece in lengths.items()}
        values = [tuple(detached(state) for state in inputs.state.layer(i)) for i in range(len(model.blocks))]
        return Sweep(
            self,
            model,
            inputs,
            chunks,
            plans,
            self.prepare(of_all(model.blocks, "exact", own=values)),
            tape,
            devices(parameters, inputs),
            found,
            Parameters(
                model,
                wanted,
                foreign=found.brings_tensors,
                starts=None if inputs.borders is None else inputs.borders.starts,
                sharded=None if sharded is None else sharded.blocks,
            ),
            half,
            sharded=sharded,
        )


def _lifts(model: LanguageModel) -> bool:
    return any(cell.lifts for block in model.blocks for cell in block.cells)


def choose_runner(sweep: Sweep, *, alone: bool = True) -> Runner:
    """The runner for a sweep: by recordings where they pay; ranks that share a context have the same kind of runner.

    ``alone``: the sweep is no part of another batch, whose sums it would go on with.
    """
    plain = not (sweep.strangers.writes or sweep.half or sweep.model.checkpoints_blocks or sweep.sharded)
    borders, group = sweep.inputs.borders, sweep.inputs.group
    plain = plain and (borders is None or borders.ends is None)
    able = sweep.strategy.repeatable and plain and cuda_graphs.possible(sweep.device)
    if group is not None and sweep.device.type == "cuda":
        able = group.everywhere(able)
    if not able:
        return Runner(sweep)
    if not alone:
        return cuda_graphs.RecordingRunner(sweep) if cuda_graphs.worthwhile(sweep.chunks) else Runner(sweep)
    recordings = lasting.recordings_for(sweep) if group is None else lasting.recordings_of_all(sweep, group)
    if recordings is not None:
        return lasting.LastingRunner(sweep, recordings)
    return lasting.NotingRunner(sweep) if group is None else lasting.TogetherRunner(sweep)


def warning_of_coarse_heads(sweep: Sweep) -> Callable[[], None]:
    """After the first sweep: what warns where parts of memories were coarse at a border.

    A device that goes on with the second sweep meanwhile is not waited for.
    """
    coarse = sweep.coarse  # [L, B, H]
    found = None if coarse is None else start_copy(coarse.any())

    def warn() -> None:
        if coarse is None or found is None or not bool(found()):
            return
        layer, _, head = coarse.nonzero()[0].tolist()
        means = next(state.when_coarse for state in sweep.first[layer] if state.coarse() is not None)
        warnings.warn(
            f"the state of layer {layer}, head {head} ({int(coarse.any(1).sum())} heads in all) {means}",
            stacklevel=2,
        )

    return warn


def roles(
    inputs: LossInputs, parameters: list[Tensor], found: SweepResult
) -> list[tuple[Tensor, Tensor | None]]:
    """Everything that the loss was differentiated by, with its gradient; a tensor may have several roles."""
    of_state: ModelState = found.to_first
    roles: list[tuple[Tensor, Tensor | None]] = [
        *zip(parameters, found.to_parameters, strict=True),
        *zip(inputs.state.tensors(), of_state.tensors(), strict=True),
    ]
    if inputs.inputs_embeds is not None:
        roles.append((inputs.inputs_embeds, found.to_embeds))
    return roles
