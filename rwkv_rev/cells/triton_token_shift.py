"""Every mix of a token with the one before on a CUDA device: one Triton launch each way instead of some forty.

The formulas of :func:`rwkv_rev.cells.token_shift.mix`, in float32, rounded once; for chunks without a mask. Where a
document begins, ``begins`` [B, T] uint8, its ``start`` [D] is before it, which gets no gradient. The gradients of the
coefficients are summed block by block and then over the blocks, always in the same order. More than :data:`MOST_MIXES`
take several launches. The carried y (:class:`rwkv_rev.cells.token_shift.Border`) is computed in float64, one launch
each way.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order

MOST_MIXES = 4
TOKENS = 16
CHANNELS = 128
BORDER_BLOCK = 512
STEPS = 8
"""Blocks of tokens per program of the backward pass; each program leaves one partial sum."""


@triton.jit
def _mixed(x, before, mu):
    """lerp as PyTorch computes it: exact at mu = 0 and mu = 1."""
    change = x - before
    return tl.where(tl.abs(mu) < 0.5, before + mu * change, x - change * (1.0 - mu))


@triton.jit
def _before(x, shift, begins, start, token, channel, here, row, T, D, BORDERS: tl.constexpr):
    """Vectors of the tokens before ``token`` [BT], float32; that of token 0 is the row's ``shift``."""
    at = (row * T + token - 1)[:, None] * D + channel[None, :]
    earlier = tl.load(x + at, mask=here & (token > 0)[:, None], other=0.0)
    first = tl.load(shift + row * D + channel, mask=channel < D, other=0.0).to(x.dtype.element_ty)
    before = tl.where((token == 0)[:, None], first[None, :], earlier)
    if BORDERS:
        anew = tl.load(start + channel, mask=channel < D, other=0.0).to(x.dtype.element_ty)
        before = tl.where(_begins(begins, token, row, T)[:, None], anew[None, :], before)
    return before.to(tl.float32)


@triton.jit
def _begins(begins, token, row, T):
    """Whether documents begin at ``token`` [BT]; none does behind the row."""
    return tl.load(begins + row * T + token, mask=token < T, other=0) != 0


@triton.jit
def _mu(mu, x, channel, D):
    """One coefficient per channel, rounded to the dtype of ``x``."""
    return tl.load(mu + channel, mask=channel < D, other=0.0).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, shift, begins, start, mu0, mu1, mu2, mu3, out0, out1, out2, out3, T, D, tiles,
    MIXES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    here = (token < T)[:, None] & (channel < D)[None, :]
    at = (row * T + token)[:, None] * D + channel[None, :]
    now = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    before = _before(x, shift, begins, start, token, channel, here, row, T, D, BORDERS)
    tl.store(out0 + at, _mixed(now, before, _mu(mu0, x, channel, D)[None, :]), mask=here)
    if MIXES > 1:
        tl.store(out1 + at, _mixed(now, before, _mu(mu1, x, channel, D)[None, :]), mask=here)
    if MIXES > 2:
        tl.store(out2 + at, _mixed(now, before, _mu(mu2, x, channel, D)[None, :]), mask=here)
    if MIXES > 3:
        tl.store(out3 + at, _mixed(now, before, _mu(mu3, x, channel, D)[None, :]), mask=here)


@triton.jit
def _pull_back(gradient, x, mu, change, d_now, at, channel, read, here, D):
    """The gradient by x with one mix's share added, and that by mu for every token, both [BT, BD].

    ``read`` [BT]: whether the token after it reads a token.
    """
    coefficient = _mu(mu, x, channel, D)[None, :]
    now = tl.load(gradient + at, mask=here, other=0.0).to(tl.float32)
    after = tl.load(gradient + at + D, mask=here & read[:, None], other=0.0).to(tl.float32)
    return d_now + now * coefficient + after * (1.0 - coefficient), now * change


