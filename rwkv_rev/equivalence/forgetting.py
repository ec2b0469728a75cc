"""What reversal must keep of a text: bits forgotten per step, by layer, and bytes on the tape by chunk length.

A model reads the text in chunks, as the first sweep of ``reversible`` does, and every chunk's record is counted:

    remnants   what lies on the tape for the memories. Whole states where nothing is inverted (RWKV-4); else what a
               chunk forgets: bits that are known beforehand (RWKV-5), or that follow from the text (RWKV-6, and RWKV-7
               with ``remnants="lifted"``)
    theory     what that is at least: of a decay ``log2(1/w)`` bits per token and element, at most the element's 32 per
               chunk, 62 of a model in float64 (MacKay et al. 2018, "Reversible Recurrent Neural Networks", section
               3); of a transition the same of its singular values, which is a figure to compare with and no bound
               (docs/lifting.md); unknown where there is neither
    whole      states at the same boundaries, what ``checkpoint`` keeps: 32 bits a number, where a cell has no other
               format; 64 of a model in float64
    tape       all of it: remnants, token shifts, fingerprints and widths

The first chunk is not counted: the state before it is given. Costs a forward pass for every chunk length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.arguments import checked
from rwkv_rev.bptt.layers import advance_layers
from rwkv_rev.bptt.records import LayerRecord, layer_record, make_record
from rwkv_rev.bptt.reversible import Reversible
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells.block import ExactStates
from rwkv_rev.cells.contract import ReversibleCell, tensors_of
from rwkv_rev.errors import CheckpointError, ConfigError, DataError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.numerics import STATE_BITS, WIDE_STATE_BITS, bits_forgotten
from rwkv_rev.progress import Progress
from rwkv_rev.reversal.memory import Remnant
from rwkv_rev.reversal.tape import Tape

TOKENS = 4096
CHUNKS = (64, 256, 1024)


@dataclass(frozen=True)
class Kept:
    """Bits that chunks keep of the memories of some layers; they add up.

    Attributes:
        remnants, whole: bits on the tape, and of whole states.
        theory: bits that decays and transitions destroyed; None where they are not known.
        shifts: bytes of carried token shifts.
        element_steps: elements of the memories, times tokens.
    """

    remnants: int = 0
    theory: float | None = 0.0
    whole: int = 0
    shifts: int = 0
    element_steps: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        theory = None if self.theory is None or other.theory is None else self.theory + other.theory
        return Kept(
            self.remnants + other.remnants,
            theory,
            self.whole + other.whole,
            self.shifts + other.shifts,
            self.element_steps + other.element_steps,
        )

    def per_step(self, bits: float | None) -> float | None:
        """``bits`` per element and step; None where there are no elements."""
        return None if bits is None or not self.element_steps else bits / self.element_steps


def kept_by(
    cells: Sequence[ReversibleCell],
    before: ExactStates,
    remnants: Sequence[Remnant],
    record: LayerRecord,
    length: int,
) -> Kept:
    """What a layer keeps of a chunk of ``length`` tokens: ``record``, of the ``remnants`` after states ``before``."""
    found = Kept()
    for cell, state, remnant, tensors in zip(cells, before, remnants, record.cells, strict=True):
        sizes = [tensor.nbytes for tensor in tensors]
        counts = [value.numel() for value in tensors_of(cell.values(state))[cell.shifts :]]
        elements = sum(counts)
        whole = sum(tensor.nbytes for tensor in state.tensors()[cell.shifts :] if tensor.numel() in counts)
        found += Kept(
            remnants=8 * sum(sizes[cell.shifts :]),
            theory=_destroyed(
                cell, remnant, elements, length, WIDE_STATE_BITS if whole > 4 * elements else STATE_BITS
            ),
            whole=8 * whole,
            shifts=sum(sizes[: cell.shifts]),
            element_steps=elements * length,
        )
    return found


def _destroyed(cell: ReversibleCell, remnant: Any, elements: int, length: int, most: int) -> float | None:
    """Bits that a chunk's decay destroyed of a memory of so many elements, of ``most`` bits each."""
    if (log_decay := cell.log_decay()) is not None:
        return float(bits_forgotten(log_decay, length, most).sum()) * elements / log_decay.numel()
    if (factor := cell.divided_by(remnant)) is not None:  # of the whole chunk
        return float(bits_forgotten(factor.log(), 1, most).sum()) * elements / factor.numel()
    return None if elements else 0.0


