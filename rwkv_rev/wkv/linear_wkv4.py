"""RWKV-4 parallel in time without running maxima, for keys whose exponentials float32 holds with room to spare.

    A_t = w A_{t-1} + exp(k_t) v_t,   B_t = w B_{t-1} + exp(k_t),   out_t = (A + exp(u + k_t) v_t) / (B + exp(u + k_t))

as it stands: one exponential per token and channel instead of six, and one operation per step of the scan instead
of three. Allowed where every key, bonus and exponent of the state is small (:func:`fits`), which those of trained
models are; other inputs take the scan with maxima (:mod:`rwkv_rev.wkv.chunked_wkv4`, which explains the pieces too).
The state goes in and out in the gauge of that scan: m is the largest exponent, decayed.

Which of the two runs is read from the data, so only where that costs no synchronisation: on the CPU. Kept for the
backward pass: the inputs as they came and the states (two numbers per token and channel). The backward pass is
written by hand and cannot be differentiated again.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order

LARGEST_EXPONENT = 30.0
"""Of u + k, either sign. exp(30) = 1e13: sums over 1e6 tokens and their inverses times gradients of 1e-18 stay
normal float32 numbers."""


@torch.no_grad()
def fits(k: Tensor, bonus: Tensor, state: Tensor) -> bool:
    """Whether keys [B, T, D], bonus [D] and the state's exponents [B, 3, D] are small enough; not for NaN.

    The state's exponent may be as low as it likes: what it scales is then zero beside any token.
    """
    if k.numel() == 0:
        return False
    exponents = _largest(k) + _largest(bonus), float(state[:, 2].amax())
    return all(x <= LARGEST_EXPONENT for x in exponents)  # not of their maximum: Python's may pass over NaN


def _largest(x: Tensor) -> float:
    """Largest magnitude, NaN if there is one; much faster than a norm."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))


class LinearWkv4(torch.autograd.Function):
    """Arguments as of :func:`rwkv_rev.wkv.wkv4`, in the arithmetic dtype but for k and v; ``c`` must divide T."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, c: int
    ) -> tuple[Tensor, Tensor]:
        ks, vs = _split(k, c, state.dtype), _split(v, c, state.dtype)
        present = ks.exp()
        scale = torch.exp(state[:, 2])
        x = present.new_empty(c + 1, 2, *present.shape[1:])  # before and after every token of a piece
        torch.mul(vs, present, out=x[1:, 0])
        x[1:, 1].copy_(present)
        first = state[:, :2].transpose(0, 1) * scale
        final = _scan(x, log_decay, first, reverse=False)
        ages = torch.arange(k.shape[1] - 1, -1, -1, device=k.device, dtype=log_decay.dtype)[:, None]
        exponent = torch.addcmul(k, ages, log_decay).amax(1)
        exponent = torch.maximum(exponent, state[:, 2] + k.shape[1] * log_decay)
        ctx.save_for_backward(k, v, log_decay, bonus, scale, exponent, x)
        out = _outputs(present, vs, bonus, x)[0]
        numerator, denominator = final * torch.exp(-exponent)
        return _join(out, state.dtype), torch.stack((numerator, denominator, exponent), 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, bonus, scale, exponent, x = ctx.saved_tensors
        c = len(x) - 1
        with torch.autocast(k.device.type, enabled=False):
            ks, vs, go = (_split(part, c, x.dtype) for part in (k, v, grad_out))
            written = ks.exp_()
            out, present, denominator = _outputs(written, vs, bonus, x)
            gx = torch.empty_like(x)  # gradients of the states before and after every token
            d_numerator = torch.div(go, denominator, out=gx[:-1, 0])
            torch.mul(d_numerator, out, out=gx[:-1, 1]).neg_()
            d_present = d_numerator * present
            last = grad_state[:, :2].transpose(0, 1).to(x.dtype) * torch.exp(-exponent)
            d_first = _scan(gx, log_decay, last, reverse=True) * scale
            d_state = torch.stack((*d_first, torch.zeros_like(scale)), 1)

            after = gx[1:]
            d_log_decay = (x[:-1] * after).sum((0, 1, 2, 3)) * torch.exp(log_decay)
            dv = torch.addcmul(d_present, written, after[:, 0])
            dk = d_present.mul_(vs - out)
            d_bonus = dk.sum((0, 1, 2))
            dk.addcmul_(written, torch.addcmul(after[:, 1], vs, after[:, 0]))
            return _join(dk, k.dtype), _join(dv, v.dtype), d_log_decay, d_bonus, d_state, None


def _split(x: Tensor, c: int, dtype: torch.dtype) -> Tensor:
    """[B, T, D] -> [c, J, B, D]: token t is number t % c of piece t // c."""
    pieces = x.unflatten(1, (-1, c)).permute(2, 1, 0, 3)
    return pieces.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _join(pieces: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`_split`."""
    return pieces.permute(2, 1, 0, 3).to(dtype).flatten(1, 2)


def _outputs(present: Tensor, v: Tensor, bonus: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From exp(k) and the states before each token: out, exp(u + k) and the denominator, [c, J, B, D] each."""
    present = present * torch.exp(bonus)
    denominator = x[:-1, 1] + present
    return torch.addcmul(x[:-1, 0], present, v).div_(denominator), present, denominator


def _scan(x: Tensor, log_decay: Tensor, first: Tensor, *, reverse: bool) -> Tensor:
    """x_i += w x_{i-1} along the tokens, in place; the scan's last value [2, B, D].

    Args:
        x: [c + 1, 2, J, B, D]: what is added at every place of a piece but the first.
        first: [2, B, D], what the first piece starts from.
        reverse: the scan runs from the last token to the first: place c is the first of a piece.
    """
    c, pieces = len(x) - 1, x.shape[2]
    places = x.unbind(0)[::-1] if reverse else x.unbind(0)
    decay = torch.exp(log_decay)
    places[0].zero_()
    if pieces == 1:
        places[0].copy_(first[:, None])
    for before, after in pairwise(places):
        after.addcmul_(before, decay)
    if pieces == 1:
        return places[-1][:, 0].clone()
    starts = x.new_empty(pieces + 1, *first.shape)  # of every piece, in the order of the scan
    starts[1:].copy_((places[-1].flip(1) if reverse else places[-1]).transpose(0, 1))
    starts[0].copy_(first)
    decay = torch.exp(c * log_decay)
    rows = starts.unbind(0)
    for before, after in pairwise(rows):
        after.addcmul_(before, decay)
    ages = torch.arange(c + 1, device=x.device, dtype=x.dtype)
    powers = torch.exp((ages.flip(0) if reverse else ages)[:, None] * log_decay)  # [c + 1, D]
    carried = starts[:-1].transpose(0, 1)
    x.addcmul_(powers[:, None, None, None], carried.flip(1) if reverse else carried)
    return rows[-1]