@triton.jit
def _through_first(gradient, x, mu, row, channel, T, D):
    """What one mix of the first token adds to the gradient by the vector before it, [BD]."""
    first = tl.load(gradient + row * T * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    return first * (1.0 - _mu(mu, x, channel, D))


@triton.jit
def _carry_kernel(shift, first, mu, y, size, D, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """lerp as PyTorch computes it, in float64; mu has one number per channel, or one for each of a row's."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    before = tl.load(shift + at, mask=here, other=0.0).to(tl.float64)
    now = tl.load(first + at, mask=here, other=0.0).to(tl.float64)
    factor = tl.load(mu + (at if PER_ROW else at % D), mask=here, other=0.0)
    change = now - before
    mixed = tl.where(tl.abs(factor) < 0.5, before + factor * change, now - change * (1.0 - factor))
    tl.store(y + at, mixed.to(tl.float32).to(y.dtype.element_ty), mask=here)


@triton.jit
def _uncarry_kernel(y, first, mu, shift, size, D, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    mixed = tl.load(y + at, mask=here, other=0.0).to(tl.float64)
    now = tl.load(first + at, mask=here, other=0.0).to(tl.float64)
    factor = tl.load(mu + (at if PER_ROW else at % D), mask=here, other=0.0)
    before = (mixed - factor * now) / (1.0 - factor)
    tl.store(shift + at, before.to(tl.float32).to(shift.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(
    x, shift, begins, start, mu0, mu1, mu2, mu3, g0, g1, g2, g3, g_last, d_x, d_mu, d_shift, T, D, tiles,
    MIXES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, LAST: tl.constexpr,
    BORDERS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    origin = (tl.program_id(0) % tiles) * BT * STEPS
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    total0 = tl.zeros((BT, BD), tl.float32)
    total1 = tl.zeros((BT, BD), tl.float32)
    total2 = tl.zeros((BT, BD), tl.float32)
    total3 = tl.zeros((BT, BD), tl.float32)
    for step in range(STEPS):
        token = origin + step * BT + tl.arange(0, BT)
        here = (token < T)[:, None] & (channel < D)[None, :]
        at = (row * T + token)[:, None] * D + channel[None, :]
        now = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        change = now - _before(x, shift, begins, start, token, channel, here, row, T, D, BORDERS)
        read = token + 1 < T
        if BORDERS:
            read = read & (_begins(begins, token + 1, row, T) == 0)
        d_now = tl.zeros((BT, BD), tl.float32)
        d_now, part = _pull_back(g0, x, mu0, change, d_now, at, channel, read, here, D)
        total0 += part
        if MIXES > 1:
            d_now, part = _pull_back(g1, x, mu1, change, d_now, at, channel, read, here, D)
            total1 += part
        if MIXES > 2:
            d_now, part = _pull_back(g2, x, mu2, change, d_now, at, channel, read, here, D)
            total2 += part
        if MIXES > 3:
            d_now, part = _pull_back(g3, x, mu3, change, d_now, at, channel, read, here, D)
            total3 += part
        if LAST:
            ends = here & (token == T - 1)[:, None]
            d_now += tl.load(g_last + row * D + channel[None, :] + 0 * at, mask=ends, other=0.0).to(
                tl.float32
            )
        tl.store(d_x + at, d_now, mask=here)
    if origin == 0:
        first = _through_first(g0, x, mu0, row, channel, T, D)
        if MIXES > 1:
            first += _through_first(g1, x, mu1, row, channel, T, D)
        if MIXES > 2:
            first += _through_first(g2, x, mu2, row, channel, T, D)
        if MIXES > 3:
            first += _through_first(g3, x, mu3, row, channel, T, D)
        if BORDERS:
            first = tl.where(tl.load(begins + row * T) != 0, 0.0, first)
        tl.store(d_shift + row * D + channel, first, mask=channel < D)
    partial = d_mu + tl.program_id(0).to(tl.int64) * MIXES * D + channel
    tl.store(partial, tl.sum(total0, 0), mask=channel < D)
    if MIXES > 1:
        tl.store(partial + D, tl.sum(total1, 0), mask=channel < D)
    if MIXES > 2:
        tl.store(partial + 2 * D, tl.sum(total2, 0), mask=channel < D)
    if MIXES > 3:
        tl.store(partial + 3 * D, tl.sum(total3, 0), mask=channel < D)


Begun = tuple[Tensor, Tensor]
"""Where documents begin, [B, T] uint8, and what is before their first token, [D]."""


class _Mixes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, last: bool, begun: Begun | None, x: Tensor, shift: Tensor, *mus: Tensor
    ) -> tuple[Tensor, ...]:
        batch, length, width = x.shape
        tiles = triton.cdiv(length, TOKENS)
        outs = tuple(torch.empty_like(x) for _ in mus)
        with torch.cuda.device_of(x):
            _forward_kernel[(batch * tiles, triton.cdiv(width, CHANNELS))](
                x, shift, *(begun or (x, x)), *_padded(mus), *_padded(outs), length, width, tiles,
                MIXES=len(mus), BT=TOKENS, BD=CHANNELS, BORDERS=begun is not None, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(x, shift, *mus)
        ctx.last, ctx.begun = last, begun
        return (*outs, x[:, -1].clone()) if last else outs

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, *mus = ctx.saved_tensors
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        batch, length, width = x.shape
        tiles = triton.cdiv(length, TOKENS * STEPS)
        d_x = torch.empty_like(x)
        d_shift = torch.empty_like(shift)
        d_mu = torch.empty(batch * tiles, len(mus), width, dtype=torch.float32, device=x.device)
        to_mixes = gradients[: len(mus)]
        with torch.cuda.device_of(x):
            _backward_kernel[(batch * tiles, triton.cdiv(width, CHANNELS))](
                x, shift, *(ctx.begun or (x, x)), *_padded(mus), *_padded(to_mixes), gradients[-1], d_x, d_mu, d_shift,
                length, width, tiles, MIXES=len(mus), BT=TOKENS, BD=CHANNELS, STEPS=STEPS, LAST=ctx.last,
                BORDERS=ctx.begun is not None, num_warps=4,
            )  # fmt: skip
        total = d_mu.sum(0)
        if len({mu.dtype for mu in mus}) == 1:
            total = total.to(mus[0].dtype)  # in one launch
        return (
            None,
            None,
            d_x,
            d_shift,
            *(part.to(mu.dtype) for part, mu in zip(total.unbind(0), mus, strict=True)),
        )


def _padded(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Four tensors, the last one repeated where there are fewer; the kernels do not touch the repetitions."""
    return [*tensors, *[tensors[-1]] * (MOST_MIXES - len(tensors))]


def token_mixes(
    x: Tensor, shift: Tensor, mus: list[Tensor], begun: Begun | None = None
) -> tuple[Tensor, ...]:
    """As :func:`rwkv_rev.cells.token_shift.token_mixes` without a mask.

    x [B, C, D] in bfloat16, float16 or float32 on a CUDA device.
    """
    x, shift = x.contiguous(), shift.contiguous()
    return tuple(mix for some in _launches(mus) for mix in _Mixes.apply(False, begun, x, shift, *some))


def mixes_and_last(
    x: Tensor, shift: Tensor, mus: list[Tensor], begun: Begun | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """:func:`token_mixes`, and the last token [B, D], which comes of the first launch."""
    x, shift = x.contiguous(), shift.contiguous()
    first, *others = _launches(mus)
    *mixes, last = _Mixes.apply(True, begun, x, shift, *first)
    further = [mix for some in others for mix in _Mixes.apply(False, begun, x, shift, *some)]
    return (*mixes, *further), last


def _launches(mus: list[Tensor]) -> list[list[Tensor]]:
    """The coefficients in order, in as few and as even groups of at most :data:`MOST_MIXES` as there can be."""
    size = triton.cdiv(len(mus), triton.cdiv(len(mus), MOST_MIXES))
    return [[mu.contiguous() for mu in mus[start : start + size]] for start in range(0, len(mus), size)]


def carry(shift: Tensor, first: Tensor, mu: Tensor) -> Tensor:
    """As :meth:`rwkv_rev.cells.token_shift.Border.carry`; shift and first [B, D], mu [D] or [B, D] in float64."""
    return _at_border(_carry_kernel, shift, first, mu)


def uncarry(y: Tensor, first: Tensor, mu: Tensor) -> Tensor:
    """As :meth:`rwkv_rev.cells.token_shift.Border.uncarry`; y and first [B, D], mu [D] or [B, D] in float64."""
    return _at_border(_uncarry_kernel, y, first, mu)


def _at_border(kernel: Any, given: Tensor, first: Tensor, mu: Tensor) -> Tensor:
    given, first, mu = given.contiguous(), first.contiguous(), mu.contiguous()
    found = torch.empty_like(first)
    with torch.cuda.device_of(first):
        kernel[(triton.cdiv(first.numel(), BORDER_BLOCK),)](
            given, first, mu, found, first.numel(), first.shape[1],
            PER_ROW=mu.dim() > 1, BLOCK=BORDER_BLOCK, num_warps=4,
        )  # fmt: skip
    return found
