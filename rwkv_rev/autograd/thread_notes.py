"""Notes that a thread keeps, and that autograd hands on from who asks for a gradient to its own threads."""

import ctypes
import sys
from typing import Any

import torch


def noted(name: str) -> Any:
    """What the thread has under a name; None for nothing."""
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None


def note(name: str, value: Any) -> None:
    """Keep a value under a name."""
    if _STEALS:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(name, value)


def _steals() -> bool:
    """Whether PyTorch takes over the caller's reference, as until some version after 2.9, instead of one of its own."""
    value, name = object(), "rwkv_rev.probe"
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))  # in case it does
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls(name, value)
    return sys.getrefcount(value) == before


_STEALS = _steals()
