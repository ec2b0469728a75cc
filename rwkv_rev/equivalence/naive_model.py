r"""The whole model as one straight float64 scan over the *original* tensors: the truth of every check.

    time mix, RWKV-4   wkv_t = (a + e^{u+k} v) / (b + e^{u+k});  a <- w a + e^k v;  b <- w b + e^k
    time mix, RWKV-5   y_t = r_t (S + diag(u) k_t^T v_t);  S <- diag(w) S + k_t^T v_t;  GroupNorm over the heads
    channel mix        sigmoid(r) * Wv relu(k)^2

with w = exp(-exp(time_decay)) and every projection reading ``mu * x_t + (1 - mu) * x_{t-1}`` of the
post-LayerNorm vector (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3; Peng
et al. 2024, "Eagle and Finch", section 4.1).

Those are RWKV-4 and 5; what another architecture computes it says itself (:mod:`rwkv_rev.architectures.scan`). Without
that the generation is told by names.

It shares no code with ``modeling.py``, ``cells/`` or ``wkv/`` and reads the tensors under BlinkDL's own
names, the one exception to the rule that only ``converters/`` knows them: an oracle that went through our
renaming would not notice a mistake in it. Works layer by layer over all tokens, so that only one layer's
weights exist in float64 at a time: memory is T*D plus one layer, time is T Python steps per layer.

In float32 the same scan tells how much rounding a model makes of nothing: what one more implementation that adds in
its own order would be off by.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures import rwkv6_scan, rwkv7_scan
from rwkv_rev.architectures.scan import Scan, SubLayer

PUBLISHED_GROUP_NORM_EPSILON = 64e-5
LAYER_NORM_EPSILON = 1e-5


def residual_streams(
    tensors: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    scan: Scan | None = None,
    group_norm_epsilon: float = PUBLISHED_GROUP_NORM_EPSILON,
    layer_norm_epsilon: float = LAYER_NORM_EPSILON,
    dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[str, Tensor]]:
    """The residual stream after every sub-layer, in order.

    Args:
        tensors: BlinkDL state dict, or what ``scan`` goes through; read one layer at a time, any floating dtype.
        tokens: token ids ``[T]``.
        scan: of the architecture; None for a generation of RWKV, which the names tell.
        group_norm_epsilon: eps of the GroupNorm of RWKV-5, as if there were no division by 8 before it.
        layer_norm_epsilon: eps of every LayerNorm.
        dtype: of all arithmetic.

    Yields:
        ``(place, stream)`` with stream ``[T, D]`` in ``dtype`` and place one of ``ln0``,
        ``blocks.{i}.time_mix``, ``blocks.{i}.channel_mix``, ``ln_out``. The last one is what the head
        reads.
    """
    scan = scan_of(tensors) if scan is None else scan

    def normed(x: Tensor, name: str) -> Tensor:
        scaled = _standardised(x, layer_norm_epsilon)
        return scaled * tensors[f"{name}.weight"].to(dtype) + tensors[f"{name}.bias"].to(dtype)

    x = normed(tensors[scan.embeddings][tokens].to(dtype), scan.first_norm)  # [T, D]
    yield "ln0", x
    left: dict[str, Any] = {}
    for layer in range(scan.layers(tensors)):
        block = f"{scan.block}{layer}."
        for cell in scan.cells:
            initial = None if scan.initial is None else f"{scan.initial}{layer}"
            own = _Below(tensors, f"{block}{cell.prefix}.", initial)
            x = x + cell.compute(normed(x, block + cell.norm), own, group_norm_epsilon, left)
            yield f"blocks.{layer}.{cell.name}", x
    yield "ln_out", normed(x, scan.last_norm)


def naive_logits(
    tensors: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    scan: Scan | None = None,
    group_norm_epsilon: float = PUBLISHED_GROUP_NORM_EPSILON,
    layer_norm_epsilon: float = LAYER_NORM_EPSILON,
    dtype: torch.dtype = torch.float64,
    piece: int = 64,
) -> Iterator[Tensor]:
    """Logits ``[t, V]``, ``piece`` tokens at a time; arguments of :func:`residual_streams`."""
    hidden = tokens.new_empty(0)
    for _, stream in residual_streams(
        tensors,
        tokens,
        scan=scan,
        group_norm_epsilon=group_norm_epsilon,
        layer_norm_epsilon=layer_norm_epsilon,
        dtype=dtype,
    ):
        hidden = stream  # the last is what the head reads
    head = tensors[(scan_of(tensors) if scan is None else scan).head].to(dtype)  # [V, D]
    for rows in hidden.split(piece):
        yield rows @ head.T


def _standardised(x: Tensor, epsilon: float) -> Tensor:
    """Mean 0 and variance 1 over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()


