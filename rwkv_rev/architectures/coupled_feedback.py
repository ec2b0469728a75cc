"""RWKV-4 and 5.2 with coupled feedback in the place of the token shift (:mod:`rwkv_rev.cells.coupled_feedback`).

What ``rwkv_rev.rewrite(model, token_shift="coupled")`` makes of a converted model. No other tool reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_rev.architectures import token_models
from rwkv_rev.architectures.architecture import AFTER, OUTSIDE, Architecture, Cost, Part
from rwkv_rev.architectures.coupled import GATE_SCALE, INITIALIZATION, coupled_loop
from rwkv_rev.architectures.rwkv4 import RWKV4
from rwkv_rev.architectures.rwkv5 import RWKV5_2
from rwkv_rev.architectures.scan import Scan, SubLayer, standardised
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.contract import ReversibleCell
from rwkv_rev.cells.coupled import CoupledCell, TanhGate
from rwkv_rev.cells.coupled_feedback import (
    ChannelMixWithFeedback,
    FeedbackState,
    TimeMixRwkv4WithFeedback,
    TimeMixRwkv5WithFeedback,
)
from rwkv_rev.cells.time_mix_rwkv4 import TimeMixRwkv4
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.state import ModelState

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig

_FEEDBACK_GRAPH = 14
"""Numbers that the graph keeps of a token for each of a half of the feedback, in both cells of a block."""


@dataclass(frozen=True)
class CoupledFeedbackState(ModelState):
    """State after some tokens.

    Attributes:
        time_feedback, channel_feedback: float32 or wider, [L, B, 2, M].
        wkv: float32 or wider, as of the model without feedback.
    """

    time_feedback: Tensor
    channel_feedback: Tensor
    wkv: Tensor

    cells = ((FeedbackState, ("time_feedback", "wkv")), (FeedbackState, ("channel_feedback",)))


def _feedback(config: "RwkvRevConfig") -> CoupledCell:
    width, size = config.hidden_size, config.cell_size
    first, second = (TanhGate(size, width, GATE_SCALE) for _ in range(2))
    return CoupledCell(width, size, first=first, second=second, magnitude=config.magnitude)


def _cells4(config: "RwkvRevConfig", layer: int) -> dict[str, ReversibleCell]:
    return {
        "time_mix": TimeMixRwkv4WithFeedback(_feedback(config), config.hidden_size),
        "channel_mix": _channel_mix(config),
    }


def _cells5(config: "RwkvRevConfig", layer: int) -> dict[str, ReversibleCell]:
    heads, size = config.num_attention_heads, config.head_size
    return {
        "time_mix": TimeMixRwkv5WithFeedback(
            _feedback(config),
            heads,
            size,
            (heads, size),
            gated=True,
            bonus_is_exponential=config.bonus_is_exponential,
            group_norm_epsilon=config.group_norm_epsilon,
        ),
        "channel_mix": _channel_mix(config),
    }


def _channel_mix(config: "RwkvRevConfig") -> ChannelMixWithFeedback:
    return ChannelMixWithFeedback(_feedback(config), config.hidden_size, config.intermediate_size)


# --- the same as a plain loop ---------------------------------------------------------------------------------------


def _mixed(config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """A linear map of x [T, D] mixed with the feedback, by the map's name."""
    fed = coupled_loop(config, GATE_SCALE, x, tensors, "feedback.")

    def of(name: str) -> Tensor:
        mu = tensors[f"mix_{name}"].to(x.dtype)
        return (mu * x + (1 - mu) * fed) @ tensors[f"{name}.weight"].to(x.dtype).T

    return of


def _scan_channel_mix(
    config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]
) -> Tensor:
    mixed = _mixed(config, x, tensors)
    value = torch.relu(mixed("key")).square() @ tensors["value.weight"].to(x.dtype).T
    return torch.sigmoid(mixed("receptance")) * value


def _scan_time_mix4(
    config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor], _: float, __: dict[str, Any]
) -> Tensor:
    mixed = _mixed(config, x, tensors)
    r, k, v = (mixed(name) for name in ("receptance", "key", "value"))
    decay = torch.exp(-torch.exp(tensors["time_decay"].to(x.dtype)))
    bonus = tensors["bonus"].to(x.dtype)
    a, b, m = torch.zeros_like(k[0]), torch.zeros_like(k[0]), torch.full_like(k[0], -torch.inf)
    wkv = torch.empty_like(k)
    for t in range(len(x)):  # the sums are kept divided by e^m, m their largest exponent so far
        top = torch.maximum(m, bonus + k[t])
        old, new = torch.exp(m - top), torch.exp(bonus + k[t] - top)
        wkv[t] = (old * a + new * v[t]) / (old * b + new)
        top = torch.maximum(m, k[t])
        old, new = decay * torch.exp(m - top), torch.exp(k[t] - top)
        a, b, m = old * a + new * v[t], old * b + new, top
    return (torch.sigmoid(r) * wkv) @ tensors["output.weight"].to(x.dtype).T


