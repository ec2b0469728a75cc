"""Token shift, and the carried ``y`` that makes it reversible.

RWKV mixes each token's vector with that of the token before: ``mix(x_t, x_{t-1}; mu) = mu x_t + (1 - mu) x_{t-1}``.
At a chunk boundary x_{a-1} is lost. The remnant is one mix of the chunk's first token a, per channel the one that
sees x_{a-1} best: ``y = mu* x_a + (1 - mu*) x_{a-1}`` with the largest ``|1 - mu*|`` of the cell's mixes. Then

    x_{a-1} = (y - mu* x_a) / (1 - mu*),

and since ``|1 - mu_m| <= |1 - mu*|`` for every other mix m, a rounding of y moves no mix by more than an ulp of its
operands ``mu_m x_a`` and ``(1 - mu_m) x_{a-1}``: the inverse is stable even where its division is not. Three
amendments, each of which carries the mix with mu = 0, that is x_{a-1} unchanged (so does a mu* that vanishes in
``1 - mu*``, which could leave a trace of x_a where another mix is exactly 0):

* a mu* outside [0, 1] would bury a small x_{a-1} under ``mu* x_a``, and with it a mix whose own mu is near 0;
* the gradient of mu reads x_{a-1} itself, not a mix of it, and must be as exact as the mixes in channels that
  barely see it (``1 - mu*`` below :data:`SMALLEST_COEFFICIENT`; bfloat16 checkpoints hold many mu of exactly 1);
* a row without a valid token in the chunk keeps its x_{a-1} equal to the bit.

The forward pass uses the round-tripped x_{a-1}, so both sweeps see the same bits. Cost: D numbers per boundary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rev.cells.at_once import alike
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.wkv.dispatch import is_fused

SMALLEST_COEFFICIENT = 1 / 16
"""Least ``1 - mu*`` at which a mix is inverted; the round trip of x_{a-1} then stays within about 16 ulp."""


def token_shift(x: Tensor, shift: Tensor, mask: ChunkMask | None) -> Tensor:
    """The vector of the token before, for every token: [B, C, D] from ``x`` [B, C, D] and ``shift`` [B, D]."""
    if mask is None:
        return _behind(shift, x)[0]
    shift = shift.to(x.dtype)[:, None]
    index = (mask.previous + 1)[:, :, None].expand_as(x)
    return torch.cat([shift, x], dim=1).gather(1, index)


def _behind(shift: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The vectors before every token [B, C, D], and the last one [B, 1, D]: views.

    Parts of one tensor: autograd joins their gradients, where it would fill up that of each slice of x with zeros.
    """
    return torch.cat([shift.to(x.dtype)[:, None], x], dim=1).split([x.shape[1], 1], dim=1)


def last_token(x: Tensor, shift: Tensor, mask: ChunkMask | None) -> Tensor:
    """The shift state after the chunk: the last valid token's vector [B, D], ``shift`` where there is none."""
    if mask is None:
        return x[:, -1].clone()  # a view would keep the whole chunk in memory
    index = (mask.last + 1)[:, None, None].expand(-1, 1, x.shape[2])
    return torch.cat([shift.to(x.dtype)[:, None], x], dim=1).gather(1, index)[:, 0]


def token_mixes(
    x: Tensor, shift: Tensor, mask: ChunkMask | None, mus: list[Tensor], *, as_they_are: bool = False
) -> tuple[Tensor, ...]:
    """:func:`mix` of every token with the one before, for each of ``mus``: [B, C, D] each.

    On a CUDA device without a mask in one launch (:mod:`rwkv_rev.cells.triton_token_shift`). ``as_they_are``: mus are 1
    and 0, so that on a CPU nothing is computed.
    """
    if mask is None and is_fused(x):
        from rwkv_rev.cells import triton_token_shift

        return triton_token_shift.token_mixes(x, shift, mus)
    return _mixes(x, token_shift(x, shift, mask), mus, as_they_are=as_they_are)


