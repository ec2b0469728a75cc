"""RWKV-6 recurrence by PyTorch operators, parallel in time within sub-chunks; any device and dtype.

    y_t = r_t (S_t + diag(u) k_t^T v_t),      S_{t+1} = diag(w_t) S_t + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch", section 4.2): RWKV-5 with a decay of its own for every token and key channel. With
p_t the product of all w_q with q < t in a sub-chunk of n tokens that begins with the state S, and e_s that of q > s,

    y_t = (r_t p_t) S + sum_{s<t} A_ts v_s + (r_t u . k_t) v_t,     A_ts = sum_i r_ti k_si prod_{s<q<t} w_qi
    S'  = diag(w_1 ... w_n) S + sum_s (k_s e_s)^T v_s

For A the products over s < q < t are split at the border of two halves of the sub-chunk, then at that of two quarters,
and so on, into one that ends at the border and one that begins there. Each is a product of decays, nothing is divided:
every factor is at most 1 whatever the decays, one that vanishes belongs to a product that does, and a decay of 1e-9 a
step costs nothing more. P_{j+1} = diag(w_1 ... w_n) P_j + U_j, from zero, is scanned over the sub-chunks; its last
value is what all tokens contribute, and S_j = P_j + diag(all w before) state.

Kept for the backward pass are the inputs as they came and one N x N state per sub-chunk. It is written by hand, and
cannot be differentiated again. The gradient of log w_q is a sum over the products that w_q is in, in which nothing
cancels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.exporting import exporting
from rwkv_rev.wkv.naive import arithmetic_dtype
from rwkv_rev.wkv.sub_chunks import SUB_CHUNK as SUB_CHUNK
from rwkv_rev.wkv.sub_chunks import join, length_for, split

LOWEST_LOG_DECAY = -1e4
"""Stands for all below it: e^-10000 is zero in float64, and sums of such logarithms keep the smaller ones apart."""


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-6; arguments and results as in :func:`rwkv_rev.wkv.wkv6`."""
    dtype = arithmetic_dtype(k)
    k, log_decay = _valid(k, log_decay, mask)
    if mask is not None:
        r = r.masked_fill(~mask[..., None, None], 0)
    out, contribution = _Wkv6.apply(r, k, v, log_decay, bonus.to(dtype), state.to(dtype))
    return out, contribution, _log_factor(log_decay)


