r"""How much memory a gradient takes, per strategy, before anything is loaded.

Letters as everywhere (B, T, C, L, D, H, N, F, V), n = B C tokens in the graph at once (B T for ``full``). The graph of
n tokens holds, in numbers of 4 bytes,

    n (L (k D + 2 F) + 2 D) + L s    k = 22 vectors (5.1, 5.2), 18 (5.0, no gate), 18 (4)
                                     s = states of the recurrence: D N (n / 32 + 2 B) (RWKV-5, one matrix per
                                         sub-chunk and two), 2 D n (1 + 1/c) (RWKV-4, c the scan's piece;
                                         3 where c does not divide n / B)

The k vectors are, in the time mix, the residual stream, its LayerNorm, the shifted and the mixed inputs, r, k, v, the
recurrence's output before and after GroupNorm, gate, its silu and their product; in the channel mix the residual,
LayerNorm, shifted and two mixed inputs, receptance and value. F numbers are the hidden layer before and after
squaring. The CUDA kernels (``fused``) keep neither the shifted inputs nor the steps between GroupNorm and its gate: k
is 18, 15 and 17 there, with one state per 64 tokens (RWKV-5) or none (RWKV-4). On such a device the hidden layer after
squaring is made again instead of kept, and so are the mixes (6, 5 and 5 of the k; under autocast its copies of them);
activation checkpointing keeps what it keeps. k, s and the tape's records are each generation's own
(:class:`~rwkv_rev.architectures.architecture.Cost`).

The peak of device memory comes at one of three moments:

    loss        graph + states + 3 logits + head gradient
    backward    graph + states + head gradient + (2 F + 5 D) n + 0.4 of a layer's weights
    end         gradients of all weights, and for chunked strategies their running sum, which the other two hold too

*States* count what the two sweeps keep of memories [B, L, D N or 3 D] besides the graph: before and after the chunk,
exact and as floats, their gradients, and one layer's arithmetic in float64. The constants 3, 5, 0.4 and those of the
states are calibrated on the allocator's log (CPU, chunked kernels); tests hold forecasts within 15 % of measurements
over several widths, depths and vocabularies. Optimizer states are not included (AdamW: 8 bytes per weight).

Those are float32 weights and activations with every weight trained. Under autocast to 16 bits the graph of n tokens
takes 2/3 of that (LayerNorms, residuals and states stay float32), and a copy of each matrix in 2 bytes. A model that is
in 16 bits itself (*narrow*) takes 0.6 of it, and its gradients 2 bytes beside their sums of 4. RWKV-7, whose recurrence
keeps more in float32, has shares of its own. Of weights that are not trained there is no gradient.

Recordings that last over steps (:mod:`rwkv_rev.bptt.lasting`) keep their memory between steps, for nobody else's use:

    sums of all gradients + 1.1 (loss or backward, without sums) + head gradient

What the device must give then (*reserved*) is that, the weights, and the gradients that are handed out. The 1.1 is what
the four recordings read and write, and gaps between their tensors: calibrated on an H100 (docs/h200.md, 1.58 billion
parameters, C = 2,048, 4,096, 8,192: within 5 %). Without recordings an allocator that keeps freed blocks reserves 5 %
more than tensors take at their peak.

Documents packed into a row are cut into pieces, one in each chunk that they reach into. Of each but a row's first the
graph keeps a state in each layer, and kernels what they make of it: 2.5 memories, from the allocator's log (5.2, 6 and
7: 1.9 to 3.0).

Chunks of up to 32 tokens are run several at once (:func:`tokens_at_once`), and forecast so.

The tape's bytes are exact: remnant widths follow from the decays. Heads whose grid rises add a matrix each, once. (In
float64 all of it is wider, by about a factor of two, and not forecast by itself.)
RWKV-6's are the most that any text takes. RWKV-7's are those of whole states, or where they are *lifted* an estimate:
what the model took that forgets more of the two in docs/lifting.md. Another may take more, at most whole states.
Ranks that share a context keep a W-th of every record each (:mod:`rwkv_rev.bptt.shared_tape`).

Of weights that are spread over processes block by block (FSDP2, *shards*) a process keeps its part, with its part of
the sums and of the gradients; whole are, beside it, the block that is computed in the dtype of the arithmetic, its
gradient twice in float32 (as it was made, and by process), embedding and head.

Packed rows are forecast as if each chunk had a border, which puts the state on the tape whole; a single row whose
documents are shorter than a chunk puts nothing there (:mod:`rwkv_rev.bptt.parts`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.architecture import NUMBER
from rwkv_rev.bptt_settings import CHUNK_LENGTH
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.loss import LOGITS_AT_ONCE
from rwkv_rev.reversal.tape import ALIGNMENT
from rwkv_rev.wkv.dispatch import choose_kernel

STRATEGIES = ("full", "checkpoint", "reversible", "truncated")
_LOGIT_COPIES = 3
_BACKWARD_VECTORS = 5
_LAYER_SHARE = 0.4
_STATE_COPIES = {"checkpoint": 6, "reversible": 8}
_STATE_ARITHMETIC = 8
_LIFTED_COPIES = 3
_LIFTED_ARITHMETIC = 4
"""Of what :class:`~rwkv_rev.reversal.lifting.LiftedRemnant` has until it is packed, and of a lift in float64."""
_PIECE_COPIES = 2.5
RECORDED = ("checkpoint", "reversible")
"""Strategies that keep a tape of states."""
RECORDED_SHARE = 1.1
_RESERVED_SHARE = 1.05
SMALL_CHUNK, TINY_CHUNK = 32, 4
"""Tokens of the longest chunk that is run together with others, and of one however short the context is."""
_MOST_AT_ONCE = 64
_FEWEST_GROUPS = 16
_SMALL_GRAPH = 2**29
_GROUPING = ("checkpoint", "reversible")


@dataclass(frozen=True)
class StrategyForecast:
    """Bytes one strategy takes.

    Attributes:
        strategy: its name.
        parameters: the weights.
        gradients: of the trained weights, with their running sum where there are several chunks.
        graph: what back-propagation keeps of the tokens in the graph at once.
        states: boundary states besides the graph.
        device: the peak of all of it; less than the sum, since gradients grow as the graph is freed.
        tape: on the host, or where the tape lies.
        lifted: whether remnants are lifted; the tape of ``reversible`` is an estimate then.
        recordings: what recordings of launches hold between steps, if they last.
        reserved: what the device must have for all of it, with recordings if they last.
    """

    strategy: str
    parameters: int
    gradients: int
    graph: int
    states: int
    device: int
    tape: int
    recordings: int
    reserved: int
    lifted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def forecast_memory(
    config: RwkvRevConfig,
    log_decays: Sequence[Tensor],
    parameters: int,
    *,
    context_length: int,
    batch_size: int = 1,
    chunk_length: int = CHUNK_LENGTH,
    trained: int | None = None,
    half: bool = False,
    weight_bytes: int = NUMBER,
    quantised_bytes: int = 0,
    checkpoint_blocks: bool = False,
    fused: bool = False,
    narrow: bool = False,
    recorded: bool = False,
    pieces: Callable[[int], int] | None = None,
    ranks: int = 1,
    shards: int = 1,
    strategies: Sequence[str] = STRATEGIES,
    lifted: bool = False,
) -> tuple[StrategyForecast, ...]:
    """Forecast the memory of one loss and its gradient.

    Args:
        config: of the model.
        log_decays: per layer log w, of the stored shape; empty where a decay is no constant.
        parameters: number of weights, but for those in 4 or 8 bits.
        context_length: T, tokens.
        batch_size: B, rows.
        chunk_length: C, tokens.
        trained: number of weights with a gradient; all when None.
        half: whether autocast computes in 16 bits.
        weight_bytes: of one weight.
        quantised_bytes: of all weights in 4 or 8 bits (:mod:`rwkv_rev.foreign.quantised`).
        checkpoint_blocks: whether the graph keeps only the blocks' inputs (activation checkpointing).
        fused: whether the CUDA kernels run.
        narrow: whether weights and activations are in 16 bits, without autocast.
        recorded: whether recordings may last over steps (on CUDA, blocks not checkpointed).
        pieces: of rows in which documents are packed, the most pieces that so many tokens of one have; one when None.
        ranks: W, processes that share a context; row and chunk are counted above by each one's W-th alone.
        shards: processes over which the weights are spread block by block.
        strategies: those to tell of, of :data:`STRATEGIES`.
        lifted: whether remnants are lifted, of an architecture that can.
    """
    chunk, cost = min(chunk_length, context_length), config.architecture.cost
    trained = parameters if trained is None else trained
    outside = 2 * config.vocab_size * config.hidden_size
    block = (parameters - outside) / config.num_hidden_layers if shards > 1 else 0.0
    whole = (2 if half or narrow else NUMBER) * (block + outside) if shards > 1 else 0.0
    run = _Run(
        config=config,
        log_decays=log_decays,
        weights=(weight_bytes * parameters + quantised_bytes) // shards + round(whole),
        trained=trained // shards,
        whole_gradients=round(2 * NUMBER * block) if trained == parameters else 0,
        ranks=ranks,
        batch=batch_size,
        context=context_length,
        chunk=chunk,
        chunks=-(-context_length // chunk),
        graph_share=cost.narrow if narrow else cost.half if half else 1.0,
        half_copies=2 * (parameters - outside) if half and weight_bytes > 2 and shards == 1 else 0,
        checkpoint_blocks=checkpoint_blocks,
        fused=fused,
        half=half,
        narrow=narrow,
        recorded=recorded and not checkpoint_blocks,
        pieces=pieces or (lambda count: 1),
        lifted=lifted and cost.lifted is not None,
    )
    joined = min(context_length, tokens_at_once(config, run.weights, batch_size, context_length, chunk))
    grouped = replace(run, chunk=joined, chunks=-(-context_length // joined))
    return tuple(_forecast(name, grouped if name in _GROUPING else run) for name in strategies)


@dataclass(frozen=True)
class _Run:
    """What is computed; sizes in bytes, ``chunk`` in tokens."""

    config: RwkvRevConfig
    log_decays: Sequence[Tensor]
    weights: int
    trained: int
    whole_gradients: int
    ranks: int
    batch: int
    context: int
    chunk: int
    chunks: int
    graph_share: float
    half_copies: int
    checkpoint_blocks: bool
    fused: bool
    half: bool
    narrow: bool
    recorded: bool
    pieces: Callable[[int], int]
    lifted: bool


def _forecast(name: str, run: _Run) -> StrategyForecast:
    config, batch, gradients = run.config, run.batch, (2 if run.narrow else NUMBER) * run.trained
    layers, width = config.num_hidden_layers, config.hidden_size
    at_once = run.context if name == "full" else run.chunk
    tokens = batch * at_once
    held = graph_bytes(
        config,
        batch,
        at_once,
        checkpoint_blocks=run.checkpoint_blocks,
        fused=run.fused,
        half=run.half,
    )
    graph = round(run.graph_share * held) + run.half_copies
    memory = NUMBER * math.prod(config.architecture.memory_shape(config))
    pieces = run.pieces(at_once)
    further = batch * (pieces - 1) * (1 if run.checkpoint_blocks else layers)
    graph += round(_PIECE_COPIES * further * memory)
    if run.half and run.fused and not run.checkpoint_blocks:
        graph -= 2 * tokens * layers * config.architecture.cost.mixes * width
    sums = 0 if name == "full" or run.chunks == 1 else NUMBER * run.trained
    lifted = run.lifted and name in RECORDED
    states = _state_bytes(name, config, batch, lifted=lifted)
    head = NUMBER * min(config.vocab_size * width, run.trained)
    logits = NUMBER * min(tokens * config.vocab_size, LOGITS_AT_ONCE)
    layer = (gradients - 2 * head) / layers
    workspace = run.graph_share * NUMBER * tokens * (2 * config.intermediate_size + _BACKWARD_VECTORS * width)
    terms = [graph + states + head + workspace + _LAYER_SHARE * max(0.0, layer)]
    if run.checkpoint_blocks:
        # no block's graph at the loss; the lowest block's comes when those above it are gradients already
        inputs = round(run.graph_share * NUMBER * tokens * width * (layers - 1))
        terms.append(inputs + states + _LOGIT_COPIES * logits + head)
        terms.append(gradients - max(0.0, layer) - head + graph - inputs + states + workspace)
    else:
        terms.append(graph + states + _LOGIT_COPIES * logits + head)
    terms = [term + run.whole_gradients for term in terms]
    device = run.weights + sums + round(max(*terms, gradients + states))
    recordings, reserved = 0, _RESERVED_SHARE * device
    if run.recorded and run.chunks > 1 and name in RECORDED:
        recordings = sums + round(RECORDED_SHARE * max(terms)) + head
        reserved = run.weights + recordings + gradients
    tape = 0
    if name in RECORDED:
        recorded = run.chunks - 2  # not what is before the first chunk and in the last
        if recorded > 0:
            kind = "lifted" if lifted else "own"
            if name == "checkpoint" or pieces > 1:  # a border forgets all
                kind = "whole"
            one = record_bytes(kind, config, run.log_decays, batch, run.ranks * run.chunk, narrow=run.narrow)
            tape = recorded * math.ceil(one / (run.ranks * ALIGNMENT)) * ALIGNMENT
    return StrategyForecast(
        strategy=name,
        parameters=run.weights,
        gradients=gradients + sums,
        graph=graph,
        states=states,
        device=device,
        tape=tape,
        recordings=recordings,
        reserved=round(reserved),
        lifted=lifted,
    )


def graph_bytes(
    config: RwkvRevConfig,
    batch: int,
    length: int,
    *,
    checkpoint_blocks: bool = False,
    fused: bool = False,
    half: bool = False,
) -> int:
    """Bytes that the graph of ``batch`` rows of ``length`` tokens keeps, loss and weights aside, in float32.

    With ``checkpoint_blocks`` the inputs of the blocks, and one block's graph while it is differentiated. ``half``:
    mixes are counted, of which autocast makes copies that are not kept.
    """
    width = config.hidden_size
    layers = 1 if checkpoint_blocks else config.num_hidden_layers
    cost = config.architecture.cost
    state = cost.states(config, batch, length, fused)
    again = fused and not checkpoint_blocks
    vectors = (cost.fused_vectors if fused else cost.vectors) - (cost.mixes if again and not half else 0)
    vectors = vectors * width + (1 if again else 2) * config.intermediate_size
    inputs = config.num_hidden_layers * width if checkpoint_blocks else 0
    return NUMBER * (batch * length * (layers * vectors + 2 * width + inputs) + layers * state)


def runs_fused(config: RwkvRevConfig, device: torch.device) -> bool:
    """Whether the CUDA kernels run, of which a forecast wants to know."""
    keys = config.architecture.shape(config.architecture.keys, config)
    return choose_kernel(None, torch.empty((0, 0, *keys), device=device)) == "triton"


def tokens_at_once(config: RwkvRevConfig, weights: int, batch: int, length: int, chunk: int) -> int:
    """Tokens that strategies whose gradient does not depend on it run at once of chunks of ``chunk`` tokens.

    What surrounds a chunk (its graph, launches, checks, passes over whole states) costs as much for one token as for
    64. So chunks of up to :data:`TINY_CHUNK` tokens are doubled up to 64 tokens, and those of up to :data:`SMALL_CHUNK`
    too, but to a sixteenth of the context at most: a short one still has several. The graph takes no more beyond that
    of one chunk than the weights, states, or 512 MiB, whichever is the most. The gradient of the whole context is the
    same, and every bit is that of a run whose chunks are that long.

    Args:
        weights: bytes.
        batch: B, rows.
        length: T, tokens.
        chunk: C, tokens.
    """
    if chunk > SMALL_CHUNK:
        return chunk
    room = max(_SMALL_GRAPH, weights, _state_bytes("reversible", config, batch))
    room += graph_bytes(config, batch, chunk)
    groups = 0 if chunk <= TINY_CHUNK else _FEWEST_GROUPS
    while (
        2 * chunk <= _MOST_AT_ONCE
        and 2 * chunk * groups <= length
        and graph_bytes(config, batch, 2 * chunk) <= room
    ):
        chunk *= 2
    return chunk


def _state_bytes(name: str, config: RwkvRevConfig, batch: int, *, lifted: bool = False) -> int:
    """What a strategy keeps of memories beside the graph."""
    memory = NUMBER * batch * math.prod(config.architecture.memory_shape(config))
    copies = _STATE_COPIES.get(name)
    if copies is None:
        return 0
    more, arithmetic = (_LIFTED_COPIES, _LIFTED_ARITHMETIC) if lifted else (0, 0)
    return ((copies + more) * config.num_hidden_layers + _STATE_ARITHMETIC + arithmetic) * memory


def record_bytes(
    kind: str,
    config: RwkvRevConfig,
    log_decays: Sequence[Tensor],
    batch: int,
    length: int,
    *,
    narrow: bool = False,
) -> int:
    """What one chunk puts on the tape: tensors of all layers, each rounded up to the tape's alignment.

    ``kind``: ``whole`` states, ``lifted`` remnants (an estimate), or the architecture's ``own``. ``narrow``:
    activations are in 16 bits.
    """
    cost, shift = config.architecture.cost, (2 if narrow else NUMBER) * batch * config.hidden_size
    total = 0
    layers: Sequence[Tensor | None] = log_decays or [None] * config.num_hidden_layers
    for log_decay in layers:
        if kind == "lifted" and cost.lifted is not None:
            memory = cost.lifted(config, batch, length)
        else:
            memory = (
                cost.whole(config, batch)
                if kind == "whole"
                else cost.remnant(config, log_decay, batch, length)
            )
        total += sum(
            math.ceil(nbytes / ALIGNMENT) * ALIGNMENT for nbytes in (*[shift] * cost.shifts, *memory)
        )
    return total