class _Below(Mapping[str, Tensor]):
    """The tensors whose names begin with a prefix, without it; and one called ``initial``."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, initial: str | None) -> None:
        self._tensors, self._prefix, self._initial = tensors, prefix, initial

    def _stored(self, name: object) -> str:
        return self._initial if name == "initial" and self._initial is not None else f"{self._prefix}{name}"

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._stored(name)]

    def __contains__(self, name: object) -> bool:
        return self._stored(name) in self._tensors  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return (name[len(self._prefix) :] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _mixed(x: Tensor, tensors: Mapping[str, Tensor], letter: str) -> Tensor:
    """``mu * x_t + (1 - mu) * x_{t-1}``, zero before the first token."""
    mu = tensors[f"time_mix_{letter}"].to(x.dtype).flatten()
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return mu * x + (1 - mu) * before


def _linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].to(x.dtype).T


def _channel_mix(x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]) -> Tensor:
    key = _linear(_mixed(x, tensors, "k"), tensors, "key")
    receptance = _linear(_mixed(x, tensors, "r"), tensors, "receptance")
    return torch.sigmoid(receptance) * _linear(torch.relu(key).square(), tensors, "value")


def _time_mix(
    x: Tensor, tensors: Mapping[str, Tensor], group_norm_epsilon: float, _: dict[str, Any]
) -> Tensor:
    r, k, v = (
        _linear(_mixed(x, tensors, letter), tensors, name)
        for letter, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    decay = torch.exp(-torch.exp(tensors["time_decay"].to(x.dtype)))  # w
    exponential = "time_first" in tensors
    stored_bonus = tensors["time_first" if exponential else "time_faaaa"].to(x.dtype)
    if "ln_x.weight" not in tensors:
        out = torch.sigmoid(r) * _wkv4(k, v, decay.flatten(), stored_bonus.flatten())
        return _linear(out, tensors, "output")
    heads = decay.shape[0]
    u = stored_bonus.exp() if exponential else stored_bonus
    start = tensors["time_state"].to(x.dtype).mT if "time_state" in tensors else None
    y = _wkv5(r, k, v, decay.reshape(heads, -1, 1), u.reshape(heads, -1, 1), start)  # [T, H, N]
    y = _standardised(y, group_norm_epsilon).flatten(1)
    y = y * tensors["ln_x.weight"].to(x.dtype) + tensors["ln_x.bias"].to(x.dtype)
    if "gate.weight" in tensors:
        gate = _linear(_mixed(x, tensors, "g"), tensors, "gate")
        y = y * gate * torch.sigmoid(gate)
    return _linear(y, tensors, "output")


def _wkv4(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """k, v ``[T, D]``; the sums are kept divided by e^m, m their largest exponent so far."""
    a, b, m = torch.zeros_like(k[0]), torch.zeros_like(k[0]), torch.full_like(k[0], -torch.inf)
    out = torch.empty_like(k)
    for t in range(k.shape[0]):
        top = torch.maximum(m, bonus + k[t])
        old, new = torch.exp(m - top), torch.exp(bonus + k[t] - top)
        out[t] = (old * a + new * v[t]) / (old * b + new)
        top = torch.maximum(m, k[t])
        old, new = decay * torch.exp(m - top), torch.exp(k[t] - top)
        a, b, m = old * a + new * v[t], old * b + new, top
    return out


def _wkv5(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, start: Tensor | None = None) -> Tensor:
    """r, k, v ``[T, D]``; decay, u ``[H, N or 1, 1]``; start ``[H, N, N]`` or zero; returns ``[T, H, N]``."""
    heads = decay.shape[0]
    r, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in (r, k, v))
    state = k.new_zeros(heads, k.shape[-1], k.shape[-1]) if start is None else start  # key index first
    out = torch.empty_like(v)
    for t in range(k.shape[0]):
        kv = k[t, :, :, None] * v[t, :, None, :]
        out[t] = (r[t, :, None, :] @ (state + u * kv)).squeeze(1)
        state = decay * state + kv
    return out


CLASSIC = Scan(
    (SubLayer("time_mix", "ln1", "att", _time_mix), SubLayer("channel_mix", "ln2", "ffn", _channel_mix)),
    embeddings="emb.weight",
    first_norm="blocks.0.ln0",
    block="blocks.",
    last_norm="ln_out",
    initial=None,  # it is among the tensors of the time mix
)
"""RWKV-4 and 5."""


def scan_of(tensors: Mapping[str, Tensor]) -> Scan:
    """That of a generation of RWKV."""
    if rwkv7_scan.is_rwkv7(tensors):
        return rwkv7_scan.SCAN
    return rwkv6_scan.SCAN if rwkv6_scan.is_rwkv6(tensors) else CLASSIC
