"""Placeholder until the parallel kernels land: the naive scan under the chunked name."""

from rwkv_rev.wkv.naive import wkv4, wkv5, wkv5_contribution

__all__ = ["wkv4", "wkv5", "wkv5_contribution"]
