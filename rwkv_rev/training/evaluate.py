"""Bits per byte and perplexity by position in the context: does a long context help this model on this text?

Every document is cut into rows of at most T tokens, each beginning from the model's initial state, as in training.
A predicted token at position p of its row (it has seen p tokens before it) counts towards the bucket p falls in:
0-1k, 1k-4k, 4k-16k, and so on by factors of four.

    bits per byte = sum of -log2 p(token) / sum of the tokens' UTF-8 bytes

Tokens without bytes (an end token) count their bits only, prompts and the first token of a row nothing at all.
Streaming: chunk after chunk with the state carried on, logits in sub-chunks; memory does not grow with T. Where code
inside the model might look at positions, rows are read at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv_rev.adapted_model import load_adapted
from rwkv_rev.arguments import checked
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.counts import MOST
from rwkv_rev.device import choose_device
from rwkv_rev.distributed.sharded_reading import go_along_with_calls
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.foreign.search import Strangers, strangers, strangers_at
from rwkv_rev.initial_states import activations
from rwkv_rev.loading import load_tokenizer
from rwkv_rev.loss import IGNORE, cross_entropy, sub_chunks
from rwkv_rev.progress import Progress
from rwkv_rev.training.launch import choose_dtype
from rwkv_rev.training.records import Fields, refuse_half_named
from rwkv_rev.training.sources import find_sources
from rwkv_rev.training.token_cache import load_tokens
from rwkv_rev.training.token_store import TokenStore
from rwkv_rev.training.tuning import language_model

FIRST_EDGE = 1024
LAST_EDGE = 1 << 40


@dataclass
class Bucket:
    """Sums over the predicted tokens at positions ``start`` to ``stop`` (exclusive) of their rows."""

    start: int
    stop: int
    tokens: int = 0
    nats: float = 0.0
    nbytes: int = 0

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.nbytes if self.nbytes else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def name(self) -> str:
        """``0-1k``, ``4k-16k``; k is 1024 tokens, M is 1024 k."""
        return f"{_short(self.start)}-{_short(self.stop)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "positions": [self.start, self.stop],
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "bits_per_byte": None if not self.nbytes else self.bits_per_byte,
            "bits_per_token": self.bits_per_token,
            "perplexity": self.perplexity,
        }


@dataclass
class Evaluation:
    """Outcome of :func:`evaluate_documents`: one bucket per range of positions, and their sum.

    ``notes``: one line each about the data, for the user.
    """

    context_length: int
    buckets: list[Bucket] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Bucket:
        return Bucket(
            0,
            self.context_length,
            sum(bucket.tokens for bucket in self.buckets),
            sum(bucket.nats for bucket in self.buckets),
            sum(bucket.nbytes for bucket in self.buckets),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "context_length": self.context_length,
            "total": self.total.to_dict(),
            "buckets": [bucket.to_dict() for bucket in self.buckets],
        }


@torch.no_grad()
def evaluate_documents(
    model: nn.Module,
    store: TokenStore,
    token_bytes: Tensor,
    *,
    context_length: int,
    batch_size: int = 1,
    max_tokens: int = 0,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on all documents of a store.

    Args:
        model: a causal language model of this package, or peft's wrapper of one.
        store: the documents as token ids.
        token_bytes: UTF-8 bytes of each token id, int64 [V] (:func:`count_token_bytes`).
        context_length: T, tokens per row.
        batch_size: rows at once.
        max_tokens: stop after about so many tokens; 0 reads everything.
        dtype: of the arithmetic, by autocast; None for the weights' own.
        rank, world_size: this process's share of the rows; sums are exchanged at the end.
        progress: tell on stderr how far it is.

    Raises:
        ConfigError: for a context length that is none. DataError: if nothing is predicted.
    """
    _check_context_length(context_length)
    lm = language_model(model)
    store.check_vocabulary(lm.config.vocab_size)
    device = activations(lm.model).device
    edges = _edges(context_length)
    sums = torch.zeros(3, len(edges), dtype=torch.float64, device=device)  # tokens, nats, bytes
    token_bytes = token_bytes.to(device)
    rows = list(_rows(store, context_length, max_tokens))
    rows.sort(key=lambda row: row[1] - row[2])  # of like length together: less padding; longest first
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    training = model.training
    model.eval()
    try:
        mine = batches[rank::world_size]
        at_head = strangers_at(lm.head)
        looks = strangers(lm.model).unknown or at_head.unknown
        size = context_length if looks else lm.bptt.read_length
        go_along_with_calls(lm.model, sum(_calls(batch, size) for batch in mine))
        total = sum(stop - start for batch in mine for _, start, stop in batch)
        with (
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            Progress("evaluating", total, "tokens", wanted=progress) as shown,
        ):
            for batch in mine:
                _add_batch(lm, store, batch, size, at_head, token_bytes, edges.to(device), sums, shown.add)
    finally:
        model.train(training)
    if world_size > 1:
        dist.all_reduce(sums)
    buckets = []
    stops = [*edges[1:].tolist(), context_length]
    for start, stop, (tokens, nats, nbytes) in zip(edges.tolist(), stops, sums.T.tolist(), strict=True):
        if tokens:
            buckets.append(Bucket(start, stop, int(tokens), nats, int(nbytes)))
    if not buckets:
        raise DataError("no document has a token to predict; a row needs at least two tokens, one not prompt")
    return Evaluation(context_length, buckets)