@dataclass(frozen=True)
class ChunkForgetting:
    """What a text took in chunks of one length.

    Attributes:
        chunk: C, tokens per chunk. counted: tokens of all chunks but the first.
        layers: what each layer kept. tape_bytes: all that lay on the tape.
    """

    chunk: int
    counted: int
    layers: tuple[Kept, ...]
    tape_bytes: int

    @property
    def total(self) -> Kept:
        return sum(self.layers, Kept())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bits per step and element, bytes per token."""
        total, per_token = self.total, 1 / self.counted

        def bits(kept: Kept) -> dict[str, float | None]:
            return {
                "remnants": kept.per_step(kept.remnants),
                "theory": kept.per_step(kept.theory),
                "whole": kept.per_step(kept.whole),
            }

        return {
            "chunk_length": self.chunk,
            "counted_tokens": self.counted,
            "bits_per_step": {"layers": [bits(layer) for layer in self.layers], "all": bits(total)},
            "tape_bytes": self.tape_bytes,
            "bytes_per_token": {
                "tape": self.tape_bytes * per_token,
                "remnants": total.remnants / 8 * per_token,
                "token_shifts": total.shifts * per_token,
                "whole_states": total.whole / 8 * per_token,
            },
        }


@dataclass(frozen=True)
class Forgetting:
    """What reversal must keep of a text: ``chunks`` by chunk length; ``tokens`` were read.

    ``lifted``: remnants are those of ``remnants="lifted"``.
    """

    tokens: int
    chunks: tuple[ChunkForgetting, ...]
    lifted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        chunks = [chunk.to_dict() for chunk in self.chunks]
        return {"tokens": self.tokens, "lifted": self.lifted, "chunks": chunks}


@checked
def measure_source(
    source: str | Path,
    text: str | Path,
    *,
    file: str | None = None,
    revision: str | None = None,
    tokens: int = TOKENS,
    chunk_length: int | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Forgetting:
    """Let a model, any SOURCE or a converted folder, read a text, and count what reversal must keep.

    Args:
        source, file, revision: as of :func:`rwkv_rev.inspect`.
        text: to read, or the ``Path`` of a UTF-8 file.
        tokens: at most so many of it.
        chunk_length: C; those of :data:`CHUNKS` that fit twice into the text when None.
        device: where the model reads, in float32.
        progress: tell on stderr how far it is.

    Raises:
        DataError: for a text that cannot be read, or is shorter than two chunks.
        SourceError, CheckpointError: if the source cannot be found or read.
    """
    from rwkv_rev.equivalence.text import read_text

    chunks = CHUNKS if chunk_length is None else (chunk_length,)
    if min(chunks) < 1 or 2 * min(chunks) > tokens:
        raise ConfigError(
            f"tokens = {tokens}: chunks of {min(chunks):,} need at least {2 * min(chunks):,}, of which the first chunk "
            "forgets nothing that is kept"
        )
    content = read_text(text) if isinstance(text, Path) else text
    with _opened(source, file, revision, content, tokens, progress) as (model, ids):
        if len(ids) < 2 * min(chunks):
            raise DataError(
                f"the text has {len(ids):,} tokens; two chunks of {min(chunks):,} need {2 * min(chunks):,}: give a "
                "longer text, or shorter chunks (--chunk-length)"
            )
        return measure_forgetting(
            model.to(device),
            ids.to(device),
            [chunk for chunk in chunks if 2 * chunk <= len(ids)],
            progress=progress,
        )


def measure_forgetting(
    model: RwkvRevForCausalLM, ids: Tensor, chunk_lengths: Sequence[int], *, progress: bool = False
) -> Forgetting:
    """The same of ``ids`` [T], by a model in eval mode; chunks that are not whole are left out."""
    with Progress("reading", len(ids) * len(chunk_lengths), "tokens", wanted=progress) as shown:
        found = tuple(_in_chunks(model, ids, chunk, shown) for chunk in chunk_lengths)
    return Forgetting(len(ids), found, any(cell.lifts for block in model.blocks for cell in block.cells))


@torch.no_grad()
def _in_chunks(model: RwkvRevForCausalLM, ids: Tensor, chunk: int, shown: Progress) -> ChunkForgetting:
    whole = ids[None, : len(ids) // chunk * chunk]
    inputs = LossInputs(whole, None, None, whole, 1.0, model.model.initial_state(1))
    blocks, strategy = model.blocks, Reversible(chunk)
    for block in blocks:
        block.lift(True)
    plans = [block.plan(chunk) for block in blocks]
    states = [block.exact(inputs.state.layer(i)) for i, block in enumerate(blocks)]
    layers, tape_bytes = [Kept() for _ in blocks], 0
    with Tape("host", ids.device) as tape:
        for part in inputs.chunks(chunk):
            advanced = advance_layers(blocks, part.embed(model), states, plans, None, whole_output=False)
            if part.index > 0:
                record = make_record(states, advanced, strategy.keep(states, advanced), exact=True).start()()
                tape.push(record)
                tape_bytes += tape.nbytes
                tape.pop()
                for i, (block, before, layer) in enumerate(zip(blocks, states, advanced, strict=True)):
                    own = layer_record(record, i, len(block.cells))
                    layers[i] += kept_by(block.cells, before, layer.remnants, own, chunk)
            states = [layer.states for layer in advanced]
            shown.add(chunk)
    return ChunkForgetting(chunk, whole.shape[1] - chunk, tuple(layers), tape_bytes)


@contextmanager
def _opened(
    source: str | Path, file: str | None, revision: str | None, text: str, tokens: int, progress: bool
) -> Iterator[tuple[Any, Tensor]]:
    """A model in float32 on the CPU, and the first ids [T] that its tokenizer makes of a text."""
    from rwkv_rev.converters.converted import ConvertedModel
    from rwkv_rev.equivalence.original import open_original
    from rwkv_rev.equivalence.text import encode_by, encode_text
    from rwkv_rev.folders.folder import is_converted
    from rwkv_rev.folders.hub import resolve
    from rwkv_rev.folders.source import parse_source
    from rwkv_rev.loading import load_model, without_bars
    from rwkv_rev.tokenization.choice import choose_tokenizer, name_for_vocabulary

    if is_converted(source):
        with ConvertedModel(source) as stored, without_bars():
            ids = encode_text(text, Path(source), vocabulary=stored.config.vocab_size, tokens=tokens)
            yield load_model(source, "cpu", torch.float32).eval(), ids
        return
    parsed = parse_source(str(source), file=file, revision=revision)
    local = resolve(parsed, progress=progress)
    with open_original(parsed) as original:
        assert original.config is not None
        vocabulary = original.config.vocab_size
        try:
            name_for_vocabulary(vocabulary)
        except CheckpointError:
            raise DataError(
                f"a vocabulary of {vocabulary} belongs to no known tokenizer: convert {source} with --tokenizer, and "
                "let the folder read the text"
            ) from None
        tokenizer = choose_tokenizer(vocabulary, source_directory=local.directory)
        ids = encode_by(
            lambda part: tokenizer.encode(part, add_special_tokens=False),
            text,
            vocabulary=vocabulary,
            tokens=tokens,
            named=f"the tokenizer of {source}",
        )
        with without_bars():
            model = RwkvRevForCausalLM.from_pretrained(
                None, config=original.config, state_dict=dict(original.own_tensors), dtype=torch.float32
            )
        yield model.eval(), ids
