"""Small numerical quantities that several parts report.

*Forgetting*: multiplying a state by ``w < 1`` shifts ``log2(1/w)`` of its low bits out of any fixed grid, so
that is what an exact reversal must store per step and state element (MacKay et al. 2018, "Reversible
Recurrent Neural Networks", section 3, which counts its forgetting the same way).

*NUHMC*, the "number of updates at half mantissa capacity", is from the draft paper of the EBRT cell (embedding-based
reversible timestep; section "Precision Limits of the EBRT Cell", an unpublished manuscript in a public repository).
It adds the same number to a state again and again: after n additions the state is n times the number, and log2(n) of
the number's p mantissa bits are rounded away. Half of them are after

    NUHMC = 2^floor(p / 2)         float16 32, float32 2,048, float64 67,108,864

updates. **That holds for states that only grow.** RWKV's decay, and run backwards an error grows by 1/w per step
instead of staying where it is: dividing back, half of the mantissa is noise after

    n = (p / 2) / log2(1/w)

steps, :func:`division_nuhmc`, our own extension of the measure; a channel that forgets 0.1 bit per step reaches it in
float64 after 260 tokens, not after 67 million. Both are measured too, by adding up and by running back.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from rwkv_rev.reversal.drift import division_drift

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_BITS = 32
"""Bits of a state element: no chunk forgets more."""
WIDE_STATE_BITS = 62
"""Those of a model in float64."""
DECAY_QUANTILES = {"25 %": 0.25, "median": 0.5, "75 %": 0.75, "99 %": 0.99}
"""Channels, by how fast they forget, for which :func:`format_limits` looks at plain division."""
LONGEST_MEASURED = 2048
"""Steps over which plain division is measured."""
_MEASURED_STEPS = tuple(sorted({round(2 ** (i / 4)) for i in range(4 * LONGEST_MEASURED.bit_length() - 3)}))
"""Where a run back is looked at, four per doubling."""


def bits_forgotten_per_step(log_decay: Tensor) -> Tensor:
    """Bits forgotten per step and state element: ``log2(1/w)`` with ``log(w) = log_decay =
    -exp(time_decay)``.

    Args:
        log_decay: any shape, natural logarithm of the decay, at most 0.

    Returns:
        Same shape, float64, in bits per step (0 keeps everything).
    """
    return -log_decay.double() / math.log(2.0) + 0.0  # 0, not -0


def bits_forgotten(log_decay: Tensor, length: int, most: int = STATE_BITS) -> Tensor:
    """Bits per state element that a chunk of ``length`` tokens forgets, at most all that it has; float64."""
    return (bits_forgotten_per_step(log_decay) * length).clamp(max=most)


def mantissa_bits(dtype: torch.dtype) -> int:
    """Stored mantissa bits p of a floating-point format: 10, 7, 23, 52 for float16, bfloat16, float32, float64."""
    return -round(math.log2(torch.finfo(dtype).eps))


def nuhmc(dtype: torch.dtype) -> int:
    """Updates until half of the mantissa of a growing state is rounded away, by the EBRT draft's formula."""
    return 1 << (mantissa_bits(dtype) // 2)


@functools.cache
def counted_nuhmc(dtype: torch.dtype) -> int:
    """The same, counted: additions of one number to zero until the sum's grid is 2^floor(p/2) times the number's.

    The number is the smallest above one, whose lowest mantissa bit is set. All additions are carried out (67 million
    in float64, half a second).
    """
    step = torch.finfo(dtype).eps
    full = 2.0 ** (mantissa_bits(dtype) // 2)
    if dtype == torch.float64:
        state, count = 0.0, 0
        while True:
            block = numpy.full(2**20, 1 + step)
            block[0] += state
            sums = numpy.add.accumulate(block)
            if sums[-1] >= full:
                return count + int(numpy.argmax(sums >= full)) + 1
            state, count = float(sums[-1]), count + len(sums)
    number = torch.tensor(1 + step, dtype=dtype, device="cpu")
    total, count = torch.zeros((), dtype=dtype, device="cpu"), 0
    while total < full:
        total = total + number
        count += 1
    return count


def division_nuhmc(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps back by plain division until half of the mantissa is noise, ``(p/2) / log2(1/w)``; infinite for w = 1."""
    return mantissa_bits(dtype) / 2 / bits_forgotten_per_step(log_decay)


def measured_division_nuhmc(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, measured: steps after which a state divided back is wrong by more than ``2^-(p/2)``.

    Found among distances of four per doubling up to :data:`LONGEST_MEASURED`; infinite where the state is still
    good then.

    Args:
        log_decay: any shape, natural logarithm of the decay, at most 0.
        dtype: the format of both directions.
    """
    errors = division_drift(log_decay, _MEASURED_STEPS, dtype)
    wrong = errors > 2.0 ** -(mantissa_bits(dtype) / 2)
    steps = torch.tensor(_MEASURED_STEPS, dtype=torch.float64, device=wrong.device)
    first = steps[wrong.to(torch.uint8).argmax(dim=0)]
    return torch.where(wrong.any(dim=0), first, torch.inf)


@dataclass(frozen=True)
class FormatLimits:
    """What one floating-point format can bear.

    Attributes:
        format: its name. mantissa_bits: p.
        nuhmc: updates of a growing state, by the formula. counted: the same, counted.
        division: per quantile of forgetting, steps back by plain division, by the formula and measured; empty where
            nothing is forgotten, and nothing divided.
    """

    format: str
    mantissa_bits: int
    nuhmc: int
    counted: int
    division: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where a channel outlasts the measurement or forgets nothing."""
        return {
            "format": self.format,
            "mantissa_bits": self.mantissa_bits,
            "nuhmc": self.nuhmc,
            "nuhmc_counted": self.counted,
            "division_steps": {
                name: {"formula": _finite(formula), "measured": _finite(measured)}
                for name, (formula, measured) in self.division.items()
            },
        }


def format_limits(log_decay: Tensor) -> list[FormatLimits]:
    """Limits of every format in :data:`FORMATS` for channels with the given log w (any shape)."""
    bits = bits_forgotten_per_step(log_decay).flatten()
    names = list(DECAY_QUANTILES) if bool(bits.any()) else []
    quantiles = torch.quantile(
        bits, torch.tensor(list(DECAY_QUANTILES.values()), dtype=bits.dtype, device=bits.device)
    )
    chosen = -quantiles * math.log(2.0)
    return [
        FormatLimits(
            str(dtype).removeprefix("torch."),
            mantissa_bits(dtype),
            nuhmc(dtype),
            counted_nuhmc(dtype),
            dict(
                zip(
                    names,
                    zip(
                        division_nuhmc(chosen, dtype).tolist(),
                        measured_division_nuhmc(chosen, dtype).tolist(),
                        strict=True,
                    ),
                    strict=False,
                )
            ),
        )
        for dtype in FORMATS
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
