"""RWKV-4 parallel in time: two short scans over square-root-length pieces instead of one long one.

Everything is one kind of scan, of elements y_i with exponents e_i:

    X_i = exp(log_decay) X_{i-1} + exp(e_i) y_i,   held as x_i exp(m_i),   m_i = max(m_{i-1} + log_decay, e_i)

Forward, the elements are (v_t, 1) with exponent k_t, and the state (numerator, denominator) before token t is
X_{t-1}. Backward, from the last token to the first, they are the gradients of numerator and denominator,
(g, -g out) / d with exponent -q where den = d exp(q), and the gradient of the state after token t is X_{t+1}.
The product of a state and its gradient then never has a positive exponent. m and q are gauges: any values
give the same result, so they get no gradient.

A scan over T elements is cut into J pieces of c, both about sqrt(T): c small steps run all pieces at once
from nothing, J small steps join the pieces' last values, and one elementwise operation adds to each piece
what came before it. A step is three elementwise operations; exponentials are taken of whole tensors, and only
of differences to a maximum, so that it is stable for all keys and decays.

Keys of trained models are small enough to do without maxima: on a CPU, :mod:`rwkv_rev.wkv.linear_wkv4` takes those.

Cost: some 25 elementwise passes over [T, D] forward, twice that backward, and 2 sqrt(T) steps each. Kept for
the backward pass: the inputs as they came and the states (three numbers per token and channel). The backward
pass is written by hand and cannot be differentiated again.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.exporting import exporting
from rwkv_rev.wkv import linear_wkv4, naive
from rwkv_rev.wkv.compaction import Compaction, kept_with
from rwkv_rev.wkv.naive import EMPTY_EXPONENT, LOWEST_LOG_DECAY, arithmetic_dtype


class _Layout:
    """T tokens as J pieces of c, [c, J, B, D]; token t is number t % c of piece t // c.

    Unless all rows end where the pieces end, there is room for at least one token more: "before token n" then
    has a place for every count n of valid tokens.
    """

    def __init__(self, tokens: int, counts: Tensor | None) -> None:
        self.tokens = tokens
        self.c = 1 << ((tokens - 1).bit_length() // 2)
        self.whole = counts is None and tokens % self.c == 0
        self.J = tokens // self.c if self.whole else tokens // self.c + 1
        self.same = counts is None  # all rows end at the same place
        self._counts = counts

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, D] -> [c, J, B, D], zeros after the last token."""
        batch, _, width = x.shape
        pieces = x.new_empty(self.c, self.J, batch, width, dtype=dtype)
        full = self.tokens // self.c
        pieces[:, :full].copy_(x[:, : full * self.c].unflatten(1, (full, self.c)).permute(2, 1, 0, 3))
        if full < self.J:
            rest = self.tokens - full * self.c
            pieces[:rest, full].copy_(x[:, full * self.c :].transpose(0, 1))
            pieces[rest:, full].zero_()
        return pieces

    def join(self, pieces: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`split`."""
        joined = pieces.permute(2, 1, 0, 3).to(dtype).flatten(1, 2)
        return joined[:, : self.tokens].contiguous()

    def counts(self, like: Tensor) -> Tensor:
        """[B] valid tokens of the rows of ``like`` [..., B, D]."""
        if self._counts is not None:
            return self._counts
        return torch.full(like.shape[-2:-1], self.tokens, device=like.device)

    def numbers(self, device: torch.device) -> Tensor:
        """Token number of every place, [c, J, 1]."""
        inside, piece = torch.arange(self.c, device=device), torch.arange(self.J, device=device)
        return (inside[:, None] + piece * self.c)[..., None]


def _steps(
    elements: tuple[Tensor, Tensor],
    exponents: Tensor,
    log_decay: Tensor,
    first: tuple[Tensor, Tensor] | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The scan along the first axis, one step per element.

    Args:
        elements: two tensors [L, ..., D]. exponents: [L, ..., D]. log_decay: [D].
        first: what the scan starts from, ([2, ..., D], exponents [..., D]); None: nothing.
        reverse: whether the last element is the first to be scanned.

    Returns:
        x [L + 1, 2, ..., D], m [L + 1, ..., D]. Element i lies between places i and i + 1.
    """
    length = len(exponents)
    before, after = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))
    start = length if reverse else 0
    x = exponents.new_empty(length + 1, 2, *exponents.shape[1:])
    m = exponents.new_empty(length + 1, *exponents.shape[1:])
    if first is None:
        x[start].zero_()
        m[start].fill_(EMPTY_EXPONENT)
    else:
        x[start].copy_(first[0])
        m[start].copy_(first[1])
    for source, target, exponent in _order(reverse, m, exponents):
        torch.maximum(torch.add(source, log_decay, out=target), exponent, out=target)
    # Not (m + log_decay) - m': this way the rounding of m' is made up for.
    past = (m[before] - m[after]).add_(log_decay).exp_()
    present = (exponents - m[after]).exp_()
    torch.mul(elements[0], present, out=x[after, 0])
    torch.mul(elements[1], present, out=x[after, 1])
    for source, target, factor in _order(reverse, x, past):
        target.addcmul_(factor, source)
    return x, m