@checked
def evaluate_directory(
    directory: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    context_length: int = 16384,
    batch_size: int = 1,
    max_tokens: int = 0,
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    messages_field: str | None = None,
    data_format: str = "auto",
    train_on: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    cache_dir: str | Path | None = None,
    adapter: str | Path | None = None,
    quantise: Literal["nf4", "int8"] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model folder on files: what ``rwkv-rev eval`` does.

    Args:
        directory: a converted or fine-tuned model folder.
        data: one source of text, or several: files, folders, globs or ``hf:owner/name``.
        context_length: T, tokens per row; every row begins anew.
        batch_size: rows at once.
        max_tokens: stop after about so many tokens; 0 reads everything.
        text_field: field of the text in records; ``text`` when None.
        prompt_field, completion_field: fields of records of which the completion alone is scored; ``prompt`` and
            ``completion`` when None.
        messages_field, data_format, train_on: how records of conversations are read, and what of them is scored, as
            in :class:`~rwkv_rev.training.config.FinetuneConfig`; the template is the folder's.
        dtype: of the arithmetic: auto, float32, bfloat16 or float16; auto is bfloat16 where a GPU has it.
        device: auto, cpu or cuda.
        cache_dir: where tokenised data is kept; the user's cache when None.
        adapter: folder of a LoRA of this model, in peft's layout.
        quantise: kind of linear maps in 4 or 8 bits (:mod:`rwkv_rev.foreign.quantised`).
        progress: tell on stderr how far it is.

    Raises:
        SourceError, CheckpointError: if the folder is not a whole model. DataError: for unusable data.
        ConfigError: for an argument of another kind, or too small, or half a pair of fields.
        RwkvRevError: for a device or dtype that is not there.
    """
    _check_context_length(context_length)
    for name, number, least in (("batch_size", batch_size, 1), ("max_tokens", max_tokens, 0)):
        if not least <= number <= MOST:
            raise ConfigError(f"{name} = {number} must be from {least} to {MOST}")
    refuse_half_named(text_field, prompt_field, completion_field, messages_field)
    named = (text_field, prompt_field, completion_field, messages_field)
    fields = Fields(*named, data_format, train_on)
    with ConvertedModel(directory) as source:  # refuses what is not a whole model
        vocab_size = source.config.vocab_size
    place = choose_device(device)
    arithmetic = choose_dtype(dtype, place)
    tokenizer = load_tokenizer(directory)
    sources = [str(source) for source in ([data] if isinstance(data, str | Path) else data)]
    fields.refuse_unused(source.kind for source in find_sources(sources))
    store = load_tokens(
        sources,
        tokenizer,
        fields=fields,
        end_token=None,
        vocab_size=vocab_size,
        cache_dir=cache_dir,
        progress=progress,
    )
    # as in training beside them, the other weights are in the dtype of the arithmetic
    weights = torch.float32 if quantise is None else getattr(torch, arithmetic)
    model = load_adapted(directory, place, weights, quantised=quantise, adapter=adapter)
    result = evaluate_documents(
        model,
        store,
        count_token_bytes(tokenizer, model.config.vocab_size),
        context_length=context_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dtype=None if arithmetic == "float32" else getattr(torch, arithmetic),
        progress=progress,
    )
    return replace(result, notes=store.notes)


def count_token_bytes(tokenizer: Any, vocab_size: int) -> Tensor:
    """UTF-8 bytes of every token id, int64 [V]; 0 for special tokens and ids without a token.

    Byte-level tokenizers know them exactly; of others each token is decoded alone, where a token that is no whole
    character counts the bytes of its replacement.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    own = getattr(tokenizer, "token_bytes", None)
    if own is not None:
        for index, piece in own.items():
            if index < vocab_size and (index not in special or vocab_size == 256):
                counts[index] = len(piece)
        return counts
    alphabet = _byte_alphabet()
    for token, index in tokenizer.get_vocab().items():
        if index >= vocab_size or index in special:
            continue
        exact = all(character in alphabet for character in token)
        counts[index] = len(token) if exact else len(tokenizer.decode([index]).encode("utf-8", "replace"))
    return counts


def _calls(rows: list[tuple[int, int, int]], size: int) -> int:
    """How many pieces a batch is read in."""
    return -(-(max(stop - start for _, start, stop in rows) - 1) // size)


def _add_batch(
    lm: Any,
    store: TokenStore,
    rows: list[tuple[int, int, int]],
    size: int,
    at_head: Strangers,
    token_bytes: Tensor,
    edges: Tensor,
    sums: Tensor,
    tell: Callable[[int], object],
) -> None:
    """Add the sums of some rows (document, first token, one past the last), side by side, by ``size`` tokens."""
    longest = max(stop - start for _, start, stop in rows)
    state = lm.initial_state(len(rows))
    alone = not (at_head.unknown or at_head.declared)  # else it is given rows and tokens as they stand
    for at in range(0, longest - 1, size):
        ids, targets, mask = _slice(store, rows, at, min(size, longest - 1 - at))
        read = int(mask.sum())
        ids, targets, mask = ids.to(sums.device), targets.to(sums.device), mask.to(sums.device)
        output = lm.model(ids, attention_mask=mask, state=state)
        state = output.state
        positions = torch.arange(at + 1, at + 1 + ids.shape[1], device=sums.device)
        hidden = output.last_hidden_state
        where = (torch.bucketize(positions, edges, right=True) - 1).expand_as(ids)
        for piece in sub_chunks(targets.shape, lm.config.vocab_size, whole=bool(at_head.unknown)):
            keep = targets[piece] != IGNORE
            predicted, bucket = targets[piece][keep], where[piece][keep]
            logits = lm.head(hidden[piece][keep]) if alone else lm.head(hidden[piece])[keep]
            nats = cross_entropy(logits, predicted, reduction="none").double()
            sums[0].index_add_(0, bucket, torch.ones_like(nats))
            sums[1].index_add_(0, bucket, nats)
            sums[2].index_add_(0, bucket, token_bytes[predicted].double())
        tell(read)


def _slice(
    store: TokenStore, rows: list[tuple[int, int, int]], at: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``at`` to ``at + size`` of each row, what each predicts, and which are tokens: [B, size] each."""
    ids = torch.zeros(len(rows), size, dtype=torch.int64)
    targets = torch.full((len(rows), size), IGNORE, dtype=torch.int64)
    mask = torch.zeros(len(rows), size, dtype=torch.int64)
    for index, (document, start, stop) in enumerate(rows):
        begin = start + at
        tokens = torch.from_numpy(store.tokens(document, begin, min(begin + size + 1, stop)))
        known = min(len(tokens), size)
        ids[index, :known] = tokens[:known]
        mask[index, :known] = 1
        counts = torch.from_numpy(store.loss(document, begin, min(begin + size + 1, stop)))
        following = torch.where(counts, tokens, IGNORE)[1:]
        targets[index, : len(following)] = following
    return ids, targets, mask


def _check_context_length(context_length: Any) -> None:
    if type(context_length) is not int or context_length < 2:
        raise ConfigError(f"context_length = {context_length!r} must be a number of at least 2 tokens")


def _rows(store: TokenStore, context_length: int, max_tokens: int) -> Iterator[tuple[int, int, int]]:
    taken = 0
    for document, length in enumerate(store.lengths().tolist()):
        for start in range(0, length, context_length):
            stop = min(start + context_length, length)
            if max_tokens:
                stop = min(stop, start + max_tokens - taken)
            if stop - start > 1:
                yield document, start, stop
                taken += stop - start
            if max_tokens and taken >= max_tokens - 1:
                return


def _edges(context_length: int) -> Tensor:
    edges = [0]
    edge = FIRST_EDGE
    while edge < min(context_length, LAST_EDGE):
        edges.append(edge)
        edge *= 4
    return torch.tensor(edges)


def _short(count: int) -> str:
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{letter}"
    return str(count)


def _byte_alphabet() -> set[str]:
    """The characters that byte-level BPE writes bytes as, one for each (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return {chr(code) for code in printable} | {chr(256 + extra) for extra in range(others)}
