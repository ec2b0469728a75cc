"""RWKV-7 recurrence in Triton: chunked, parallel in time, S [key, value].

    S_t = (diag(w_t) + b_t z_t^T) S_{t-1} + k_t v_t^T,      y_t = r_t S_t,      z = -kappa,  b = a kappa

(Peng et al. 2025, "RWKV-7 Goose", section 4; the WY form of :mod:`rwkv_rev.wkv.chunked_wkv7`.) With Z_t = e^{c_{t-1}}
z_t, R_t = e^{c_t} r_t, B_t = e^{-c_t} b_t, K_t = e^{-c_t} k_t, and b', k' the two decayed to the chunk's end instead,
c = the sum of log w in the chunk, everything that does not depend on the state is made for all chunks at once:

    A = (I - tril(Z B^T, -1))^{-1},      W = A Z,      X = A tril(Z K^T, -1),
    P = diag(e^{c_n}) + b'^T W,          U = (k' + X^T b')^T v,
    Q = R + tril(R B^T) W,               y_0 = (tril(R K^T) + tril(R B^T) X) v;

1. four launches make R, K; Z, B, A; W, P; U, Q and what stands before v in y_0, of every chunk;
2. a scan over chunks, S <- P S + U, keeps the state before each; values are independent of each other in it, so that
   it has B H N / 16 programs, each a chain of one small product a chunk;
3. one makes y = y_0 + Q S.

Backwards: Q^T dy, the same scan reversed with P^T, then three launches for the gradients of a chunk from the states
before and the gradients after it: with u = A (Z S + tril(Z K^T, -1) v), what is removed, and f = A^T (b' dS +
tril(R B^T)^T dy), every gradient is a product of two of r, v, u, f, dy, S, dS. They are that many because one that
holds all of it spills registers, and memory is the cheaper: a factor written and read again takes 0.1 ms of the below.

A is found by forward substitution in blocks of 16 tokens and by merging neighbours; powers of Z B^T would lose all
digits where one key comes again and again. e^{-c} stays below e^{0.607 n}, 7e16 for 64 tokens. diag(e^{c_n}) is kept
apart and multiplied in float32: masked tokens change no bit of the state, and a = 1, w = 1 is nothing special.

Estimate for an H100, bfloat16, (B, T, H, N) = (8, 4096, 32, 64), 16384 chunks of 64: 0.134 GB for each bfloat16
factor, 6.2 GB forwards and 8.3 GB backwards, 4.8 ms of memory traffic; 0.7 Tflop in products, 1 ms. A walk over chunks
of 16 with the state in registers would move half of that, but for T = 32768 it has 2048 dependent steps of five
products each in only H N / 16 = 128 programs; P makes it 512 steps of one product. Kept for the backward pass: R, Z, B,
K, P, Q, A and S, 22 bytes for each number of r.

All sums are float32. bfloat16 inputs: A, W, P and the scan in bfloat16 parts of their factors (relative error 2^-17),
all else with factors rounded to bfloat16 (errors of 3e-3, of the order of what rounding the results to that dtype
takes), but for those whose rounding was most of an error: R in Q, A everywhere and its right-hand side in u, three
triangles in d_r, d_k and d_v; float16 in such parts throughout, float32 in three parts of each factor (2^-24). No
atomic operation: results are the same to the bit. One configuration per head size, nothing is tuned at run time.
float64 is refused. Over 400 lines, because both directions share every helper and the scan.
"""

