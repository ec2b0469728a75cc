"""Sub-chunks of a chunk of RWKV-5: their sizes, the powers of w that they need, and the sums between them.

What :mod:`rwkv_rev.wkv.chunked_wkv5` computes with; its equations, and what a level is, stand there. A plan depends on
the decays and on the number of tokens alone, so the chunks of a sweep share one.
"""

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rev.exporting import exporting

SUB_CHUNK = 32
"""Tokens per sub-chunk (shorter for shorter inputs)."""

SAFE_EXPONENT = 30.0
"""Powers of w up to e^30 are used as factors: the product of two stays far inside float32."""


def length_for(tokens: int) -> int:
    """c, a power of two."""
    return min(SUB_CHUNK, 1 << (tokens - 1).bit_length())


def pieces(x: Tensor, length: int) -> Tensor:
    """[B, T, H, N] -> J sub-chunks of c tokens, [J, B, H, c, N]: a view, or a copy with zeros after the last token."""
    batch, tokens, heads, size = x.shape
    missing = -tokens % length
    if missing:
        x = torch.cat([x, x.new_zeros(batch, missing, heads, size)], 1)
    return x.unflatten(1, (-1, length)).permute(1, 0, 3, 2, 4)


def split(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The same in new memory."""
    batch, tokens, heads, size = x.shape
    full, rest = divmod(tokens, length)
    blocks = x.new_empty(-(-tokens // length), batch, heads, length, size, dtype=dtype)
    if full:
        blocks[:full].copy_(x[:, : full * length].unflatten(1, (full, length)).permute(1, 0, 3, 2, 4))
    if rest:
        blocks[full, :, :, :rest].copy_(x[:, full * length :].transpose(1, 2))
        blocks[full, :, :, rest:].zero_()
    return blocks


def join(blocks: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`split`."""
    joined = blocks.permute(1, 0, 3, 2, 4).to(dtype).flatten(1, 2)
    return joined[:, :tokens].contiguous()


class Level(NamedTuple):
    """Pairs (t, s) of one block size: rows t and columns s of every block, the powers of w on both sides."""

    size: int
    diagonal: bool  # t > s in the same block; else t in the upper, s in the lower half of a pair
    row_powers: Tensor  # [H, size, N]
    column_powers: Tensor  # [H, size, N]
    lag: Tensor  # [size, size], t - 1 - s, zero where t <= s in a diagonal block


class SubChunks:
    """Sizes and powers of w, for the forward and the backward pass: J sub-chunks of c tokens each.

    Args:
        log_decay: [H, N], in the dtype of the arithmetic.
        tokens: T.
        counts: [B] valid tokens of the rows, None for all.
    """

    def __init__(self, log_decay: Tensor, tokens: int, counts: Tensor | None) -> None:
        self.tokens = tokens
        self.c = length_for(tokens)
        self.J = -(-tokens // self.c)
        self.dtype, self.device = log_decay.dtype, log_decay.device
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.log_decay = log_decay.to(wide)  # [H, N]
        steps = torch.arange(self.c + 1, device=self.device)
        self.powers = self._power(steps)  # [H, c + 1, N]
        starts = torch.arange(self.J, device=self.device)[:, None] * self.c  # [J, 1]
        totals = torch.full((1,), tokens, device=self.device) if counts is None else counts
        self.before = torch.minimum(starts, totals)  # [J, 1 or B] valid tokens before the sub-chunk
        self.inside = torch.minimum(starts + self.c, totals) - self.before  # and in it
        self.whole = counts is None and tokens % self.c == 0
        if self.whole:
            self.to_end = (self.c - 1 - steps[:-1])[None, None]  # [1, 1, c]
            self.end_powers = self.powers[:, :-1].flip(1)  # [H, c, N]
        else:
            self.to_end = (self.inside[..., None] - 1 - steps[:-1]).clamp(min=0)  # [J, 1 or B, c]
            self.end_powers = self.powers.transpose(0, 1)[self.to_end].transpose(
                -2, -3
            )  # [J, 1 or B, H, c, N]
        self.levels = self._levels()

    def _power(self, exponents: Tensor) -> Tensor:
        """[..., c] -> [..., H, c, N]"""
        exponents = exponents.to(self.log_decay.dtype)
        return torch.exp(exponents[..., None, :, None] * self.log_decay[:, None]).to(self.dtype)

    @cached_property
    def before_powers(self) -> Tensor:
        """w^before, [J, 1 or B, H, N, 1]."""
        return self._power(self.before[..., None]).transpose(-1, -2)

    @cached_property
    def inside_powers(self) -> Tensor:
        """w^inside, [J, 1 or B, H, N, 1]."""
        return self._power(self.inside[..., None]).transpose(-1, -2)

    def _levels(self) -> list[Level]:
        strongest = math.inf if exporting() else -float(self.log_decay.min())
        levels, size = [], self.c
        while size > 1 and strongest * size / 2 > SAFE_EXPONENT:
            size //= 2
            steps = torch.arange(size, device=self.device)
            lag = steps[:, None] + steps.flip(0)
            powers = self.powers[:, :size]
            levels.append(Level(size, False, powers, powers.flip(1), lag.to(self.dtype)))
        if size > 1:
            steps = torch.arange(size, device=self.device)
            lag = (steps[:, None] - 1 - steps).clamp(min=0)
            from_middle = steps - size // 2
            rows, columns = self._power(from_middle), self._power(-1 - from_middle)
            levels.append(Level(size, True, rows, columns, lag.to(self.dtype)))
        return levels

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, N] -> [J, B, H, c, N] in the arithmetic dtype, zeros after the last token."""
        return split(x, self.c, self.dtype)

    def join(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`split`."""
        return join(blocks, self.tokens, dtype)

    def prefixes(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """P of every sub-chunk start [J, B, H, N, N], and the contribution of all tokens [B, H, N, N].

        The one place that computes a contribution, so that it has the same bits with and without outputs.
        """
        prefixes = k.new_empty(self.J + 1, *k.shape[1:3], k.shape[4], k.shape[4])
        prefixes[0].zero_()
        written = (k * self.end_powers).transpose(-1, -2)
        torch.bmm(written.flatten(0, 2), v.flatten(0, 2), out=prefixes[1:].flatten(0, 2))
        places = prefixes.unbind(0)
        for j, decay in enumerate(self._inside_steps):
            places[j + 1].addcmul_(decay, places[j])
        return prefixes[:-1], places[-1].clone()

    def prefix_gradients(self, starts: Tensor | None, end: Tensor) -> Tensor:
        """Gradients of P_{j+1}, [J, B, H, N, N], from those of S_j (None: zero) and of the contribution."""
        shape = (self.J, *end.shape)
        gradients = end.new_empty(shape)
        places = gradients.unbind(0)
        places[-1].copy_(end)
        decays = self._inside_steps
        for j in range(self.J - 1, 0, -1):
            if starts is None:
                torch.mul(decays[j], places[j], out=places[j - 1])
            else:
                torch.addcmul(starts[j], decays[j], places[j], out=places[j - 1])
        return gradients

    @cached_property
    def _inside_steps(self) -> tuple[Tensor, ...]:
        return self.inside_powers.expand(self.J, -1, -1, -1, -1).unbind(0)

    def sum_prefix_gradient(self, starts: Tensor, ends: Tensor) -> Tensor:
        """d log_decay [H, N] through P_{j+1} = w^n P_j + U_j, from P_j and the gradients of P_{j+1}."""
        weights = self.inside_powers[..., 0] * self.inside[..., None, None]
        return ((starts * ends).sum(-1) * weights).sum((0, 1))
