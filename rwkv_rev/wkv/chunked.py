"""The recurrences parallel in time, in PyTorch operators: any device, any decay, exact gradients."""

from rwkv_rev.wkv.chunked_wkv5 import wkv5, wkv5_contribution
from rwkv_rev.wkv.naive import wkv4

__all__ = ["wkv4", "wkv5", "wkv5_contribution"]
