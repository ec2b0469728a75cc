r"""How far two models' logits are apart, over one text, without a second or third copy of ``[T, V]``.

    largest, mean   of |z - z'| over all tokens and vocabulary entries
    KL              mean over tokens of sum_v p_v (log p_v - log p'_v), p the original's distribution, in nats
    top-1           share of tokens for which both put the same entry first
    bits            mean of -log2 p(next token), over all tokens but the last: bits per token, which is bits per
                    byte for byte-level vocabularies

The original's logits arrive in pieces; each piece is compared in float64 and dropped.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rev.errors import RwkvRevError

PIECE = 64  # tokens compared at a time: some 2.5 kB of float64 for each vocabulary entry


@dataclass(frozen=True)
class LogitComparison:
    """Distance between an original's logits and a converted model's; NaN where either is not finite."""

    tokens: int
    largest: float
    mean: float
    kl: float
    top1: float
    original_bits: float | None
    converted_bits: float | None


class Beside:
    """Passes logits on and meanwhile keeps their ``largest`` distance from others; NaN is the largest.

    Args:
        pieces, others: ``[t, V]``, for as many tokens, cut wherever.
    """

    def __init__(self, pieces: Iterable[Tensor], others: Iterable[Tensor]) -> None:
        self._pieces, self._others = pieces, others
        self._largest = torch.zeros((), dtype=torch.float64)

    def __iter__(self) -> Iterator[Tensor]:
        for piece, other in zip(_cut(self._pieces), _cut(self._others), strict=True):
            difference = (piece.double() - other.double()).abs().max()
            # torch.maximum keeps NaN, which the built-in max would lose.
            self._largest = torch.maximum(self._largest, difference)
            yield piece

    @property
    def largest(self) -> float:
        return float(self._largest)


def largest_difference(pieces: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Largest |z - z'|; arguments as of :class:`Beside`."""
    beside = Beside(pieces, others)
    for _ in beside:
        pass
    return beside.largest


def compare_logits(original: Iterable[Tensor], converted: Tensor, tokens: Tensor) -> LogitComparison:
    """Compare logits token by token.

    Args:
        original: pieces ``[t, V]`` of any floating dtype, together T tokens in order.
        converted: ``[T, V]``.
        tokens: the ids ``[T]`` both models read, for the bits; T = 1 leaves these None.

    Raises:
        RwkvRevError: if the original yields another number of tokens or vocabulary entries.
    """
    total, vocabulary = converted.shape
    largest = torch.zeros((), dtype=torch.float64)
    absolute = kl = original_bits = converted_bits = 0.0
    agreeing = seen = 0
    for piece in _cut(original):
        first, seen = seen, seen + piece.shape[0]
        if seen > total or piece.shape[1] != vocabulary:
            raise RwkvRevError(
                f"the original gave {piece.shape[1]} logits for each of {seen} or more tokens, "
                f"{vocabulary} for each of {total} were expected: is it the right SOURCE?"
            )
        z, zc = piece.double(), converted[first:seen].double()
        difference = (z - zc).abs()
        # torch.maximum keeps NaN, which the built-in max would lose.
        largest = torch.maximum(largest, difference.max())
        absolute += float(difference.sum())
        agreeing += int((z.argmax(-1) == zc.argmax(-1)).sum())
        log_p, log_pc = z.log_softmax(-1), zc.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_pc)).sum())
        following = tokens[first + 1 : seen + 1, None]
        original_bits -= float(log_p[: len(following)].gather(1, following).sum()) / math.log(2)
        converted_bits -= float(log_pc[: len(following)].gather(1, following).sum()) / math.log(2)
    if seen != total:
        raise RwkvRevError(f"the original gave logits for {seen} tokens of {total}")
    return LogitComparison(
        tokens=total,
        largest=float(largest),
        mean=absolute / (total * vocabulary),
        kl=kl / total,
        top1=agreeing / total,
        original_bits=original_bits / (total - 1) if total > 1 else None,
        converted_bits=converted_bits / (total - 1) if total > 1 else None,
    )


def _cut(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tokens, :data:`PIECE` at a time."""
    left: list[Tensor] = []
    for given in pieces:
        for rows in given.split(PIECE):
            left.append(rows)
            if sum(map(len, left)) >= PIECE:
                joined = torch.cat(left)
                yield joined[:PIECE]
                left = [joined[PIECE:]] if len(joined) > PIECE else []
    if left:
        yield torch.cat(left)
