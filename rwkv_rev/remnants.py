"""Which remnants ``auto`` is: whole states, or lifted ones (:mod:`rwkv_rev.reversal.lifting`).

Lifting costs time and saves tape, so ``auto`` is ``lifted`` only where both were measured (docs/lifting.md):

* the tape becomes smaller by :data:`LEAST_SAVED` or more, by what was measured of the model that forgets more;
* a step takes at most 1.5 times that of ``checkpoint``. That was measured of a step that trains all weights of a model
  :data:`WIDTH` wide in chunks of :data:`TOKENS`, on GPUs of :data:`GPUS`. What is lifted does not grow with chunk or
  width as all else does, so that longer chunks and wider models pay less. On a CPU it is more: 1.9 and 2.6 times in
  chunks of 256 and 64, by ``bundled:rwkv-7``.

``checkpoint`` keeps whole states either way, so ``auto`` never lifts there. For its bits and those of ``reversible`` to
be the same where ``auto`` lifts, set the same kind for both.
"""

from dataclasses import dataclass

import torch

from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.forecast import RECORDED, record_bytes, runs_fused

LEAST_SAVED = 0.25
TOKENS, WIDTH = 256, 2048
GPUS = ((9, 0),)
"""Compute capabilities: the H100's and H200's. Float64 is slower by an order of magnitude on others."""


@dataclass(frozen=True)
class ChosenRemnants:
    """``whole`` or ``lifted``, and why it is that, for people; None where model or strategy have no such choice."""

    kind: str
    why: str | None


def refuse_lifting(asked: str | None, config: RwkvRevConfig, error: type[RwkvRevError]) -> None:
    """Raise ``error`` where ``lifted`` is asked for of a model whose states are not kept in two ways."""
    if asked == "lifted" and config.architecture.cost.lifted is None:
        raise error(
            f"remnants = 'lifted' is for the states of RWKV-7, and this model is {config.architecture.called}: use "
            "auto or whole"
        )


def choose_remnants(
    asked: str,
    strategy: str,
    config: RwkvRevConfig,
    *,
    chunk: int,
    device: torch.device,
    trains_all: bool,
    shared: bool = False,
) -> ChosenRemnants:
    """What ``remnants`` is.

    Args:
        asked: as set, so it may be ``auto``. strategy: as chosen.
        config: of the model.
        chunk: C, tokens that are run at once.
        device: that trains.
        trains_all: whether all weights have a gradient.
        shared: whether processes share a context.
    """
    if config.architecture.cost.lifted is None or strategy not in RECORDED:
        return ChosenRemnants("whole", None)
    if asked != AUTO:
        return ChosenRemnants(asked, "as set")
    if strategy != "reversible":
        return ChosenRemnants("whole", f"{strategy} keeps no less by lifting")
    if shared:
        return ChosenRemnants("whole", "what processes share is not lifted")
    whole, lifted = (record_bytes(kind, config, (), 1, chunk) for kind in ("whole", "lifted"))
    saved = 1 - lifted / whole
    if saved < LEAST_SAVED:
        return ChosenRemnants(
            "whole",
            f"in chunks of {chunk:,} lifting saves less than a quarter of the tape, about {100 * saved:.0f} %",
        )
    if device.type == "cpu":
        return ChosenRemnants("whole", "on a CPU lifting was measured to make a step take 1.9 times as long")
    if device.type != "cuda" or not runs_fused(config, device):
        return ChosenRemnants("whole", f"lifting has no kernel on {device.type} here")
    if torch.cuda.get_device_capability(device) not in GPUS:
        return ChosenRemnants(
            "whole", f"what lifting costs is not known for a {torch.cuda.get_device_name(device)}"
        )
    if chunk < TOKENS or config.hidden_size < WIDTH or not trains_all:
        return ChosenRemnants(
            "whole",
            f"lifting may make a step take more than 1.5 times as long, but for chunks of at least {TOKENS} tokens "
            f"of a model {WIDTH:,} wide or more, all of whose weights are trained",
        )
    return ChosenRemnants(
        "lifted",
        f"about {100 * saved:.0f} % less tape for a step that takes at most 1.5 times as long; whole is faster",
    )
