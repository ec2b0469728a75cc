"""How much more of a chunk's graph peft's adapters keep, in numbers of 4 bytes.

Beside the graph of a model whose every weight is trained (:mod:`rwkv_rev.forecast`), an adapted map of shape
[out, in] keeps at most ``in + out`` numbers per token and active adapter (what dropout leaves of its input, what is
added to its output) and, where the adapter is not a product of narrow maps, 3 copies of the map (weights that are
computed in each call). ``tests/test_adapter_memory.py`` measures both for every method that is known to be right.
"""

from collections.abc import Iterable
from typing import Any

from torch import Size, Tensor, nn

from rwkv_rev.foreign import adapters

NARROW = frozenset(
    {
        "tuners.lora.layer.Linear",
        "tuners.lora.layer.Embedding",
        "tuners.lora.bnb.Linear4bit",
        "tuners.lora.bnb.Linear8bitLt",
    }
)
"""Layers that compute no weights of the map's size, unless by a variant."""
COMPUTED = 3
GROWING = frozenset({"tuners.hra.layer.HRALinear"})
"""Layers that keep a map for every unit of their rank."""


def kept_numbers(layers: Iterable[nn.Module]) -> tuple[int, int] | None:
    """Numbers per token, and once, that peft's ``layers`` keep at most; None where that is not known."""
    per_token = once = 0
    for layer in layers:
        place = adapters.place_of(type(layer))
        if place in GROWING:
            return None
        weight = _map(layer)
        if weight is None or getattr(layer, "disable_adapters", False):
            continue
        per_token += sum(weight[-2:]) * max(1, len(getattr(layer, "active_adapters", ())))
        if place not in NARROW or getattr(layer, "lora_variant", None):
            once += COMPUTED * weight.numel()
    return per_token, once


def _map(layer: Any) -> Size | None:
    """Shape of the matrix of the layer that an adapter stands around."""
    if not hasattr(layer, "base_layer"):
        return None
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    weight = getattr(base, getattr(layer, "parameter_name", "weight"), None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    packed = getattr(weight, "quant_state", None)  # in 4 bits
    return weight.shape if packed is None else packed.shape
