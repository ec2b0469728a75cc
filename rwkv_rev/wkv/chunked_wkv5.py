"""RWKV-5 parallel in time: matrix products inside and between sub-chunks, no division by a decay.

With w constant in time, the sub-chunk that starts in state S gives (t, s count its tokens)

    out_t = (r_t w^t) S + (r_t u . k_t) v_t + sum_{s<t} A_ts v_s,     A_ts = sum_i r_ti k_si w_i^{t-1-s}

and contributes U = sum_s (k_s w^{n-1-s})^T v_s to the next state (the quadratic-inside, linear-between form
of Yang et al. 2024, "Gated Linear Attention", section 4). P_{j+1} = w^n P_j + U_j, from zero, is scanned over
the sub-chunks; its last value is the contribution of all tokens, and S_j = P_j + w^{before_j} state.

A_ts factors as (r_t w^{t-x})(k_s w^{x-1-s}) for any x. Between the halves of a block, x is their border and
both exponents are >= 0: stable for every decay, w = 0 too. The halves are halved in turn, down to blocks so
small that w to the power of half a block is harmless (``SAFE_EXPONENT``); in those, x is the middle and one
triangular product is left. Mild decays need one level, the strongest five.

Cost per token and head: 2 N^2 + 2 c N multiply-adds forward, 4 N^2 + 6 c N backward, c = ``SUB_CHUNK`` tokens.
For the backward pass one N x N state per sub-chunk is kept, and the inputs as they came. Limits: the strongest
decay is read on the host, one synchronisation per call on an accelerator; the backward pass is written by hand
and cannot be differentiated again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.wkv import naive
from rwkv_rev.wkv.compaction import Compaction, kept_with
from rwkv_rev.wkv.handover import Handover
from rwkv_rev.wkv.naive import LOWEST_LOG_DECAY, arithmetic_dtype
from rwkv_rev.wkv.sub_chunks import SUB_CHUNK as SUB_CHUNK
from rwkv_rev.wkv.sub_chunks import Level, SubChunks


class _Written(NamedTuple):
    """What a chunk writes: keys and values in sub-chunks, P of every sub-chunk start, contribution of all tokens."""

    k: Tensor  # [J, B, H, c, N]
    v: Tensor  # [J, B, H, c, N]
    starts: Tensor  # [J, B, H, N, N]
    contribution: Tensor  # [B, H, N, N]

    @classmethod
    def of(cls, plan: SubChunks, k: Tensor, v: Tensor) -> "_Written":
        ks, vs = plan.split(k), plan.split(v)
        return cls(ks, vs, *plan.prefixes(ks, vs))


def _rows(level: Level, x: Tensor) -> Tensor:
    """[J, B, H, c, N] -> the rows t of every block, [J, B, H, blocks, size, N] (a view)."""
    if level.diagonal:
        return x.unflatten(3, (-1, level.size))
    return x.unflatten(3, (-1, 2, level.size))[..., 1, :, :]


def _columns(level: Level, x: Tensor) -> Tensor:
    if level.diagonal:
        return x.unflatten(3, (-1, level.size))
    return x.unflatten(3, (-1, 2, level.size))[..., 0, :, :]


def _pairs(level: Level, square: Tensor) -> Tensor:
    """[J, B, H, c, c] -> the pairs of the level, [J, B, H, blocks, size, size] (a view)."""
    if level.diagonal:
        blocks = square.unflatten(4, (-1, level.size)).unflatten(3, (-1, level.size))
        return blocks.diagonal(dim1=3, dim2=5).movedim(-1, 3)
    blocks = square.unflatten(4, (-1, 2, level.size)).unflatten(3, (-1, 2, level.size))
    return blocks[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5).movedim(-1, 3)


def _attention(plan: SubChunks, r: Tensor, k: Tensor, bonus: Tensor) -> Tensor:
    """A with the bonus on its diagonal, [J, B, H, c, c]."""
    square = None if plan.levels[0].diagonal else r.new_zeros(*r.shape[:-1], plan.c)
    for level in plan.levels:
        rows = _rows(level, r) * level.row_powers[:, None]
        columns = _columns(level, k) * level.column_powers[:, None]
        product = torch.matmul(rows, columns.transpose(-1, -2))
        if level.diagonal:
            product.tril_(-1)
        if square is None:  # one block is all pairs
            square = product[:, :, :, 0]
        else:
            _pairs(level, square).copy_(product)
    assert square is not None
    diagonal = torch.matmul(r * k, bonus[..., None])[..., 0]
    square.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return square


def _attention_backward(
    plan: SubChunks, grad: Tensor, r: Tensor, k: Tensor, bonus: Tensor, dr: Tensor, dk: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds to dr and dk in place; returns d log_decay and d bonus, [H, N]."""
    d_log_decay = torch.zeros_like(bonus)
    for level in plan.levels:
        rows = _rows(level, r) * level.row_powers[:, None]
        columns = _columns(level, k) * level.column_powers[:, None]
        product = _pairs(level, grad)
        product = product.tril(-1) if level.diagonal else product.contiguous()
        _rows(level, dr).addcmul_(torch.matmul(product, columns), level.row_powers[:, None])
        _columns(level, dk).addcmul_(
            torch.matmul(product.transpose(-1, -2), rows), level.column_powers[:, None]
        )
        # Weighing by t-1-s before the product, not by t and s after it: nothing cancels.
        d_log_decay += torch.matmul(product.mul_(level.lag), columns).mul_(rows).sum((0, 1, 3, 4))
    diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]  # [J, B, H, c, 1]
    scaled = diagonal * bonus[:, None]
    dr.addcmul_(scaled, k)
    dk.addcmul_(scaled, r)
    return d_log_decay, (r * k).mul_(diagonal).sum((0, 1, 3))


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor,
        state: Tensor,
        counts: Tensor | None,
        plan: SubChunks | None,
        written: _Written | None,
    ) -> tuple[Tensor, Tensor]:
        kept = plan is not None  # by the caller, for other chunks
        plan = plan or SubChunks(log_decay, k.shape[1], counts)
        rs = plan.split(r)
        ks, vs, starts, contribution = written or _Written.of(plan, k, v)
        ctx.save_for_backward(r, k, v, log_decay, bonus, state, counts, starts)
        ctx.plan = plan if kept or plan.whole else None  # others hold powers for every token
        pairs = _attention(plan, rs, ks, bonus)
        decayed = rs.mul_(plan.powers[:, :-1])
        if any(ctx.needs_input_grad):
            states = torch.addcmul(starts, plan.before_powers, state)
        else:
            states = starts.addcmul_(plan.before_powers, state)  # nobody needs them afterwards
        out = torch.matmul(decayed, states)
        out.flatten(0, 2).baddbmm_(pairs.flatten(0, 2), vs.flatten(0, 2))
        return plan.join(out, plan.dtype), contribution

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_contribution: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, log_decay, bonus, state, counts, starts = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            plan = ctx.plan or SubChunks(log_decay, k.shape[1], counts)
            rs, ks, vs, go = plan.split(r), plan.split(k), plan.split(v), plan.split(grad_out)
            before = plan.before_powers

            # Outputs from the state at the sub-chunk's start.
            from_start = plan.powers[:, :-1]
            decayed = rs * from_start
            state_grads = torch.matmul(decayed.transpose(-1, -2), go)  # of S_j
            states = torch.addcmul(starts, before, state)
            dr = torch.matmul(go, states.transpose(-1, -2)).mul_(from_start)
            steps = torch.arange(plan.c, device=k.device, dtype=plan.dtype)
            d_log_decay = torch.einsum("jbhcn,jbhcn,c->hn", dr, rs, steps)

            # S_j = P_j + w^before state.
            arrived = state_grads * before
            d_state = arrived.sum(0)
            weights = plan.before.to(plan.dtype)[..., None, None]
            d_log_decay += ((arrived * state).sum(-1) * weights).sum((0, 1))

            # P_{j+1} = w^n P_j + U_j.
            prefix_grads = plan.prefix_gradients(state_grads, grad_contribution.to(plan.dtype))
            d_log_decay += plan.sum_prefix_gradient(starts, prefix_grads)

            # U_j = (k w^to_end)^T v.
            dk = torch.matmul(vs, prefix_grads.transpose(-1, -2)).mul_(plan.end_powers)
            dv = torch.matmul(ks * plan.end_powers, prefix_grads)
            d_log_decay += ((dk * ks) * plan.to_end[..., None, :, None]).sum((0, 1, 3))

            # Inside the sub-chunk.
            dv += torch.matmul(_attention(plan, rs, ks, bonus).transpose(-1, -2), go)
            pair_grads = torch.matmul(go, vs.transpose(-1, -2))
            inner, d_bonus = _attention_backward(plan, pair_grads, rs, ks, bonus, dr, dk)
            d_log_decay += inner
            return (
                plan.join(dr, r.dtype),
                plan.join(dk, k.dtype),
                plan.join(dv, v.dtype),
                d_log_decay,
                d_bonus,
                d_state,
                None,
                None,
                None,
            )


