"""Plain linear attention, the EBRT cell in its pure form (Katharopoulos et al. 2020, "Transformers are RNNs", without
feature map and denominator).

    S <- S + m k_t^T v_t,   y_t = q_t S        (write first, then read; m is 0 for a masked token)

per head, then GroupNorm over the H heads, which takes the place of the denominator, and Wo. The memory only adds, on
a grid (:mod:`rwkv_rev.reversal.additive`): subtraction undoes a chunk to the bit, nothing is forgotten, and nothing but
fingerprints goes on the tape. Cost of a chunk: C N (c + 2 N) products per head, in pieces of c tokens.

Limits: a sum of T tokens grows with T, by sqrt(T) to T times one token's share. A format with b bits beside the sign on
the grid 2^e holds values below 2^(b + e); one beyond ends the step with a
:class:`~rwkv_rev.reversal.stepped.GridOverflowError` that names the layer. The format is that of the two sweeps
(``reversible``, ``checkpoint``) alone: ``full``, ``truncated``, reading and generation (:meth:`LinearAttention.step`)
add plain floats, without grid or limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_rev.autograd.first_order import first_order, refuse_transforms
from rwkv_rev.cells.contract import Advanced, Replay, ReversibleCell, leaves
from rwkv_rev.cells.exact_sums import ExactSums
from rwkv_rev.cells.gates import norm_and_gate
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.reversal.additive import Additive, NoRemnant, check_exponent
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.reversal.stepped import GridOverflowError
from rwkv_rev.wkv.dispatch import choose_kernel

PIECE = 64
"""c, tokens whose products are taken at once."""


class Sums(NamedTuple):
    """Values of the state: memory [B, H, N, N], key index first, float32 or wider."""

    memory: Tensor


class Projection(NamedTuple):
    query: Tensor  # [B, C, H, N]
    key: Tensor  # [B, C, H, N]
    value: Tensor  # [B, C, H, N], 0 where masked


class LinearAttention(ReversibleCell):
    """The recurrent half of a block.

    Args:
        num_heads: H.
        head_size: N.
        format: of the memory's numbers, of :data:`~rwkv_rev.reversal.additive.FORMATS`.
        exponent: e, of the grid 2^e.
        group_norm_epsilon: eps of the GroupNorm.

    Raises:
        ConfigError: for a format that does not exist, and a grid that cannot be meant for it.
    """

    inverts_memory = True
    norms_of_tokens = ("ln_x",)

    def __init__(
        self, num_heads: int, head_size: int, *, format: str, exponent: int, group_norm_epsilon: float
    ) -> None:
        super().__init__()
        check_exponent(format, exponent)
        width = num_heads * head_size
        self.num_heads, self.head_size, self.format, self.exponent = num_heads, head_size, format, exponent
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(num_heads, width, eps=group_norm_epsilon)

    def plan(self, length: int) -> None:
        return None

    def log_decay(self) -> Tensor:
        """log w of the memory [H, N]: 0, nothing is forgotten."""
        return torch.zeros(self.num_heads, self.head_size, device=self.key.weight.device)

    def exact(self, state: Sums) -> ExactSums:
        """The exact state nearest to values.

        Raises:
            GridOverflowError: if one does not fit the format.
        """
        with self._named():
            memory = Additive.of(state.memory.detach(), format=self.format, exponent=self.exponent)
        return ExactSums((memory,))

    def values(self, state: ExactSums) -> Sums:
        return Sums(state.memories[0].value(_wide(self.key.weight)))

    def lossy(self, state: ExactSums) -> ExactSums:
        """The state itself, which needs no remnant."""
        return state

    def step(self, state: Sums, x: Tensor, mask: ChunkMask | None = None) -> tuple[Tensor, Sums]:
        projection = self._project(x, mask)
        memory = state.memory.to(projection.key.dtype)  # it may come from a model of another precision
        y, update = linear_attention(*projection, memory)
        return self._out(y, x), Sums(memory + update)

    @torch.no_grad()
    def advance(
        self,
        state: ExactSums,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: None = None,
        *,
        output: bool = True,
    ) -> Advanced:
        projection = self._project(x, mask)
        update = contribution(projection.key, projection.value)
        out = None
        if output:
            y, _ = linear_attention(*projection, self.values(state).memory)
            out = self._out(y, x)
        with self._named():
            after, remnant = state.memories[0].advance(update)
        return Advanced(ExactSums((after,)), out, remnant, checksum(update)[None])

    def replay(
        self,
        state: ExactSums,
        x: Tensor,
        mask: ChunkMask | None = None,
        plan: None = None,
        after: ExactSums | None = None,
    ) -> Replay:
        return self._finish(state, self._project(x, mask), x, after)

    def retreat(
        self,
        state: ExactSums,
        x: Tensor,
        mask: ChunkMask | None,
        remnant: NoRemnant,
        plan: None = None,
        after: ExactSums | None = None,
    ) -> Replay:
        projection = self._project(x, mask)
        with torch.no_grad():
            before = state.memories[0].retreat(contribution(projection.key, projection.value))
        return self._finish(ExactSums((before,)), projection, x, after)

    def _finish(self, state: ExactSums, projection: Projection, x: Tensor, after: ExactSums | None) -> Replay:
        start = leaves(self.values(state))
        y, update = linear_attention(*projection, start.memory)
        handed_on = None
        if after is not None:
            with self._named():
                left, _ = state.memories[0].advance(update.detach())
            handed_on = (left.fingerprint() == after.memories[0].fingerprint()).all()
        end = Sums(start.memory + update)
        return Replay(state, self._out(y, x), start, end, checksum(update)[None], handed_on)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says of an overflow inside in which layer it was."""
        try:
            yield
        except GridOverflowError as error:
            raise GridOverflowError(f"the memory of layer {self.layer}, linear attention: {error}") from None

    def _project(self, x: Tensor, mask: ChunkMask | None) -> Projection:
        heads, dtype = (*x.shape[:2], self.num_heads, self.head_size), _wide(x)
        query, key, value = (linear(x).view(heads).to(dtype) for linear in (self.query, self.key, self.value))
        if mask is not None:  # both, or what stands at a masked place would matter if it is not finite
            valid = mask.valid[:, :, None, None]
            key, value = (torch.where(valid, tensor, 0.0) for tensor in (key, value))
        return Projection(query, key, value)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.output(norm_and_gate(self.ln_x, y, None, x.dtype))
        return out