def _order(reverse: bool, places: Tensor, elements: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Place before, place after and element, in the order of the scan."""
    views = places.unbind(0)
    steps = zip(views[:-1], views[1:], elements.unbind(0), strict=True)
    return [(after, before, x) for before, after, x in steps][::-1] if reverse else list(steps)


def _scan(
    elements: tuple[Tensor, Tensor],
    exponents: Tensor,
    log_decay: Tensor,
    first: tuple[Tensor, Tensor],
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan in pieces: elements [c, J, B, D] each, first [2, B, D] and [B, D].

    Returns x [c + 1, 2, J, B, D] and m [c + 1, J, B, D]. A piece starts at place 0 (c if reverse)
    with what the piece before it ended with.
    """
    c, pieces = exponents.shape[:2]
    if pieces == 1:
        return _steps(elements, exponents, log_decay, (first[0][:, None], first[1][None]), reverse)
    x, m = _steps(elements, exponents, log_decay, None, reverse)
    end = 0 if reverse else c
    starts, start_m = _steps((x[end, 0], x[end, 1]), m[end], c * log_decay, first, reverse)
    starts, start_m = (starts[1:], start_m[1:]) if reverse else (starts[:-1], start_m[:-1])
    ages = torch.arange(c + 1, device=m.device, dtype=m.dtype)
    ages = (ages.flip(0) if reverse else ages)[:, None] * log_decay  # [c + 1, D]
    ages = ages[:, None, None]
    joined = torch.maximum(m, start_m + ages)
    x *= m.sub_(joined).exp_()[:, None]
    x.addcmul_((start_m - joined).add_(ages).exp_()[:, None], starts.transpose(0, 1))
    return x, joined


class _Wkv4(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        layout = _Layout(k.shape[1], counts)
        ks, vs = layout.split(k, state.dtype), layout.split(v, state.dtype)
        first = (state[:, :2].transpose(0, 1), state[:, 2])
        x, m = _scan((vs, vs.new_ones(())), ks, log_decay, first)
        ctx.save_for_backward(k, v, log_decay, bonus, counts, x, m)
        out = _outputs(ks, vs, bonus, x, m)[0]
        return layout.join(out, state.dtype), torch.stack(
            (*_final(layout, x).unbind(0), _final(layout, m)), 1
        )

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, bonus, counts, x, m = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            layout = _Layout(k.shape[1], counts)
            ks, vs, go = (layout.split(part, m.dtype) for part in (k, v, grad_out))
            out, q, present, denominator = _outputs(ks, vs, bonus, x, m)
            d_numerator = go.div_(denominator)
            d_denominator = (d_numerator * out).neg_()
            elements, exponents = (d_numerator, d_denominator), q.neg_()
            first = (grad_state[:, :2].transpose(0, 1).to(m.dtype), -_final(layout, m))
            if (
                not layout.whole
            ):  # the final state's gradient arrives at a token number of its own in every row
                numbers, ends = layout.numbers(k.device), layout.counts(m)
                exponents = torch.where((numbers < ends)[..., None], exponents, EMPTY_EXPONENT)
                here = (numbers == ends)[..., None]
                exponents = torch.where(here, first[1], exponents)
                elements = (
                    torch.where(here, first[0][0], d_numerator),
                    torch.where(here, first[0][1], d_denominator),
                )
                first = (torch.zeros_like(first[0]), torch.full_like(first[1], EMPTY_EXPONENT))
            gx, gm = _scan(elements, exponents, log_decay, first, reverse=True)

            at_start = torch.exp(m[0, 0] + gm[0, 0])
            d_state = torch.stack(
                (gx[0, 0, 0] * at_start, gx[0, 1, 0] * at_start, torch.zeros_like(at_start)), 1
            )

            ga, gb, after = gx[1:, 0], gx[1:, 1], gm[1:]  # of the state after each token
            through = (m[:-1] + after).add_(log_decay).exp_()
            inner = (x[:-1, 0] * ga).addcmul_(x[:-1, 1], gb)
            d_log_decay = inner.mul_(through).sum((0, 1, 2))

            written = torch.exp(ks + after)
            d_present = present.mul_(d_numerator)
            dv = (written * ga).add_(d_present)
            dk = d_present.mul_(vs - out)
            d_bonus = dk.sum((0, 1, 2))
            dk.addcmul_(written, (vs * ga).add_(gb))
            return layout.join(dk, k.dtype), layout.join(dv, v.dtype), d_log_decay, d_bonus, d_state, None


def _outputs(
    k: Tensor, v: Tensor, bonus: Tensor, x: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the states before each token: out, q, exp(u + k - q) and den exp(-q), [c, J, B, D] each."""
    present = k + bonus
    q = torch.maximum(m[:-1], present)
    present.sub_(q).exp_()
    past = (m[:-1] - q).exp_()
    denominator = torch.addcmul(present, past, x[:-1, 1])
    out = past.mul_(x[:-1, 0]).addcmul_(present, v).div_(denominator)
    return out, q, present, denominator


def _final(layout: _Layout, x: Tensor) -> Tensor:
    """What x [c + 1, ..., J, B, D] holds after every row's last valid token, [..., B, D]."""
    if layout.whole:
        return x[-1].select(-3, -1)
    if layout.same:
        return x[layout.tokens % layout.c].select(-3, layout.tokens // layout.c)
    ends = layout.counts(x)
    rows = torch.arange(x.shape[-2], device=x.device)
    return x.movedim((0, -3, -2), (0, 1, 2))[ends % layout.c, ends // layout.c, rows].movedim(0, -2)


def wkv4(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-4; arguments and results as in :func:`rwkv_rev.wkv.wkv4`."""
    if k.shape[1] == 1:
        return naive.wkv4(k, v, log_decay, bonus, state, mask)
    dtype = arithmetic_dtype(k)
    log_decay = log_decay.to(dtype).clamp(min=LOWEST_LOG_DECAY)
    bonus, state = bonus.to(dtype), state.to(dtype)
    if mask is None:
        c = _Layout(k.shape[1], None).c
        fits = k.device.type == "cpu" and k.shape[1] % c == 0 and not exporting()
        if fits and linear_wkv4.fits(k, bonus, state):
            return linear_wkv4.LinearWkv4.apply(k, v, log_decay, bonus, state, c)
        return _Wkv4.apply(k, v, log_decay, bonus, state, None)
    compaction = kept_with(mask, Compaction)
    out, state = _Wkv4.apply(
        compaction.pack(k), compaction.pack(v), log_decay, bonus, state, compaction.counts
    )
    return compaction.unpack(out), state
