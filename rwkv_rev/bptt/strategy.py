"""The seam behind which every gradient strategy stands: from a batch and a state to a loss with gradients.

A strategy sees the model through :class:`LanguageModel` and the batch through :class:`LossInputs`, and returns a
:class:`LossResult` whose loss can be back-propagated by any trainer.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from rwkv_rev.cells.block import Block, FloatStates
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.errors import StrategyError
from rwkv_rev.loss import IGNORE, sum_cross_entropy
from rwkv_rev.state import RwkvRevState


class LanguageModel(Protocol):
    """What strategies need of a model."""

    training: bool

    @property
    def blocks(self) -> list[Block]: ...
    @property
    def head(self) -> nn.Module: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def checkpoints_blocks(self) -> bool: ...
    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor: ...
    def normalize(self, hidden: Tensor) -> Tensor: ...
    def run(self, x: Tensor, state: RwkvRevState, mask: ChunkMask | None) -> tuple[Tensor, RwkvRevState]: ...
    def modules(self) -> "object": ...
    def parameters(self) -> "object": ...


@dataclass(frozen=True)
class LossInputs:
    """One batch.

    Attributes:
        input_ids: [B, T] int64, or None with ``inputs_embeds`` [B, T, D].
        valid: [B, T] bool, or None when every token counts.
        targets: [B, T] int64, what each position predicts, -100 where nothing.
        divisor: what the summed cross-entropy is divided by (predicted tokens, or the trainer's own number).
        state: the state before the first token; its tensors may require gradients.
        final_state_gradient: gradient of some further objective with respect to the final state.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    valid: Tensor | None
    targets: Tensor
    divisor: float | Tensor
    state: RwkvRevState
    final_state_gradient: RwkvRevState | None = None

    @property
    def length(self) -> int:
        return self.targets.shape[1]

    def chunks(self, length: int) -> "list[Chunk]":
        """The batch in chunks of ``length`` tokens; the last may be shorter."""
        stops = [min(start + length, self.length) for start in range(0, self.length, length)]
        starts = range(0, self.length, length)
        # one transfer each, so that no chunk waits for the device later
        predicts = [bool(n) for n in _any_per_chunk(self.targets != IGNORE, length)]
        # a batch without any target: zero gradients, as ``full`` gives, since data-parallel reduction waits for them
        predicts[-1] |= not any(predicts)
        full = (
            [True] * len(stops)
            if self.valid is None
            else [not n for n in _any_per_chunk(~self.valid, length)]
        )
        return [
            Chunk(self, index, start, stop, predicts[index], full[index])
            for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of a batch; ``predicts`` and ``is_full`` are known without asking the device."""

    inputs: LossInputs
    index: int
    start: int
    stop: int
    predicts: bool
    is_full: bool

    @property
    def length(self) -> int:
        return self.stop - self.start

    def mask(self) -> ChunkMask | None:
        if self.is_full or self.inputs.valid is None:
            return None
        return ChunkMask.of(self.inputs.valid[:, self.start : self.stop])

    def targets(self) -> Tensor:
        return self.inputs.targets[:, self.start : self.stop]

    def embeds(self) -> Tensor | None:
        embeds = self.inputs.inputs_embeds
        return None if embeds is None else embeds[:, self.start : self.stop]

    def embed(self, model: LanguageModel, embeds: Tensor | None = None) -> Tensor:
        """The chunk's input to block 0, [B, C, D]."""
        ids = self.inputs.input_ids
        return model.embed(None if ids is None else ids[:, self.start : self.stop], embeds)


@dataclass(frozen=True)
class LossResult:
    """A loss ready for ``backward()``, the state after the last token (without graph), and what it took.

    ``report`` holds ``strategy``, ``chunk_length``, and where they apply ``tape_bytes`` (most at once),
    ``drift`` and others a strategy documents.
    """

    loss: Tensor
    state: RwkvRevState
    report: dict[str, object] = field(default_factory=dict)


class Strategy(ABC):
    """A way to back-propagate through a context.

    Args:
        chunk_length: C, tokens per chunk.
        tape: ``host``, ``device`` or ``disk``; only strategies that keep something between chunks use it.
        tape_dir: folder of the ``disk`` tape.
    """

    name: str

    def __init__(self, chunk_length: int, tape: str = "host", tape_dir: str | None = None) -> None:
        self.chunk_length = chunk_length
        self.tape = tape
        self.tape_dir = tape_dir

    @abstractmethod
    def loss(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        """The loss of ``inputs`` and its gradients, to be had by ``loss.backward()``."""

    def stream(self, model: LanguageModel, inputs: LossInputs) -> LossResult:
        """The loss alone, chunk after chunk without graph, in memory that does not grow with T."""
        with torch.no_grad(), uncached_autocast(inputs.targets.device):
            total = None
            state = inputs.state
            for chunk in inputs.chunks(self.chunk_length):
                x = chunk.embed(model, chunk.embeds())
                hidden, state = model.run(x, state, chunk.mask())
                part = sum_cross_entropy(
                    model.normalize(hidden),
                    model.head,
                    chunk.targets(),
                    scale=1 / inputs.divisor,
                    vocab_size=model.vocab_size,
                )
                total = part if total is None else total + part
        assert total is not None
        return LossResult(total, state, {"strategy": self.name, "chunk_length": self.chunk_length})


def trainable(model: LanguageModel, inputs: LossInputs) -> list[Tensor]:
    """Everything a loss is differentiated by: parameters, initial state, input embeddings; no repeats.

    Raises:
        StrategyError: for parameters of which this process holds a shard.
    """
    candidates = [*model.parameters(), *inputs.state.tensors()]  # type: ignore[misc]
    if any(hasattr(tensor, "full_tensor") for tensor in candidates):  # a DTensor
        raise StrategyError(
            "the model's parameters are sharded inside it: chunks need them whole. Shard the model as one unit, "
            "fully_shard(model), not block by block, or use bptt = 'full'"
        )
    if inputs.inputs_embeds is not None:
        candidates.append(inputs.inputs_embeds)
    return [tensor for tensor in candidates if tensor.requires_grad]


def uncached_autocast(device: torch.device) -> AbstractContextManager:
    """The caller's autocast without its weight cache.

    Weights cast in a sweep without graph must not be reused in one with graph, where they would get no gradient.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def flatten_states(states: list[FloatStates]) -> list[Tensor]:
    """time shift, wkv memory, channel shift of every layer, in one list."""
    flat: list[Tensor] = []
    for time, channel in states:
        assert time.memory is not None
        flat += [time.shift, time.memory, channel.shift]
    return flat


def _any_per_chunk(flags: Tensor, length: int) -> list[int]:
    padded = torch.nn.functional.pad(flags.any(dim=0), (0, -flags.shape[1] % length))
    return padded.view(-1, length).any(dim=1).tolist()
