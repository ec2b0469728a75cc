"""The recurrences parallel in time, in PyTorch operators: any device, any decay, exact gradients."""

from rwkv_rev.wkv.chunked_wkv4 import wkv4
from rwkv_rev.wkv.chunked_wkv5 import wkv5, wkv5_contribution

__all__ = ["wkv4", "wkv5", "wkv5_contribution"]
