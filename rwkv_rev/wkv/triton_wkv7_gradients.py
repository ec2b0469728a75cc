"""The RWKV-7 kernels of the backward pass: gradients of a chunk's tokens.

The formulas and the launches are in :mod:`rwkv_rev.wkv.triton_wkv7`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

import triton
import triton.language as tl

from rwkv_rev.wkv.triton_blocks import load_rows, store_rows
from rwkv_rev.wkv.triton_wkv7_parts import (
    _decay,
    _dot,
    _factor,
    _get,
    _grown,
    _lower,
    _pairs,
    _place,
    _put,
    _rest,
    _sums,
    _upper,
)


@triton.jit
def _through(
    x, states, total, slot, c, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """total + X S of a factor, for the value channels c."""
    t = tl.arange(0, C)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        state = _factor(_get(states, slot, c, i, N, N), LOW)
        total = _dot(_get(x, slot, t, i, C, N), tl.trans(state), total, LOW)
    return total


@triton.jit
def _through_end(
    x, d_states, ends, total, slot, c, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """total + X diag(e^{c_n}) dS."""
    t = tl.arange(0, C)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        end = tl.exp(tl.load(ends + slot * N + i, mask=i < N, other=0.0))
        state = _factor(_get(d_states, slot, c, i, N, N) * end[None, :], LOW)
        total = _dot(_get(x, slot, t, i, C, N), tl.trans(state), total, LOW)
    return total


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _value_gradient_kernel(
    v, mask, read, found, given, keys, ends, inverses, finer, states, d_states, arrived, removed, fed, parts, d_v,
    T, H, chunks, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """u (``removed``), f (``fed``), d_v and the sum of S dS (``parts``; with e^{c_n}, what c_n receives through the
    diagonal of P) of one tile of value channels. Everything is read again where it is needed: what is held in
    registers meanwhile costs more. Before A, which lets most of it cancel, u is in parts, and so is A: their
    rounding was over half the error of the gradient of the rate. So is triu(K R^T), the largest part of d_v's."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BN + tl.arange(0, BN)
    nothing = tl.zeros([C, BN], tl.float32)
    pairs = _upper(_pairs(given, read, slot, C, N, BN, TILES, LOW), C, True, LOW)
    f = _dot(pairs, _get(arrived, slot, t, c, C, N), nothing, LOW)
    f = _factor(_through_end(given, d_states, ends, f, slot, c, C, N, BN, TILES, LOW), LOW)
    small = nothing
    if HIGH != LOW:
        small = _dot(tl.trans(_get(finer, slot, t, t, C, C)), f, nothing, LOW)
    f = _factor(_dot(tl.trans(_get(inverses, slot, t, t, C, C)), f, small, LOW), LOW)
    _put(fed, f, slot, t, c, C, N)
    pairs = _upper(_pairs(keys, found, slot, C, N, BN, TILES, LOW), C, False, LOW)
    d_value = _dot(pairs, f, nothing, LOW)
    pairs = _upper(_pairs(keys, read, slot, C, N, BN, TILES, LOW), C, True, HIGH)
    d_value = _dot(pairs, _get(arrived, slot, t, c, C, N), d_value, HIGH)
    d_value = _through_end(keys, d_states, ends, d_value, slot, c, C, N, BN, TILES, LOW)
    store_rows(d_v, d_value, token, exists, head, c, H, N)
    pairs = _lower(_pairs(found, keys, slot, C, N, BN, TILES, LOW), C, False, HIGH)
    u = _dot(pairs, load_rows(v, token, valid, head, c, H, N), nothing, HIGH)
    u = _through(found, states, u, slot, c, C, N, BN, TILES, LOW)
    small = nothing
    if HIGH != LOW:
        small = _dot(_get(finer, slot, t, t, C, C), u, nothing, LOW)
    u = _dot(_get(inverses, slot, t, t, C, C), u, small, HIGH)
    _put(removed, _factor(u, LOW), slot, t, c, C, N)
    for key_tile in range(TILES):
        i = key_tile * BN + tl.arange(0, BN)
        part = tl.zeros([BN], tl.float32)
        for quarter in range(4):
            few = tile * BN + quarter * (BN // 4) + tl.arange(0, BN // 4)
            part += tl.sum(_get(states, slot, few, i, N, N) * _get(d_states, slot, few, i, N, N), 0)
        tl.store(parts + (slot * TILES + tile) * N + i, part, mask=i < N)


@triton.jit
def _of_readers(
    x, v, removed, states, given, keys, slot, token, valid, head, i, H, ITSELF: tl.constexpr, C: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """x S^T + tril(x u^T) B + tril(x v^T) K: the gradient of R from x = d_y, of Z from x = f (without diagonals); and
    what the rounding of the last triangle left."""
    t = tl.arange(0, C)
    total = tl.zeros([C, BN], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        total = _dot(_get(x, slot, t, c, C, N), _factor(_get(states, slot, c, i, N, N), LOW), total, LOW)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        pairs = _dot(_get(x, slot, t, c, C, N), tl.trans(_get(removed, slot, t, c, C, N)), pairs, LOW)
    total = _dot(_lower(pairs, C, ITSELF, LOW), _get(given, slot, t, i, C, N), total, LOW)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        value = load_rows(v, token, valid, head, c, H, N)
        pairs = _dot(_get(x, slot, t, c, C, N), tl.trans(value), pairs, LOW)
    total = _dot(_lower(pairs, C, ITSELF, LOW), _get(keys, slot, t, i, C, N), total, LOW)
    return total, _lower(_rest(pairs, LOW), C, ITSELF, LOW)


@triton.jit
def _leaving(x, slot, token, valid, head, t, c, H, MATRIX: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """v from among the tokens, or u, a matrix."""
    return _get(x, slot, t, c, C, N) if MATRIX else load_rows(x, token, valid, head, c, H, N)


@triton.jit
def _after(
    x, d_states, slot, token, valid, head, i, H, MATRIX: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """x dS^T: with diag(e^{c_n}), what K (x = v) or B (x = u) receives from after the chunk; and, in PARTS, what that
    lost where dS was rounded."""
    t = tl.arange(0, C)
    total = tl.zeros([C, BN], tl.float32)
    lost = tl.zeros([C, BN], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        leaving = _leaving(x, slot, token, valid, head, t, c, H, MATRIX, C, N)
        d_state = _get(d_states, slot, c, i, N, N)
        total = _dot(leaving, _factor(d_state, LOW), total, LOW)
        if PARTS:
            lost = _dot(leaving, _rest(d_state, LOW), lost, LOW)
    return total, lost


@triton.jit
def _of_writers(
    x, arrived, fed, read, found, total, lost, slot, token, valid, head, i, H, MATRIX: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """total + triu(x d_y^T) R + triu(x f^T, 1) Z: what K or B receives within the chunk; and, in PARTS, ``lost`` with
    what that lost where triu(x d_y^T) was rounded."""
    t = tl.arange(0, C)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        leaving = _leaving(x, slot, token, valid, head, t, c, H, MATRIX, C, N)
        pairs = _dot(leaving, tl.trans(_get(arrived, slot, t, c, C, N)), pairs, LOW)
    reader = _get(read, slot, t, i, C, N)
    pairs = tl.where(t[:, None] <= t[None, :], pairs, 0.0)
    total = _dot(_factor(pairs, LOW), reader, total, LOW)
    if PARTS:
        lost = _dot(_rest(pairs, LOW), reader, lost, LOW)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        c = tile * BN + tl.arange(0, BN)
        leaving = _leaving(x, slot, token, valid, head, t, c, H, MATRIX, C, N)
        pairs = _dot(leaving, tl.trans(_get(fed, slot, t, c, C, N)), pairs, LOW)
    return _dot(_upper(pairs, C, False, LOW), _get(found, slot, t, i, C, N), total, LOW), lost


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _reader_gradient_kernel(
    v, log_decay, mask, read, found, given, keys, states, arrived, removed, fed, d_r, d_found, steps, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """d_r, the part of the removal's gradient that passes through Z (``d_found``) and that of log_decay's that passes
    through R and Z (``steps``), of one tile of key channels. d_r gets back what rounding tril(d_y v^T) took, after
    ``steps`` has used the rounded form, in which pairs cancel."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    gradient, rest = _of_readers(
        arrived, v, removed, states, given, keys, slot, token, valid, head, i, H, True, C, N, BN, TILES, LOW
    )
    step = _get(read, slot, t, i, C, N).to(tl.float32) * gradient
    if HIGH != LOW:
        gradient = _dot(rest, _get(keys, slot, t, i, C, N), gradient, LOW)
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    store_rows(d_r, gradient * tl.exp(until), token, exists, head, i, H, N)
    gradient, _unused = _of_readers(
        fed, v, removed, states, given, keys, slot, token, valid, head, i, H, False, C, N, BN, TILES, LOW
    )
    before = _decay(log_decay, token, valid, head, i, H, N, C, False)
    _put(d_found, _factor(gradient * tl.exp(before), LOW), slot, t, i, C, N)
    own = _get(found, slot, t, i, C, N).to(tl.float32) * gradient
    step = _sums(t[:, None] <= t[None, :], step + own) - own
    _put(steps, step, slot, t, i, C, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _writer_gradient_kernel(
    v, log_decay, removal, rate, mask, read, found, given, keys, ends, d_states, arrived, removed, fed, parts,
    d_found, steps, d_k, d_log_decay, d_removal, d_rate, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The other gradients.

    log w_t stands in c_s of s >= t (factors of R, -K, -B), in c_{s-1} of s > t (of Z) and in c_n - c_s of s < t (of
    what K and B leave after the chunk). The last two are the first's sum less what is not in theirs. All take factors
    as products do, so that what pairs of tokens give cancels but for float32's rounding."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    end = tl.exp(tl.load(ends + slot * N + i, mask=i < N, other=0.0))
    carried = tl.zeros([BN], tl.float32)
    for value_tile in range(TILES):
        carried += tl.load(parts + (slot * TILES + value_tile) * N + i, mask=i < N, other=0.0)
    carried *= end
    gradient, lost = _after(
        v, d_states, slot, token, valid, head, i, H, False, C, N, BN, TILES, HIGH != LOW, LOW
    )  # fmt: skip
    gradient *= end[None, :]
    carried += tl.sum(_get(keys, slot, t, i, C, N).to(tl.float32) * gradient, 0)
    gradient, lost = _of_writers(
        v, arrived, fed, read, found, gradient, lost * end[None, :], slot, token, valid, head, i, H, False,
        C, N, BN, TILES, HIGH != LOW, LOW,
    )  # fmt: skip
    step = _get(keys, slot, t, i, C, N).to(tl.float32) * gradient
    if HIGH != LOW:
        gradient += lost
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    store_rows(d_k, gradient * _grown(until), token, exists, head, i, H, N)

    gradient, lost = _after(
        removed, d_states, slot, token, valid, head, i, H, True, C, N, BN, TILES, False, LOW
    )
    gradient *= end[None, :]
    carried += tl.sum(_get(given, slot, t, i, C, N).to(tl.float32) * gradient, 0)
    gradient, lost = _of_writers(
        removed, arrived, fed, read, found, gradient, lost, slot, token, valid, head, i, H, True,
        C, N, BN, TILES, False, LOW,
    )  # fmt: skip
    step += _get(given, slot, t, i, C, N).to(tl.float32) * gradient
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    gradient *= _grown(until)
    kappa = load_rows(removal, token, valid, head, i, H, N).to(tl.float32)
    store_rows(d_rate, gradient * kappa, token, exists, head, i, H, N)
    gradient *= load_rows(rate, token, valid, head, i, H, N).to(tl.float32)
    gradient -= _get(d_found, slot, t, i, C, N).to(tl.float32)
    store_rows(d_removal, gradient, token, exists, head, i, H, N)

    step = _get(steps, slot, t, i, C, N) - _sums(t[:, None] <= t[None, :], step)
    step = tl.where(valid[:, None], step + carried[None, :], 0.0)
    store_rows(d_log_decay, step, token, exists, head, i, H, N)