# mypy: disable-error-code="no-untyped-def"
# (the compiler, not Python, gives a kernel's arguments their types)

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rev.autograd.first_order import first_order
from rwkv_rev.errors import KernelError
from rwkv_rev.wkv.relay import Relay
from rwkv_rev.wkv.triton_blocks import load_rows, store_rows
from rwkv_rev.wkv.triton_wkv7_gradients import (
    _reader_gradient_kernel,
    _value_gradient_kernel,
    _writer_gradient_kernel,
)
from rwkv_rev.wkv.triton_wkv7_parts import (
    _decay,
    _dot,
    _factor,
    _get,
    _grown,
    _inverse,
    _lower,
    _pairs,
    _place,
    _put,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of what states pass through, and of all else, by the coarsest dtype among r, k and v, coarsest first: under autocast
# the key and the value are float32, made of bfloat16
PRECISIONS = {
    torch.bfloat16: ("bf16x3", "bf16"),
    torch.float16: ("bf16x3", "bf16x3"),
    torch.float32: ("bf16x6", "bf16x6"),
}
MERGES = 2
CHUNK = 16 << MERGES  # fewer tokens, and products are too small for the tensor cores' best instructions
# of channels, padded in smaller heads. Triton 3.6 compiles products with sides of 16 or 32 wrongly for Hopper.
TILE, WARPS = 64, 4
# of a thread at most, for factors that are rounded once: 168 let three programs share a multiprocessor, 128 four
SOLVE_REGISTERS: int | None = 168
TRANSITION_REGISTERS: int | None = 168
PREPARE_REGISTERS: int | None = 128
VALUE_REGISTERS: int | None = 168
READER_REGISTERS: int | None = 255
WRITER_REGISTERS: int | None = None
SCAN_TILE, SCAN_WARPS = 16, 2
SCAN_STAGES = {64: 5, 128: 2}
"""By padded head size: P of five chunks at 128 is more than the shared memory."""
MAX_HEAD_SIZE = 128


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _scale_kernel(
    r, k, log_decay, mask, read, readers, keys, ends, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """R (``read``, with ``readers`` what its rounding left), K (``keys``) and c_n (``ends``) of one tile of key
    channels."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    until = _decay(log_decay, token, valid, head, i, H, N, C, True)
    receptance = load_rows(r, token, valid, head, i, H, N).to(tl.float32) * tl.exp(until)
    rounded = _factor(receptance, LOW)
    _put(read, rounded, slot, t, i, C, N)
    if HIGH != LOW:
        _put(readers, receptance - rounded.to(tl.float32), slot, t, i, C, N)
    key = load_rows(k, token, valid, head, i, H, N).to(tl.float32) * _grown(until)
    _put(keys, _factor(key, LOW), slot, t, i, C, N)
    end = tl.sum(tl.where(t[:, None] == C - 1, until, 0.0), 0)
    tl.store(ends + slot * N + i, end, mask=i < N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _solve_kernel(
    log_decay, removal, rate, mask, found, given, inverses, finer, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, MERGES: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Of each chunk Z (``found``), B (``given``) and A (``inverses``, with ``finer`` what its rounding left)."""
    head, _tile, slot, token, _exists, valid = _place(mask, T, H, chunks, 1, C, MASKED)
    t = tl.arange(0, C)
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        kappa = load_rows(removal, token, valid, head, i, H, N).to(tl.float32)
        b = kappa * load_rows(rate, token, valid, head, i, H, N).to(tl.float32)
        b *= _grown(_decay(log_decay, token, valid, head, i, H, N, C, True))
        _put(given, _factor(b, LOW), slot, t, i, C, N)
        z = -kappa * tl.exp(_decay(log_decay, token, valid, head, i, H, N, C, False))
        _put(found, _factor(z, LOW), slot, t, i, C, N)
        pairs = _dot(z, tl.trans(b), pairs, HIGH)
    inverse = _inverse(tl.where(t[:, None] > t[None, :], pairs, 0.0), C, MERGES, HIGH)
    rounded = _factor(inverse, LOW)
    _put(inverses, rounded, slot, t, t, C, C)
    if HIGH != LOW:
        _put(finer, inverse - rounded.to(tl.float32), slot, t, t, C, C)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _transition_kernel(
    log_decay, removal, rate, mask, ends, inverses, finer, corrected, moves, rests, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr,
    MASKED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Of one tile of key channels W (``corrected``) and P without its diagonal (``moves``, with ``rests`` what its
    rounding left)."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    i = tile * BN + tl.arange(0, BN)
    inverse = _get(inverses, slot, t, t, C, C)
    if HIGH != LOW:
        inverse = inverse.to(tl.float32) + _get(finer, slot, t, t, C, C).to(tl.float32)
    z = -load_rows(removal, token, valid, head, i, H, N).to(tl.float32)
    z *= tl.exp(_decay(log_decay, token, valid, head, i, H, N, C, False))
    of_state = _dot(inverse, z, tl.zeros([C, BN], tl.float32), HIGH)
    _put(corrected, _factor(of_state, LOW), slot, t, i, C, N)
    for other in range(TILES):
        j = other * BN + tl.arange(0, BN)
        left = _grown(_decay(log_decay, token, valid, head, j, H, N, C, True))
        left *= tl.exp(tl.load(ends + slot * N + j, mask=j < N, other=0.0))[None, :]
        left *= load_rows(removal, token, valid, head, j, H, N).to(tl.float32)
        left *= load_rows(rate, token, valid, head, j, H, N).to(tl.float32)
        move = _dot(tl.trans(left), of_state, tl.zeros([BN, BN], tl.float32), HIGH)
        rounded = move.to(moves.dtype.element_ty)
        _put(moves, rounded, slot, j, i, N, N)
        if SPLIT:
            _put(rests, move - rounded.to(tl.float32), slot, j, i, N, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _prepare_kernel(
    v, mask, read, found, given, keys, ends, inverses, finer, corrected, readers, scores, products, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Q (``readers``, in place of what R's rounding left: rounded twice it was a third of the error of the state's
    gradient), what stands before v in y_0 (``scores``) and U^T (``products``)."""
    head, _tile, slot, token, _exists, valid = _place(mask, T, H, chunks, 1, C, MASKED)
    t = tl.arange(0, C)
    among = _lower(_pairs(found, keys, slot, C, N, BN, TILES, LOW), C, False, LOW)
    square = tl.zeros([C, C], tl.float32)
    if HIGH != LOW:
        square = _dot(_get(finer, slot, t, t, C, C), among, square, LOW)
    of_values = _factor(_dot(_get(inverses, slot, t, t, C, C), among, square, LOW), LOW)
    removed = _lower(_pairs(read, given, slot, C, N, BN, TILES, LOW), C, True, LOW)
    score = _pairs(read, keys, slot, C, N, BN, TILES, LOW)
    score = tl.where(t[:, None] >= t[None, :], score, 0.0)
    _put(scores, _factor(_dot(removed, of_values, score, LOW), LOW), slot, t, t, C, C)
    for tile in range(TILES):
        i = tile * BN + tl.arange(0, BN)
        reader = _get(read, slot, t, i, C, N).to(tl.float32)
        if HIGH != LOW:
            reader += _get(readers, slot, t, i, C, N).to(tl.float32)
        reader = _dot(removed, _get(corrected, slot, t, i, C, N), reader, LOW)
        _put(readers, _factor(reader, LOW), slot, t, i, C, N)
        writer = _get(keys, slot, t, i, C, N).to(tl.float32)
        writer = _dot(tl.trans(of_values), _get(given, slot, t, i, C, N), writer, LOW)
        end = tl.load(ends + slot * N + i, mask=i < N, other=0.0)
        writer = _factor(writer * tl.exp(end)[None, :], LOW)
        for value_tile in range(TILES):
            c = value_tile * BN + tl.arange(0, BN)
            value = load_rows(v, token, valid, head, c, H, N)
            product = _dot(tl.trans(value), writer, tl.zeros([BN, BN], tl.float32), LOW)
            _put(products, product, slot, c, i, N, N)


@triton.jit(do_not_specialize=["H", "chunks"])
def _scan_kernel(
    moves, rests, ends, products, outside, total_out, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From ``outside`` S <- P S + U over the chunks, or with P^T from the last to the first; ``products``, U^T, are
    replaced by the S^T that each chunk begins with (ends with, if reversed)."""
    program = tl.program_id(0)
    c = (program % TILES) * BV + tl.arange(0, BV)
    i = tl.arange(0, BN)
    slot = (program // TILES).to(tl.int64)
    row, head = slot // H, slot % H
    border = slot * N * N + i[None, :] * N + c[:, None]
    inside = (i[None, :] < N) & (c[:, None] < N)
    state = tl.load(outside + border, mask=inside, other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSE else step
        here = (row * chunks + chunk) * H + head
        product = _get(products, here, c, i, N, N)
        _put(products, state, here, c, i, N, N)
        end = tl.load(ends + here * N + i, mask=i < N, other=0.0)
        product += tl.exp(end)[None, :] * state
        move = _get(moves, here, i, i, N, N)
        if not REVERSE:
            move = tl.trans(move)
        if SPLIT:
            rest = _get(rests, here, i, i, N, N)
            if not REVERSE:
                rest = tl.trans(rest)
            product = tl.dot(state.to(tl.bfloat16), rest, product)
        state = _dot(state, move, product, HIGH)
    tl.store(total_out + border, state, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _read_kernel(
    v, mask, readers, scores, states, out, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """y = y_0 + Q S."""
    head, tile, slot, token, exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BN + tl.arange(0, BN)
    total = tl.zeros([C, BN], tl.float32)
    total = _dot(_get(scores, slot, t, t, C, C), load_rows(v, token, valid, head, c, H, N), total, LOW)
    for key_tile in range(TILES):
        i = key_tile * BN + tl.arange(0, BN)
        state = _get(states, slot, c, i, N, N)
        total = _dot(_get(readers, slot, t, i, C, N), tl.trans(state), total, LOW)
    store_rows(out, total, token, exists, head, c, H, N)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _pull_kernel(
    readers, d_out, mask, arrived, products, T, H, chunks,
    N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """products = d_y^T Q, and d_y as a factor."""
    head, tile, slot, token, _exists, valid = _place(mask, T, H, chunks, TILES, C, MASKED)
    t = tl.arange(0, C)
    c = tile * BN + tl.arange(0, BN)
    d_y = _factor(load_rows(d_out, token, valid, head, c, H, N), LOW)
    _put(arrived, d_y, slot, t, c, C, N)
    for key_tile in range(TILES):
        i = key_tile * BN + tl.arange(0, BN)
        reader = _get(readers, slot, t, i, C, N)
        product = _dot(tl.trans(d_y), reader, tl.zeros([BN, BN], tl.float32), LOW)
        _put(products, product, slot, c, i, N, N)


class _Factors(NamedTuple):
    """What products take of the tokens, [B, J, H, C, N]."""

    read: Tensor  # R
    found: Tensor  # Z
    given: Tensor  # B
    keys: Tensor  # K
    ends: Tensor  # [B, J, H, N], c_n
    inverses: Tensor  # [B, J, H, C, C], A
    finer: Tensor | None  # what its rounding left


class _Prepared(NamedTuple):
    """What the scans take, and the states."""

    moves: Tensor  # [B, J, H, N, N], P without its diagonal e^{c_n}
    rests: Tensor | None  # what its rounding left
    readers: Tensor  # [B, J, H, C, N], Q
    states: Tensor  # [B, J, H, N, N], S^T before each chunk


class _Launcher:
    """Shapes, block sizes and launches shared by the two directions. One configuration per head size."""

    def __init__(self, tokens: Sequence[Tensor], mask: Tensor | None) -> None:
        self.B, self.T, self.H, self.N = tokens[0].shape
        self.device = tokens[0].device
        self.mask = None if mask is None else mask.view(torch.uint8)
        dtypes = {x.dtype for x in tokens[:3]}
        self.high, self.low = next(PRECISIONS[dtype] for dtype in PRECISIONS if dtype in dtypes)
        self.chunks = triton.cdiv(self.T, CHUNK)
        self.tiles = triton.cdiv(self.N, TILE)
        self.split = self.high == "bf16x3"
        self.sizes = (self.T, self.H, self.chunks)
        self.rounded = torch.bfloat16 if self.low == "bf16" else torch.float32
        self.fixed: dict[str, Any] = {
            "N": self.N, "C": CHUNK, "BN": TILE, "TILES": self.tiles, "MASKED": mask is not None, "LOW": self.low,
            "num_warps": WARPS, "num_stages": 1,
        }  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def matrices(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(self.B, self.chunks, self.H, rows, columns, dtype=dtype)

    def factor(self) -> Tensor:
        return self.matrices(CHUNK, self.N, self.rounded)

    def options(self, registers: int | None) -> dict[str, Any]:
        """Factors in parts take all registers that there are."""
        return self.fixed | ({"maxnreg": registers} if registers and self.low == "bf16" else {})

    def grid(self, tiles: int) -> tuple[int]:
        return (self.B * self.chunks * self.H * tiles,)

    def prepare(self, r: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> tuple[_Factors, _Prepared, Tensor]:
        """``states`` are U^T yet; last what stands before v in y_0."""
        squares = [self.matrices(CHUNK, CHUNK, self.rounded) for _ in range(2)]
        ends = self.empty(self.B, self.chunks, self.H, self.N)
        read, found, given, keys = (self.factor() for _ in range(4))
        finer = torch.empty_like(squares[0]) if self.high != self.low else None
        factors = _Factors(read, found, given, keys, ends, squares[0], finer)
        moves = self.matrices(self.N, self.N, torch.bfloat16 if self.split else torch.float32)
        rests = torch.empty_like(moves) if self.split else None
        readers, corrected = self.factor(), self.factor()
        _scale_kernel[self.grid(self.tiles)](
            r, k, gates[0], self.mask, factors.read, readers, factors.keys, ends, *self.sizes, HIGH=self.high,
            **self.fixed,
        )  # fmt: skip
        _solve_kernel[self.grid(1)](
            *gates, self.mask, factors.found, factors.given, factors.inverses, finer, *self.sizes, MERGES=MERGES,
            HIGH=self.high, **self.options(SOLVE_REGISTERS),
        )  # fmt: skip
        _transition_kernel[self.grid(self.tiles)](
            *gates, self.mask, factors.ends, factors.inverses, finer, corrected, moves, rests, *self.sizes,
            SPLIT=self.split, HIGH=self.high, **self.options(TRANSITION_REGISTERS),
        )  # fmt: skip
        prepared = _Prepared(moves, rests, readers, self.matrices(self.N, self.N))
        _prepare_kernel[self.grid(1)](
            v, self.mask, *factors, corrected, prepared.readers, squares[1], prepared.states, *self.sizes,
            HIGH=self.high, **self.options(PREPARE_REGISTERS),
        )  # fmt: skip
        return factors, prepared, squares[1]

    def scan(
        self, ends: Tensor, prepared: _Prepared, products: Tensor, outside: Tensor, *, reverse: bool
    ) -> Tensor:
        """What comes out at the other end; ``products`` become the states on the way."""
        total = torch.empty_like(outside)
        tiles, padded = triton.cdiv(self.N, SCAN_TILE), TILE * triton.next_power_of_2(self.tiles)
        _scan_kernel[(self.B * self.H * tiles,)](
            prepared.moves, prepared.rests, ends, products, outside, total, self.H, self.chunks,
            N=self.N, BN=padded, BV=SCAN_TILE, TILES=tiles, REVERSE=reverse,
            SPLIT=self.split, HIGH=self.high, STAGES=SCAN_STAGES[padded],
            num_warps=SCAN_WARPS if self.split and self.tiles == 1 else 4,
        )  # fmt: skip
        return total

    def relay(
        self,
        ends: Tensor,
        prepared: _Prepared,
        products: Tensor,
        outside: Tensor,
        group: Relay | None,
        *,
        reverse: bool,
    ) -> Tensor:
        """:meth:`scan` of the tokens of all ranks, one rank after another."""
        if group is None:
            return self.scan(ends, prepared, products, outside, reverse=reverse)
        for rank in range(group.size)[:: -1 if reverse else 1]:
            total = outside
            if rank == group.rank:
                total = self.scan(ends, prepared, products, outside, reverse=reverse)
            outside = group.gather(total)[rank]
        return outside

    def read(self, v: Tensor, prepared: _Prepared, scores: Tensor) -> Tensor:
        out = self.empty(*v.shape)
        _read_kernel[self.grid(self.tiles)](
            v, self.mask, prepared.readers, scores, prepared.states, out, *self.sizes, **self.fixed
        )
        return out

    def pull(self, prepared: _Prepared, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """d_y as a factor, and d_y^T Q."""
        arrived, products = self.factor(), self.matrices(self.N, self.N)
        _pull_kernel[self.grid(self.tiles)](
            prepared.readers, d_out, self.mask, arrived, products, *self.sizes, **self.fixed
        )
        return arrived, products

    def gradients(
        self, tokens: list[Tensor], factors: _Factors, states: Tensor, d_states: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        """Of r, k, v, log_decay, removal and rate, in their dtypes."""
        d_r, d_k, d_v, *d_gates = (torch.empty_like(x) for x in tokens)
        removed, fed = self.factor(), self.factor()
        parts = self.empty(self.B, self.chunks, self.H, self.tiles, self.N)
        v, log_decay = tokens[2:4]
        _value_gradient_kernel[self.grid(self.tiles)](
            v, self.mask, *factors, states, d_states, arrived, removed, fed, parts, d_v, *self.sizes,
            HIGH=self.high, **self.options(VALUE_REGISTERS),
        )  # fmt: skip
        d_found, steps = self.factor(), self.matrices(CHUNK, self.N)
        _reader_gradient_kernel[self.grid(self.tiles)](
            v, log_decay, self.mask, *factors[:4], states, arrived, removed, fed, d_r, d_found, steps,
            *self.sizes, HIGH=self.high, **self.options(READER_REGISTERS),
        )  # fmt: skip
        _writer_gradient_kernel[self.grid(self.tiles)](
            *tokens[2:], self.mask, *factors[:5], d_states, arrived, removed, fed, parts, d_found,
            steps, d_k, *d_gates, *self.sizes, HIGH=self.high, **self.options(WRITER_REGISTERS),
        )  # fmt: skip
        return [d_r, d_k, d_v, *d_gates]


class _WKV7(torch.autograd.Function):
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
        mask: Tensor | None,
        group: Relay | None = None,
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(k):
            launch = _Launcher((r, k, v), mask)
            factors, prepared, scores = launch.prepare(r, k, v, log_decay, removal, rate)
            after = launch.relay(factors.ends, prepared, prepared.states, state, group, reverse=False)
            out = launch.read(v, prepared, scores)
        ctx.group = group
        ctx.save_for_backward(r, k, v, log_decay, removal, rate, mask, *factors, *prepared)
        return out, after

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # one look: activation checkpointing gives them once
        *tokens, mask = saved[:7]
        factors, prepared = _Factors(*saved[7:14]), _Prepared(*saved[14:])
        d_out, d_after = d_out.contiguous(), d_after.contiguous()
        with torch.cuda.device_of(d_out):
            launch = _Launcher(tokens, mask)
            arrived, d_states = launch.pull(prepared, d_out)
            if ctx.group is not None:
                d_after = ctx.group.add(d_after.clone())  # of what each rank wants of it
            d_state = launch.relay(factors.ends, prepared, d_states, d_after, ctx.group, reverse=True)
            if ctx.group is not None and ctx.group.rank != 0:
                d_state = torch.zeros_like(d_state)  # the first rank has it
            found = launch.gradients(tokens, factors, prepared.states, d_states, arrived)
        return *found, d_state, None, None


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
    """Outputs [B, T, H, N] and the state after the chunk [B, H, N, N] (key index first), both float32.

    Arguments as in :func:`rwkv_rev.wkv.wkv7`; those of tokens in bfloat16, float16 or float32, N at most 128.

    Raises:
        KernelError: another dtype or a larger head.
    """
    tokens, valid = _accepted((r, k, v, log_decay, removal, rate), mask)
    return _WKV7.apply(*tokens, state.float().contiguous(), valid)


def wkv7_relayed(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    state: Tensor,
    group: Relay,
) -> tuple[Tensor, Tensor]:
    """As in :func:`rwkv_rev.cells.recurrence_between_ranks.wkv7_relayed`; raises as :func:`wkv7` does."""
    tokens, _ = _accepted((r, k, v, log_decay, removal, rate), None)
    return _WKV7.apply(*tokens, state.float().contiguous(), None, group)


def wkv7_transition(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    removal: Tensor,
    rate: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """P and U [B, H, N, N] as in :func:`rwkv_rev.wkv.wkv7_transition`, float32; raises as :func:`wkv7` does."""
    tokens, valid = _accepted((r, k, v, log_decay, removal, rate), mask)
    batch, _, heads, size = k.shape
    with torch.cuda.device_of(k):
        launch = _Launcher(tokens, valid)
        factors, prepared, _ = launch.prepare(*tokens)
        nothing = launch.empty(batch, heads, size, size).zero_()
        one = torch.eye(size, device=k.device).expand_as(nothing).contiguous()
        without = torch.zeros_like(prepared.states)
        transition = launch.scan(factors.ends, prepared, without, one, reverse=False)
        update = launch.scan(factors.ends, prepared, prepared.states, nothing, reverse=False)
    return transition, update


def _accepted(given: Sequence[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The tokens and the mask as kernels take them."""
    size = given[1].shape[-1]
    if size > MAX_HEAD_SIZE:
        raise KernelError(
            f'the triton kernel takes head sizes up to {MAX_HEAD_SIZE}, not {size}; use kernel="chunked"'
        )
    tokens = [x.contiguous() for x in given]
    for x in tokens:
        if x.dtype not in DTYPES:
            raise KernelError(
                f'the triton kernel takes bfloat16, float16 and float32, not {x.dtype}; use kernel="chunked"'
            )
    return tokens, None if mask is None else mask.contiguous()
