"""A cheap integer checksum of a boundary state, so that a wrong reversal is noticed and never trained on.

The sum of the state's 32-bit words, each times an odd number that depends on its position, modulo 2**64. A state
that differs in one word always has another fingerprint; integer sums do not depend on the order of summation, so
it is the same on every device and thread count.
"""

from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIER = -7046029254386353131  # odd; 2**64 divided by the golden ratio, as a signed 64-bit number


def fingerprint(*tensors: Tensor) -> Tensor:
    """Checksum (int64 scalar, on the tensors' device) of the bits of ``tensors``."""
    total: Tensor | None = None
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1)
        if words.dtype != torch.int32:
            words = words.view(torch.int32) if words.element_size() >= 4 else words.view(torch.int16)
        found = (words * _factors(words.numel(), words.device)).sum()
        total = found if total is None else total * 3 + found
    assert total is not None
    return total


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the tensor's words modulo 2**64, an int64 scalar on its device, in one pass over its memory.

    A tensor that differs in one word always has another checksum; one whose words have changed places does not.
    """
    return as_words(tensor).sum(dtype=torch.int64)


def as_words(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of one dimension, the widest that fit."""
    words = tensor.detach().contiguous().view(-1)
    size, count, offset = words.element_size(), words.numel(), words.storage_offset()
    for dtype in (torch.int64, torch.int32, torch.int16):
        ratio = dtype.itemsize // size
        if ratio and count % ratio == 0 and offset % ratio == 0:
            return words.view(dtype)
    return words.view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Whether two tensors of one dtype and shape hold the same bits, a bool on their device; NaN equals itself."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return (one.contiguous().view(words) == other.contiguous().view(words)).all()


def head_fingerprints(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """Checksum of each head, int64 [B, H], of a fixed-point state [B, H, N, N], int32 or int64, and its exponents."""
    words = mantissa.flatten(2)
    return (words * _factors(words.shape[2], words.device)).sum(dim=2) * 3 + exponent


def _factors(count: int, device: torch.device) -> Tensor:
    """What each of ``count`` words is multiplied by, int64."""
    if device.type == "cpu":
        return _factors_on_cpu(count)
    # made anew: what a CUDA graph makes must not outlive it
    return 2 * torch.arange(count, device=device, dtype=torch.int64) * _MULTIPLIER + 1


@lru_cache(maxsize=8)
def _factors_on_cpu(count: int) -> Tensor:
    return 2 * torch.arange(count, dtype=torch.int64, device="cpu") * _MULTIPLIER + 1
