"""Held-out documents that are training documents, too: their scores tell nothing about other texts.

Documents are compared by their token ids, so that a copy under another name or in another format is found; the end
token that training puts behind a document is no difference. Limit: a held-out passage inside a longer training
document is not found. Of the training data only documents are read whose length, first, middle and last id are those
of a held-out one.
"""

import hashlib
from collections import Counter

import numpy as np

from rwkv_rev.printable import counted
from rwkv_rev.training.token_store import TokenStore

_NAMED = 5


def shared_documents(training: TokenStore, held_out: TokenStore) -> list[str]:
    """One line where documents of ``held_out`` are in ``training``, with the files; else nothing."""
    lengths, held_lengths = training.lengths() - training.ends_added(), held_out.lengths()
    keys, held_keys = _keys(training, lengths), _keys(held_out, held_lengths)
    candidates = np.flatnonzero(_among(held_keys, keys) & (held_lengths > 0))
    known: dict[bytes, int] = {}
    for document in np.flatnonzero(_among(keys, held_keys[candidates]) & (lengths > 0)).tolist():
        known.setdefault(_digest(training, document, int(lengths[document])), document)
    first: dict[str, str] = {}
    shared: Counter[str] = Counter()
    for document in candidates.tolist():
        same = known.get(_digest(held_out, document, int(held_lengths[document])))
        if same is not None:
            name = held_out.source(document)
            shared[name] += 1
            first.setdefault(name, training.place(same))
    if not shared:
        return []
    total = Counter(held_out.source(document) for document in range(len(held_out)))
    texts = [
        f"{name} ({count} of {counted(total[name], 'document')}, the first is {first[name]})"
        for name, count in [*shared.items()][:_NAMED]
    ]
    if len(shared) > _NAMED:
        texts.append(f"and {counted(len(shared) - _NAMED, 'more file')}")
    return [
        f"held-out data is training data, too, its scores tell nothing about other texts: {', '.join(texts)}"
    ]


def _keys(store: TokenStore, lengths: np.ndarray) -> np.ndarray:
    """A number per document, of its length, first, middle and last id; uint64 [documents]."""
    keys = lengths.astype(np.uint64)
    for position in (np.zeros_like(lengths), lengths // 2, lengths - 1):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + store.ids_at(position).astype(np.uint64)
    return keys


def _among(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which keys are among others; sorted, since the table of numpy 2.0 overflows where they are over 2**63."""
    return np.isin(keys, others, kind="sort")


def _digest(store: TokenStore, document: int, length: int) -> bytes:
    return hashlib.blake2b(store.tokens(document, 0, length).tobytes(), digest_size=16).digest()
