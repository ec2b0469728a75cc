"""How far apart logits may be: the one table.

A conversion keeps every value, so what is left is float32 rounding of two implementations that add in
different orders. How much that is depends on the model, so a larger distance is not yet a difference: **float64
decides**. There the same two implementations agree to 1e-15 up to 2e-12 (on every model tried, random ones with
logits of 50 included), and more than 1e-9 is a difference, be it smaller than float32's rounding. And what float32
makes of the converted model must stay within :data:`NOISE_FACTOR` times of what it makes of the naive scan: on 30
models of all versions, trained and random, it was 0.3 to 1.7 times that.

In float32, 1e-4 is what needs no explanation. On the two bundled models (L=6, D=128) over 1,024 tokens the
``rwkv`` package is itself up to 3.3e-5 away from float64 and up to 3.0e-5 from the converted model. Rounding
errors add up along the residual stream and along each dot product like random steps, so larger models get
sqrt(L*D / (6*128)) times as much (24 layers of 2048: 8e-4), never less. Random RWKV-5.2 models of 24 layers
of 512 need it: they come up to 2.0e-4 away from float64, where 4e-4 is allowed (tests/test_tolerance.py
measures this).

Where the stored dtype is narrower than the source's (``--dtype float16`` of a float32 checkpoint) the
weights themselves are rounded by up to half a unit in the last place, 2^-12 (float16) or 2^-9 (bfloat16)
relative, and the logits move with them: at most 2.6e-2 and 4.3e-1 on two models of that size. Such a model
is close to the original, not the same. What proves that rounding is all that happened is a further row,
against the original's tensors rounded the same way, at the exact tolerance.
"""

import math

import torch

# Largest |delta logit| of a model with L*D = 768, by what the conversion did to the weights.
TOLERANCES = {
    "exact": 1e-4,
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-1,
    torch.bfloat16: 8e-1,
}
_REFERENCE_SIZE = 6 * 128
NOISE_FACTOR = 4


def tolerance(num_layers: int, width: int, rounded_to: torch.dtype | None = None) -> float:
    """Largest |delta logit| allowed.

    Args:
        num_layers: L.
        width: D.
        rounded_to: dtype the weights were rounded to; None when every value was kept; float64 for two models that
            both compute in float64.
    """
    base = TOLERANCES["exact" if rounded_to is None else rounded_to]
    return base * max(1.0, math.sqrt(num_layers * width / _REFERENCE_SIZE))
