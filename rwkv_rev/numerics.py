"""Small numerical quantities that several parts report.

Forgetting: multiplying a state by ``w < 1`` shifts ``log2(1/w)`` of its low bits out of any fixed grid, so
that is what an exact reversal must store per step and state element (MacKay et al. 2018, "Reversible
Recurrent Neural Networks", which counts its forgetting the same way).
"""

import math

import torch


def bits_forgotten_per_step(log_decay: torch.Tensor) -> torch.Tensor:
    """Bits forgotten per step and state element: ``log2(1/w)`` with ``log(w) = log_decay =
    -exp(time_decay)``.

    Args:
        log_decay: any shape, natural logarithm of the decay, at most 0.

    Returns:
        Same shape, float64, in bits per step (0 keeps everything).
    """
    return -log_decay.double() / math.log(2.0)