def _scan_time_mix5(
    config: "RwkvRevConfig", x: Tensor, tensors: Mapping[str, Tensor], epsilon: float, _: dict[str, Any]
) -> Tensor:
    heads, mixed = config.num_attention_heads, _mixed(config, x, tensors)
    r, k, v = (mixed(name).unflatten(-1, (heads, -1)) for name in ("receptance", "key", "value"))
    decay = torch.exp(-torch.exp(tensors["time_decay"].to(x.dtype))).view(heads, -1, 1)
    u = tensors["bonus"].to(x.dtype).view(heads, -1, 1)
    u = u.exp() if config.bonus_is_exponential else u
    state = k.new_zeros(heads, k.shape[-1], k.shape[-1])
    if "initial" in tensors:
        state = tensors["initial"].to(x.dtype)
    y = torch.empty_like(v)
    for t in range(len(x)):
        kv = k[t, :, :, None] * v[t, :, None, :]
        y[t] = (r[t, :, None, :] @ (state + u * kv)).squeeze(1)
        state = decay * state + kv
    y = standardised(y, epsilon).flatten(1)
    y = y * tensors["ln_x.weight"].to(x.dtype) + tensors["ln_x.bias"].to(x.dtype)
    gate = mixed("gate")
    return (y * gate * torch.sigmoid(gate)) @ tensors["output.weight"].to(x.dtype).T


def _scan(time_mix: Callable[..., Tensor], config: "RwkvRevConfig") -> Scan:
    return Scan(
        (
            SubLayer("time_mix", "ln1", "time_mix", partial(time_mix, config)),
            SubLayer("channel_mix", "ln2", "channel_mix", partial(_scan_channel_mix, config)),
        )
    )


# --- what they are --------------------------------------------------------------------------------------------------


def _cost(base: Cost) -> Cost:
    """A fingerprint more for each cell, and no token shift."""

    def states(config: "RwkvRevConfig", batch: int, length: int, fused: bool) -> int:
        return base.states(config, batch, length, fused) + _FEEDBACK_GRAPH * batch * length * config.cell_size

    def whole(config: "RwkvRevConfig", batch: int) -> list[int]:
        feedback = 8 * batch * 2 * config.cell_size
        return [*base.whole(config, batch), feedback, feedback]

    def remnant(config: "RwkvRevConfig", log_decay: Tensor | None, batch: int, length: int) -> list[int]:
        return [*base.remnant(config, log_decay, batch, length), 8, 8]

    return replace(base, shifts=0, mixes=0, states=states, whole=whole, remnant=remnant)


def _with_feedback(
    base: Architecture,
    cells: Callable[["RwkvRevConfig", int], Mapping[str, ReversibleCell]],
    initialization: Mapping[Any, Callable[[Any, "RwkvRevConfig"], None]],
    time_mix: Callable[..., Tensor],
) -> Architecture:
    return replace(
        base,
        version=f"coupled-{base.version}",
        title=f"RWKV-{base.version} with coupled feedback",
        state_kind=CoupledFeedbackState,
        state={
            "time_feedback": Part("2 M", wide=True),
            "channel_feedback": Part("2 M", wide=True),
            base.memory: base.state[base.memory],
        },
        fields=token_models.fields(magnitude=16, forgets=False),
        letters=token_models.LETTERS,
        cells=cells,
        initialization={**INITIALIZATION, **initialization},
        scan=partial(_scan, time_mix),
        rwkv_package=None,
        cost=_cost(base.cost),
        layouts=(),
        outside=OUTSIDE,
        block=(),
        after=AFTER,
        initial_state=None,
        sign="",
    )


COUPLED_4 = _with_feedback(
    RWKV4,
    _cells4,
    {
        TimeMixRwkv4WithFeedback: RWKV4.initialization[TimeMixRwkv4],
        ChannelMixWithFeedback: RWKV4.initialization[ChannelMix],
    },
    _scan_time_mix4,
)
COUPLED_5_2 = _with_feedback(
    RWKV5_2,
    _cells5,
    {
        TimeMixRwkv5WithFeedback: RWKV5_2.initialization[TimeMixRwkv5],
        ChannelMixWithFeedback: RWKV5_2.initialization[ChannelMix],
    },
    _scan_time_mix5,
)