def _mixes(x: Tensor, shifted: Tensor, mus: list[Tensor], *, as_they_are: bool) -> tuple[Tensor, ...]:
    if as_they_are and x.device.type == "cpu":
        return x, shifted
    return tuple(mix(x, shifted, mu) for mu in mus)


def mixes_and_last(
    x: Tensor, shift: Tensor, mask: ChunkMask | None, mus: list[Tensor], *, as_they_are: bool = False
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """:func:`token_mixes`, and :func:`last_token` where both come of one launch, whose gradient is one launch, too."""
    if mask is None and is_fused(x):
        from rwkv_rev.cells import triton_token_shift

        return triton_token_shift.mixes_and_last(x, shift, mus)
    if mask is not None or x.device.type != "cpu":
        return token_mixes(x, shift, mask, mus, as_they_are=as_they_are), None
    shifted, last = _behind(shift, x)
    return _mixes(x, shifted, mus, as_they_are=as_they_are), last[:, 0].clone()


def mix(x: Tensor, shifted: Tensor, mu: Tensor) -> Tensor:
    """``mu x + (1 - mu) shifted``; mu [D] may lie outside [0, 1]."""
    return torch.lerp(shifted, x, mu.to(x.dtype))


def carried_mix(mixes: list[Tensor]) -> Tensor:
    """mu* [D], float64: per channel the best-conditioned of the cell's mixes; 0 where that one cannot be inverted."""
    return _carried(torch.stack([mu.detach() for mu in mixes]).double())


def carried_mixes(layers: list[list[Tensor]]) -> list[Tensor]:
    """:func:`carried_mix` of each layer's mixes, in few launches where they are of one kind."""
    if len({len(mixes) for mixes in layers}) > 1 or not alike(mu for mixes in layers for mu in mixes):
        return [carried_mix(mixes) for mixes in layers]
    stacked = torch.stack([mu.detach() for mixes in layers for mu in mixes]).double()
    return list(_carried(stacked.unflatten(0, (len(layers), -1))).unbind(0))


def _carried(mixes: Tensor) -> Tensor:
    """mu* [..., D] of mixes [..., M, D], float64."""
    seen = 1 - mixes
    best = seen.abs().argmax(dim=-2, keepdim=True)
    mu, seen = mixes.gather(-2, best).squeeze(-2), seen.gather(-2, best).squeeze(-2)
    return torch.where((seen < 1) & (seen >= SMALLEST_COEFFICIENT), mu, 0.0)


class Border(NamedTuple):
    """What a chunk's carried y depends on beside x_{a-1}.

    Attributes:
        first: x_a [B, D], the chunk's first valid token.
        mu: mu*, float64, [D], or [B, D] with 0 in rows without a valid token.
    """

    first: Tensor
    mu: Tensor

    @classmethod
    def of(cls, x: Tensor, mu: Tensor, mask: ChunkMask | None) -> "Border":
        """The border before the chunk with input x [B, C, D]."""
        if mask is None:
            return cls(x[:, 0].clone(), mu)  # a view would keep the whole chunk in memory
        first = x.gather(1, mask.first[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
        return cls(first, torch.where((mask.count > 0)[:, None], mu, 0.0))

    def carry(self, shift: Tensor) -> Tensor:
        """The carried y [B, D] (dtype of x) from x_{a-1} [B, D]."""
        if is_fused(self.first):
            from rwkv_rev.cells import triton_token_shift

            return triton_token_shift.carry(shift, self.first, self.mu)
        return torch.lerp(shift.double(), self.first.double(), self.mu).to(self.first.dtype)

    def uncarry(self, y: Tensor) -> Tensor:
        """x_{a-1} [B, D] (dtype of x), the inverse of :meth:`carry`."""
        if is_fused(self.first):
            from rwkv_rev.cells import triton_token_shift

            return triton_token_shift.uncarry(y, self.first, self.mu)
        x = torch.addcmul(y, self.mu, self.first, value=-1)  # in float64, as mu* is
        return x.div_(1 - self.mu).to(self.first.dtype)
