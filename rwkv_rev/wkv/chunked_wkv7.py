"""RWKV-7 recurrence by PyTorch operators, parallel in time within sub-chunks; any device and dtype.

    S_t = (diag(w_t) + b_t z_t^T) S_{t-1} + k_t^T v_t,      y_t = r_t S_t

with z = -kappa, b = a kappa (Peng et al. 2025, "RWKV-7 Goose", section 4; S is [key, value] here). Inside a sub-chunk
that begins with the state S, let c_t = sum_{q<=t} log w_q and scale what reads by the decay since then, what writes by
its inverse,

    Z_t = e^{c_{t-1}} z_t,   R_t = e^{c_t} r_t,   B_t = e^{-c_t} b_t,   K_t = e^{-c_t} k_t.

Then u_t = z_t^T S_{t-1}, what is removed from the state at each token, solves a triangular system (the WY form of a
product of rank-one changes; Yang et al. 2024, "Parallelizing linear transformers with the delta rule"):

    u = Z S + tril(Z B^T, -1) u + tril(Z K^T, -1) v
    y = R S + tril(R B^T) u + tril(R K^T) v
    S' = diag(e^{c_n}) (S + B^T u + K^T v)

With W = (1 - tril(Z B^T, -1))^-1 Z and X likewise of tril(Z K^T, -1) v, which do not depend on S and are made for all
sub-chunks at once, u = W S + X: three small products remain for each sub-chunk in turn. e^{-c} stays below e^{0.607 n},
3e8 for n = 32: RWKV-7 never decays by more than e^{-1/2} of a bit in a step (0.545 a token), and no product of two
factors is larger than 1. a = 1 with w = 1, a projection, is nothing special. Sums of logarithms are taken in float64.

Kept for the backward pass are the inputs as they came, and of each sub-chunk its N x N state and u. It is written by
hand, and cannot be differentiated again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.wkv.naive import arithmetic_dtype
from rwkv_rev.wkv.sub_chunks import SUB_CHUNK as SUB_CHUNK
from rwkv_rev.wkv.sub_chunks import join, length_for, pieces, split

SMALLEST_DECAY = math.exp(-80)
"""Of a sub-chunk, so that its inverse fits float32; reached by 2.5 a token, four times what RWKV-7 can decay by."""
_CONTIGUOUS = torch.contiguous_format


def wkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7; arguments and results as in :func:`rwkv_rev.wkv.wkv7`."""
    r, k, removal, log_decay = _unmasked(mask, r, k, removal, log_decay)
    out, after = _Wkv7.apply(r, k, v, log_decay, removal, rate, state.to(arithmetic_dtype(k)))
    return out, after


