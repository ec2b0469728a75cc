"""Seconds of a gather and of a scan, by formulas and by counting."""

import math

import pytest

from rwkv_rev.simulation.exchange_seconds import (
    MOST,
    Link,
    gather_seconds,
    reduce_seconds,
    scan_from,
    scan_seconds,
)

FAST, SLOW = Link(1e-5, 1e11), Link(3e-5, 1e9)


def passed_on(piece: float, ranks: int, blocks: int, link: Link) -> float:
    """When the last rank has the last block: each is handed on once it is there, and one at a time."""
    took = link.latency + piece / blocks / link.bandwidth
    there = [0.0] * blocks  # at the first rank
    for _ in range(ranks - 1):
        free, arrived = 0.0, []
        for at in there:
            free = max(free, at) + took
            arrived.append(free)
        there = arrived
    return there[-1]


@pytest.mark.parametrize("ranks", [2, 3, 8, 32])
@pytest.mark.parametrize("link", [FAST, SLOW])
def test_a_scan_by_counting(ranks: int, link: Link) -> None:
    """The best number of blocks is the formula's, and so is its time."""
    piece = 4e5
    best = min(passed_on(piece, ranks, blocks, link) for blocks in range(1, 100))
    to_all = link.latency * math.ceil(math.log2(ranks)) + piece / link.bandwidth
    assert scan_seconds(piece, ranks, link) == pytest.approx(best + to_all, rel=0.02)


def test_from_which_rank_on() -> None:
    """Pieces that take longer than a hop: the scan wins, and stays the better one; shorter ones: never."""
    long, short = 1e6, 1e3
    found = scan_from(long, SLOW)
    assert found is not None and found > 2
    for ranks in (found, 4 * found, MOST):
        assert scan_seconds(long, ranks, SLOW) < gather_seconds(long, ranks, SLOW)
    assert scan_seconds(long, found // 2, SLOW) >= gather_seconds(long, found // 2, SLOW)
    assert scan_from(short, SLOW) is None and scan_from(long, Link(1.0, 1e9)) is None


def test_one_rank_sends_nothing() -> None:
    for seconds in (gather_seconds, scan_seconds, reduce_seconds):
        assert seconds(1e6, 1, FAST) == 0
    assert reduce_seconds(1e11, 2, FAST) == pytest.approx(1.0, rel=1e-3)
