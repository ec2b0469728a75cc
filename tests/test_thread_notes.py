"""Notes in a thread's state: references are counted as elsewhere, in every version of PyTorch."""

import sys

from rwkv_rev.autograd.thread_notes import note, noted


def test_references() -> None:
    """Until some version after 2.9 PyTorch counted none of its own, and objects were gone while it held them."""
    held = object()
    start = sys.getrefcount(held)
    for _ in range(100):
        note("rwkv_rev.test", held)
        assert noted("rwkv_rev.test") is held
    kept = sys.getrefcount(held)
    note("rwkv_rev.test", None)
    end = sys.getrefcount(held)
    assert (kept - start, end - start) == (1, 0)
    start = sys.getrefcount(None)
    for _ in range(1000):
        note("rwkv_rev.test", None)
    assert sys.getrefcount(None) > start - 500


def test_nothing_is_noted_at_first() -> None:
    assert noted("rwkv_rev.no such name") is None