def wkv7_transition(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """P and U as in :func:`rwkv_rev.wkv.wkv7_transition`: the recurrence from [1 | 0] with the values [0 | v].

    In float64, so that a state that goes through P is no less precise than by :func:`wkv7` in float32.
    """
    r, k, removal, log_decay = _unmasked(mask, r, k, removal, log_decay)
    p = _Pieces.of(*(x.double() for x in (r, k, v, log_decay, removal, rate)))
    size = k.shape[-1]
    values = torch.cat([torch.zeros_like(p.values), p.values], -1)
    state = values.new_zeros(*values.shape[1:3], size, 2 * size)
    state[..., :size] = torch.eye(size, dtype=state.dtype, device=state.device)
    transition, update = _scan(p, values, state)[-1].split(size, -1)
    return transition.contiguous(), update.contiguous()


def _unmasked(mask: Tensor | None, *tokens: Tensor) -> Sequence[Tensor]:
    """Zeros where a token is masked: w is 1 there, and nothing is taken out or written."""
    return tokens if mask is None else [x.masked_fill(~mask[..., None, None], 0) for x in tokens]


class _Pieces(NamedTuple):
    """The tokens in J sub-chunks of n, [J, B, H, ...] each: what reads and what writes, one above the other.

    Attributes:
        reads: Z and R, [2 n, N].
        writes: B and K, [2 n, N], and ``to_end``, the same times e^{c_n}.
        decays: e^{c_t}, ``before`` e^{c_{t-1}} and ``grown`` e^{-c_t}, [n, N].
        among: the lower triangles of the products of both, [2 n, 2 n].
        solving: (1 - tril(Z B^T, -1))^-1, [n, n].
        of_state: W, [n, N].
        values: what is written: u, of which X is there at first, and v, [2 n, N].
    """

    reads: Tensor
    writes: Tensor
    to_end: Tensor
    decays: Tensor
    before: Tensor
    grown: Tensor
    among: Tensor
    solving: Tensor
    of_state: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, removal: Tensor, rate: Tensor
    ) -> "_Pieces":
        dtype, length = arithmetic_dtype(k), length_for(k.shape[1])
        wide = torch.float32 if k.device.type == "mps" else torch.float64
        r, k, v, removal, rate = (pieces(x, length) for x in (r, k, v, removal, rate))
        decays = pieces(log_decay, length).cumsum(-2, dtype=wide).exp_().to(dtype, memory_format=_CONTIGUOUS)
        before = torch.cat([torch.ones_like(decays[..., :1, :]), decays[..., :-1, :]], -2)
        grown = decays.clamp(min=SMALLEST_DECAY).reciprocal_()
        rows = (*decays.shape[:3], 2 * length, decays.shape[-1])
        reads, writes, values = (decays.new_empty(rows) for _ in range(3))
        (z, receptance), (b, key), (x, v_) = _halves(reads), _halves(writes), _halves(values)
        torch.mul(removal, before, out=z).neg_()
        torch.mul(r, decays, out=receptance)
        b.copy_(removal).mul_(rate).mul_(grown)  # not in the dtype of the two
        torch.mul(k, grown, out=key)
        v_.copy_(v)
        among = (reads @ writes.mT).mul_(_earlier(length, reads))
        one = torch.eye(length, dtype=dtype, device=k.device)
        solving = torch.linalg.solve_triangular(
            one - among[..., :length, :length],
            one.expand(*rows[:3], length, length),
            upper=False,
            unitriangular=True,
        )
        x.copy_(solving @ (among[..., :length, length:] @ v_))
        to_end = writes * decays[..., -1:, :]
        return cls(reads, writes, to_end, decays, before, grown, among, solving, solving @ z, values)

    @property
    def ends(self) -> Tensor:
        """e^{c_n}, [J, B, H, N, 1]."""
        return self.decays[..., -1:, :].mT


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower n of 2 n rows (views)."""
    first, second = x.unflatten(-2, (2, -1)).unbind(-3)
    return first, second


def _scan(p: _Pieces, values: Tensor, state: Tensor) -> Tensor:
    """The states [J + 1, B, H, N, M] before and after each sub-chunk; in ``values`` [.., 2 n, M], X becomes u."""
    states = state.new_empty(len(values) + 1, *state.shape)
    states[0].copy_(state)
    rows = (p.of_state, p.ends, p.to_end.mT, values, _halves(values)[0])
    steps = zip(*(x.flatten(1, 2).unbind(0) for x in rows), strict=True)
    places = states.flatten(1, 2).unbind(0)
    for j, (of_state, end, to_end, written, u) in enumerate(steps):
        u.baddbmm_(of_state, places[j])
        torch.mul(end, places[j], out=places[j + 1])
        places[j + 1].baddbmm_(to_end, written)
    return states


def _earlier(length: int, like: Tensor) -> Tensor:
    """One where a read comes after a write: Z of earlier tokens alone, R of its own token, too."""
    square = torch.ones(length, length, dtype=like.dtype, device=like.device)
    return torch.cat([square.tril(-1), square.tril()]).repeat(1, 2)


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        removal: Tensor,
        rate: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        p = _Pieces.of(r, k, v, log_decay, removal, rate)
        states = _scan(p, p.values, state)
        removed, _ = _halves(p.values)
        starts = states[:-1]
        kept = removed.clone() if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(r, k, v, log_decay, removal, rate, starts, kept)
        out = _halves(p.reads)[1] @ starts
        out.flatten(0, 2).baddbmm_(_halves(p.among)[1].flatten(0, 2), p.values.flatten(0, 2))
        return join(out, k.shape[1], out.dtype), states[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        r, k, v, log_decay, removal, rate, starts, removed = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            p = _Pieces.of(r, k, v, log_decay, removal, rate)
            _halves(p.values)[0].copy_(removed)
            length, dtype = p.decays.shape[-2], p.decays.dtype
            go = split(grad_out, length, dtype)
            _, receptance = _halves(p.reads)

            # y = R S + tril(R [B K]^T) [u v]
            d_among = torch.empty_like(p.among)
            torch.matmul(go, p.values.mT, out=_halves(d_among)[1])
            d_values = _halves(p.among)[1].mT @ go
            d_reads = torch.empty_like(p.reads)
            torch.matmul(go, starts.mT, out=_halves(d_reads)[1])
            d_starts = receptance.mT @ go
            del go  # this and the like: many vectors of a token are alive here at once

            # back through S' = e^{c_n} S + [B K]^T [u v] and u = W S + X, sub-chunk by sub-chunk
            d_ends = torch.empty_like(starts)  # of S'
            d_ends[-1].copy_(grad_state)
            d_u, _ = _halves(d_values)
            writes_u, _ = _halves(p.to_end)
            rows = (d_starts, d_u, writes_u, p.of_state.mT, p.ends, d_ends)
            steps = list(zip(*(x.flatten(1, 2).unbind(0) for x in rows), strict=True))
            for j in range(len(steps) - 1, -1, -1):
                d_start, d_removed, write, of_state, end, d_end = steps[j]
                d_removed.baddbmm_(write, d_end)
                d_start.addcmul_(end, d_end).baddbmm_(of_state, d_removed)
                if j:
                    steps[j - 1][-1].copy_(d_start)
            d_state = d_starts[0].clone()
            del d_starts, d_start, steps, rows
            _halves(d_values)[1].add_(_halves(p.to_end)[1] @ d_ends)
            d_to_end = p.values @ d_ends.mT

            # the triangular system
            d_alone = p.solving.mT @ d_u
            d_z = d_alone @ starts.mT
            d_among[..., :length, :].copy_(d_alone @ p.values.mT)
            _halves(d_values)[1].add_(p.among[..., :length, length:].mT @ d_alone)
            dv = join(_halves(d_values)[1], k.shape[1], v.dtype)
            del d_values, d_u, d_removed, d_alone
            d_among.mul_(_earlier(length, d_among))

            # what reads and what writes
            _halves(d_reads)[0].copy_(d_z)
            del d_z
            d_reads.flatten(0, 2).baddbmm_(d_among.flatten(0, 2), p.writes.flatten(0, 2))
            d_writes = d_among.mT @ p.reads
            d_writes.addcmul_(d_to_end, p.decays[..., -1:, :])
            del d_among
            (d_z, d_r), (d_b, d_k) = _halves(d_reads), _halves(d_writes)

            # log w: through e^{c_t}, e^{c_{t-1}}, e^{-c_t} of every token, and e^{c_n} of the whole
            in_reads, in_writes = p.reads.mul_(d_reads), p.writes.mul_(d_writes)
            until = in_reads.unflatten(-2, (2, -1)).sum(-3) - in_writes.unflatten(-2, (2, -1)).sum(-3)
            until[..., -1, :] += (
                p.to_end.mul_(d_to_end).sum(-2) + d_ends.mul_(starts).sum(-1) * p.ends[..., 0]
            )
            square = torch.ones(length, length, dtype=dtype, device=k.device)
            d_log_decay = square.triu() @ until - _halves(in_reads)[0]

            d_b.mul_(p.grown)
            removals, rates = split(removal, length, dtype), split(rate, length, dtype)
            d_removal = torch.addcmul(d_b * rates, d_z, p.before, value=-1)
            tokens = k.shape[1]
            return (
                join(d_r.mul_(p.decays), tokens, r.dtype),
                join(d_k.mul_(p.grown), tokens, k.dtype),
                dv,
                join(d_log_decay, tokens, log_decay.dtype),
                join(d_removal, tokens, removal.dtype),
                join(d_b.mul_(removals), tokens, rate.dtype),
                d_state,
            )