def linear_attention(query: Tensor, key: Tensor, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """What a chunk reads, and what it adds to the memory.

    Args:
        query, key, value: [B, C, H, N].
        memory: [B, H, N, N] before the chunk.

    Returns:
        [B, C, H, N], and :func:`contribution`.
    """
    if choose_kernel(None, query) == "naive":
        return naive_linear_attention(query, key, value, memory)
    refuse_transforms((query, key, value, memory))
    y, update = _Chunk.apply(query, key, value, memory)
    return y, update


def contribution(key: Tensor, value: Tensor) -> Tensor:
    """What a chunk adds to the memory, [B, H, N, N]: the same bits as from :func:`linear_attention`."""
    if choose_kernel(None, key) == "naive":
        update = key.new_zeros(key.shape[0], key.shape[2], key.shape[3], key.shape[3])
        for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
            update = update + k[..., :, None] * v[..., None, :]
        return update
    with torch.autocast(key.device.type, enabled=False):
        return (_pieces(key).mT @ _pieces(value)).sum(2)


class _Chunk(torch.autograd.Function):
    """In pieces; keeps its inputs alone. Its gradient is in their precision, whatever autocast says around it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, memory)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = map(_pieces, (query, key, value))  # [B, H, P, c, N]
            updates = k.mT @ v  # [B, H, P, N, N]
            y = (q @ k.mT).tril() @ v + q @ _before(updates, memory)
            return _whole(y, query), updates.sum(2)

    @staticmethod
    @first_order
    def backward(ctx: Any, to_y: Tensor, to_update: Tensor) -> tuple[Tensor, ...]:
        query, key, value, memory = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            q, k, v, to_y = map(_pieces, (query, key, value, to_y))
            before = _before(k.mT @ v, memory)
            to_scores, scores = (to_y @ v.mT).tril(), (q @ k.mT).tril()
            to_before = q.mT @ to_y  # [B, H, P, N, N]
            later = to_before.flip(2).cumsum(2).flip(2) - to_before  # of pieces behind
            to_updates = to_update[:, :, None] + later
            return (
                _whole(to_scores @ k + to_y @ before.mT, query),
                _whole(to_scores.mT @ q + v @ to_updates.mT, key),
                _whole(scores.mT @ to_y + k @ to_updates, value),
                to_before.sum(2),
            )


def _before(updates: Tensor, memory: Tensor) -> Tensor:
    """The memory before each piece, [B, H, P, N, N]."""
    return memory[:, :, None] + (updates.cumsum(2) - updates)


def naive_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The same token by token, as the equation says."""
    out, update = [], torch.zeros_like(memory)
    for q, k, v in zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True):
        update = update + k[..., :, None] * v[..., None, :]
        out.append((q[..., None, :] @ (memory + update)).squeeze(-2))
    return torch.stack(out, dim=1), update


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pieces(tensor: Tensor) -> Tensor:
    """[B, H, P, c, N] of [B, C, H, N], zeros behind the last token."""
    piece = min(PIECE, tensor.shape[1])
    padded = F.pad(tensor, (0, 0, 0, 0, 0, -tensor.shape[1] % piece))
    return padded.transpose(1, 2).unflatten(2, (-1, piece))


def _whole(pieces: Tensor, like: Tensor) -> Tensor:
    """[B, C, H, N] of :func:`_pieces`."""
    return pieces.flatten(2, 3)[:, :, : like.shape[1]].transpose(1, 2)
