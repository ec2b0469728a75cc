"""A cheap integer checksum of a boundary state, so that a wrong reversal is noticed and never trained on.

The sum of the state's 32-bit words, each times an odd number that depends on its position, modulo 2**64. A state
that differs in one word always has another fingerprint; integer sums do not depend on the order of summation, so
it is the same on every device and thread count.
"""

import torch
from torch import Tensor

_MULTIPLIER = -7046029254386353131  # odd; 2**64 divided by the golden ratio, as a signed 64-bit number


def fingerprint(*tensors: Tensor) -> Tensor:
    """Checksum (int64 scalar, on the tensors' device) of the bits of ``tensors``."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        words = tensor.detach().contiguous().flatten()
        if words.dtype != torch.int32:
            words = words.view(torch.int32) if words.element_size() >= 4 else words.view(torch.int16)
        position = torch.arange(words.numel(), device=words.device, dtype=torch.int64)
        total = total * 3 + (words.to(torch.int64) * (2 * position * _MULTIPLIER + 1)).sum()
    return total


def head_fingerprints(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """Checksum of each head, int64 [B, H], of a fixed-point state [B, H, N, N] int32 and its exponents [B, H]."""
    words = mantissa.flatten(2)
    position = torch.arange(words.shape[2], device=words.device, dtype=torch.int64)
    return (words.to(torch.int64) * (2 * position * _MULTIPLIER + 1)).sum(dim=2) * 3 + exponent