class _Wkv5Contribution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, counts: Tensor | None) -> Tensor:
        ctx.save_for_backward(k, v, log_decay, counts)
        return _Written.of(SubChunks(log_decay, k.shape[1], counts), k, v).contribution

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, counts = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            plan = SubChunks(log_decay, k.shape[1], counts)
            ks, vs = plan.split(k), plan.split(v)
            starts, _ = plan.prefixes(ks, vs)
            ends = plan.prefix_gradients(None, grad.to(plan.dtype))
            d_log_decay = plan.sum_prefix_gradient(starts, ends)
            dk = torch.matmul(vs, ends.transpose(-1, -2)).mul_(plan.end_powers)
            dv = torch.matmul(ks * plan.end_powers, ends)
            d_log_decay += ((dk * ks) * plan.to_end[..., None, :, None]).sum((0, 1, 3))
            return plan.join(dk, k.dtype), plan.join(dv, v.dtype), d_log_decay, None


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    plan: SubChunks | None = None,
    handover: Handover | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5; arguments and results as in :func:`rwkv_rev.wkv.wkv5`."""
    if k.shape[1] == 1:
        return naive.wkv5(r, k, v, log_decay, bonus, state, mask)
    dtype = arithmetic_dtype(k)
    log_decay = log_decay.to(dtype).clamp(min=LOWEST_LOG_DECAY)
    bonus, state = bonus.to(dtype), state.to(dtype)
    if mask is None:
        written = None if handover is None else handover.take()
        return _Wkv5.apply(r, k, v, log_decay, bonus, state, None, _fitting(plan, k), written)
    compaction = kept_with(mask, Compaction)
    r, k, v = (compaction.pack(x) for x in (r, k, v))
    out, contribution = _Wkv5.apply(r, k, v, log_decay, bonus, state, compaction.counts, None, None)
    return compaction.unpack(out), contribution


def wkv5_contribution(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mask: Tensor | None = None,
    plan: SubChunks | None = None,
    handover: Handover | None = None,
) -> Tensor:
    """Second result of :func:`wkv5`, to the bit; as :func:`rwkv_rev.wkv.wkv5_contribution`."""
    if k.shape[1] == 1:
        return naive.wkv5_contribution(k, v, log_decay, mask)
    if mask is None and not torch.is_grad_enabled():
        written = _Written.of(
            _fitting(plan, k) or wkv5_plan(log_decay.to(arithmetic_dtype(k)), k.shape[1]), k, v
        )
        if handover is not None:
            handover.keep(written)
        return written.contribution
    log_decay = log_decay.to(arithmetic_dtype(k)).clamp(min=LOWEST_LOG_DECAY)
    if mask is None:
        return _Wkv5Contribution.apply(k, v, log_decay, None)
    compaction = kept_with(mask, Compaction)
    return _Wkv5Contribution.apply(compaction.pack(k), compaction.pack(v), log_decay, compaction.counts)


def wkv5_plan(log_decay: Tensor, tokens: int) -> SubChunks:
    """The plan for chunks of ``tokens`` unmasked tokens; as :func:`rwkv_rev.wkv.wkv5_plan`."""
    return SubChunks(log_decay.detach().clamp(min=LOWEST_LOG_DECAY), tokens, None)


def _fitting(plan: SubChunks | None, k: Tensor) -> SubChunks | None:
    fits = plan is not None and plan.tokens == k.shape[1] and plan.dtype == arithmetic_dtype(k)
    return plan if fits else None