def wkv6_contribution(
    k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The second and third result of :func:`wkv6`, to the bit."""
    k, log_decay = _valid(k, log_decay, mask)
    batch, _, heads, size = k.shape
    nothing = k.new_zeros(batch, heads, size, size, dtype=arithmetic_dtype(k))
    if torch.is_grad_enabled():
        without = k.new_zeros(heads, size, dtype=nothing.dtype)
        contribution = _Wkv6.apply(torch.zeros_like(k), k, v, log_decay, without, nothing)[1]
    else:
        decays, keys, values = _Decays(log_decay, nothing.dtype), *_written(k, v)
        for _ in decays.levels(None, keys):
            pass
        contribution = decays.prefixes(keys, values)[1]
    return contribution, _log_factor(log_decay)


def _valid(k: Tensor, log_decay: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and log decays in the arithmetic's dtype; tokens that do not count write and decay nothing."""
    log_decay = log_decay.to(arithmetic_dtype(k)).clamp(min=LOWEST_LOG_DECAY)
    if mask is None:
        return k, log_decay
    return k.masked_fill(~mask[..., None, None], 0), log_decay.masked_fill(~mask[..., None, None], 0)


def _log_factor(log_decay: Tensor) -> Tensor:
    return log_decay.sum(1, dtype=torch.float32 if log_decay.device.type == "mps" else torch.float64)


def _written(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    length, dtype = length_for(k.shape[1]), arithmetic_dtype(k)
    return split(k, length, dtype), split(v, length, dtype)


class _Decays:
    """The products of decays, in J sub-chunks of n tokens.

    Attributes:
        total: [J, B, H, N, 1], the decay of a whole sub-chunk, once :meth:`levels` is exhausted.
    """

    def __init__(self, log_decay: Tensor, dtype: torch.dtype) -> None:
        self.length = length_for(log_decay.shape[1])
        self._decays = split(log_decay, self.length, dtype).exp_()

    def levels(self, before: Tensor | None, after: Tensor) -> Iterator[tuple[int, Any, Tensor]]:
        """Yields h = 1, 2, 4, ... n / 2 and :func:`halves`: the second of ``before`` (or None), the first of ``after``.

        Into both all decays up to the borders of blocks of h tokens are multiplied by then.

        Args:
            before: [J, B, H, n, N], to be scaled by p of the module's equations in the end; or None.
            after: likewise by e.
        """
        half, total = 1, self._decays.flatten(0, 3)
        while half < self.length:
            left, right = None if before is None else halves(before, half)[1], halves(after, half)[0]
            yield half, left, right
            first, second = total.view(-1, 2, total.shape[-1]).unbind(1)
            if left is not None:
                left.mul_(first[:, None])
            right.mul_(second[:, None])
            total, half = first * second, 2 * half
        self.total = total.view(*after.shape[:3], -1, 1)
        if after.device.type == "cpu":
            for scaled in (before, after):
                if scaled is not None:
                    _flush(scaled)

    def prefixes(self, writes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """P of every sub-chunk's start [J, B, H, N, N], and the contribution of all tokens [B, H, N, N].

        The one place that computes a contribution, so that it has the same bits with and without outputs.
        """
        pieces, *rows = writes.shape
        prefixes = writes.new_empty(pieces + 1, *rows[:2], rows[3], rows[3])
        prefixes[0].zero_()
        torch.bmm(writes.mT.flatten(0, 2), values.flatten(0, 2), out=prefixes[1:].flatten(0, 2))
        places = prefixes.unbind(0)
        for j, decay in enumerate(self.total.unbind(0)):
            places[j + 1].addcmul_(decay, places[j])
        return prefixes[:-1], places[-1].clone()

    def since_the_first(self) -> Tensor:
        """The decay of all sub-chunks before each, [J, B, H, N, 1]."""
        return torch.cat([torch.ones_like(self.total[:1]), self.total[:-1].cumprod(0)])


def _is_empty(state: Tensor) -> bool:
    """Whether a state is zero, as before a text; asked where the answer needs no waiting."""
    return state.device.type == "cpu" and not exporting() and not state.any()


def _flush(x: Tensor) -> None:
    """Make zeros of what is below the smallest normal number: with it a processor computes many times as long."""
    torch.ops.aten.hardshrink.out(x, torch.finfo(x.dtype).tiny, out=x)


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The first and second halves of all blocks of 2 h tokens, [J B H n / 2h, h, N] of [J, B, H, n, N] (views)."""
    first, second = x.view(-1, 2, half, x.shape[-1]).unbind(1)
    return first, second


def _pairs(square: Tensor, half: int) -> Tensor:
    """Of [J, B, H, n, n], t in the second and s in the first half of a block, [J B H, n / 2h, h, h] (a view)."""
    length = square.shape[-1]
    return square.as_strided(
        (square.numel() // length**2, length // (2 * half), half, half),
        (length**2, 2 * half * (length + 1), length, 1),
        square.storage_offset() + half * length,
    )


def _product(pairs: Tensor, x: Tensor) -> Tensor:
    """``pairs @ x``; products of matrices cost many times the arithmetic where those have one or two rows."""
    rows = pairs.shape[-1]
    if rows == 1:
        return pairs * x
    if rows == 2:
        return torch.addcmul(pairs[..., :1] * x[..., :1, :], pairs[..., 1:], x[..., 1:, :])
    return pairs @ x


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        decays, (writes, values) = _Decays(log_decay, bonus.dtype), _written(k, v)
        reads = split(r, decays.length, bonus.dtype)
        among = reads.new_zeros(*reads.shape[:-1], decays.length)  # A
        among.diagonal(dim1=-2, dim2=-1).copy_((reads * writes).mul_(bonus[:, None]).sum(-1))
        for half, left, right in decays.levels(reads, writes):
            pairs = _pairs(among, half)
            pairs.copy_(torch.bmm(left, right.mT).view_as(pairs))
        starts, contribution = decays.prefixes(writes, values)
        ctx.save_for_backward(r, k, v, log_decay, bonus, state, starts, among)
        states = starts
        if not _is_empty(state):
            kept = any(ctx.needs_input_grad)
            states = torch.addcmul(starts, decays.since_the_first(), state, out=None if kept else starts)
        out = reads @ states
        out.flatten(0, 2).baddbmm_(among.flatten(0, 2), values.flatten(0, 2))
        return join(out, k.shape[1], out.dtype), contribution

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_contribution: Tensor) -> tuple[Tensor, ...]:
        r, k, v, log_decay, bonus, state, starts, among = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            decays, (ks, vs) = _Decays(log_decay, bonus.dtype), _written(k, v)
            rs, go = (split(x, decays.length, bonus.dtype) for x in (r, grad_out))
            before, after = torch.ones_like(rs), torch.ones_like(ks)

            # inside the sub-chunks
            pulled = go @ vs.mT  # gradient of A
            diagonal = pulled.diagonal(dim1=-2, dim2=-1)[..., None]
            scaled = diagonal * bonus[:, None]
            dr, dk, dv = scaled * ks, scaled * rs, among.mT @ go
            d_bonus = (rs * ks).mul_(diagonal).sum((0, 1, 3))
            sums = _ProductSums(rs)
            for half, to_left, to_right in decays.levels(before, after):
                left, right = halves(rs, half)[1] * to_left, halves(ks, half)[0] * to_right
                pairs = _pairs(pulled, half).flatten(0, 1)
                d_left, d_right = _product(pairs, right), _product(pairs.mT, left)
                halves(dr, half)[1].addcmul_(d_left, to_left)
                halves(dk, half)[0].addcmul_(d_right, to_right)
                sums.add(half, d_left, left, d_right, right)

            # outputs from the states S_j = P_j + since state, and what is written, P_{j+1} = total P_j + (k e)^T v
            since = decays.since_the_first()
            left, right = rs.mul_(before), ks.mul_(after)
            d_left = go @ torch.addcmul(starts, since, state).mT
            d_states = left.mT @ go
            arrived = d_states * since
            ends = _scan_back(d_states, decays.total, grad_contribution.to(bonus.dtype))
            d_right = vs @ ends.mT
            dv += right @ ends
            dr.addcmul_(d_left, before)
            dk.addcmul_(d_right, after)
            sums.add(0, d_left, left, d_right, right)

            # log w through the decays of whole sub-chunks
            in_since = (arrived * state).sum(-1)  # [J, B, H, N], of the log of ``since``
            d_total = (starts * ends).sum(-1) * decays.total[..., 0]
            d_total[:-1] += in_since[1:].flip(0).cumsum(0).flip(0)
            d_log_decay = sums.total() + d_total[..., None, :]
            tokens = k.shape[1]
            return (
                join(dr, tokens, r.dtype),
                join(dk, tokens, k.dtype),
                join(dv, tokens, v.dtype),
                join(d_log_decay, tokens, log_decay.dtype),
                d_bonus,
                arrived.sum(0),
            )


def _scan_back(d_states: Tensor, total: Tensor, end: Tensor) -> Tensor:
    """Gradients of P_{j+1}, [J, B, H, N, N], from those of S_j, of which P_j is a term, and of the contribution."""
    gradients = torch.empty_like(d_states)
    places = gradients.unbind(0)
    places[-1].copy_(end)
    for j in range(len(places) - 1, 0, -1):
        torch.addcmul(d_states[j], total[j], places[j], out=places[j - 1])
    return gradients


class _ProductSums:
    """The gradient of log w_q: of every product of decays that a token's vector is scaled by, if w_q is in it.

    A product's own gradient times the product is the gradient of its logarithm; w_q is in that of a token t > q of an
    upper half, and of a token s < q of a lower one. One matrix product with zeros and ones sums them all.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, length = like, like.shape[-2]
        halves = [1 << i for i in range(1, length.bit_length() - 1)]  # blocks of one token have no product
        self._places = {half: number for number, half in enumerate(halves)}
        self._terms = like.new_empty(*like.shape[:3], len(halves) + 2, length, like.shape[-1])
        q, t = torch.arange(length, device=like.device)[:, None], torch.arange(length, device=like.device)
        counted = [(q // h == t // h) & torch.where(t // h % 2 == 1, q < t, q > t) for h in halves]
        self._counted = torch.cat([*counted, q < t, q > t], 1).to(like.dtype)

    def add(self, half: int, d_left: Tensor, left: Tensor, d_right: Tensor, right: Tensor) -> None:
        """Of the two halves of blocks of 2 h tokens; h = 0: of all tokens to both ends of the sub-chunk."""
        if half == 1:
            return
        if half == 0:
            torch.mul(d_left, left, out=self._terms[..., -2, :, :])
            torch.mul(d_right, right, out=self._terms[..., -1, :, :])
            return
        blocks = self._terms[..., self._places[half], :, :].unflatten(-2, (-1, 2, half))
        first, second = blocks.flatten(0, 2).unbind(-3)
        torch.mul(d_left.view_as(second), left.view_as(second), out=second)
        torch.mul(d_right.view_as(first), right.view_as(first), out=first)

    def total(self) -> Tensor:
        """[J, B, H, n, N]"""
        return self._counted @ self._terms.flatten(-3, -2)
