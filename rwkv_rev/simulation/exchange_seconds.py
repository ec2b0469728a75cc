r"""Seconds of what is sent between cards, and from how many ranks on a scan would take less than a gather.

m bytes of each rank, over links of a latency a (seconds) and beta bytes per second:

    gather    a ceil(log2 W) + (W - 1) m / beta                             every rank gets all W pieces
    scan      (W - 2 + K) (a + m / (K beta)) + a ceil(log2 W) + m / beta    K blocks from rank to rank, one behind the
                                                                            other; then what all W do, to everybody

The gather is that of LASP-2 (Sun et al. 2025), which :func:`rwkv_rev.distributed.state_exchange.exchange` does; the
scan is ZeCO's (Chou et al. 2025), which cuts a state along one of its dimensions, as a factor per row allows (RWKV-4 to
6; RWKV-7's transition is a matrix per head, so whole heads are what can be cut). The scan's first term is least for
K = sqrt((W - 2) m / (a beta)), and then is

    (sqrt((W - 2) a) + sqrt(m / beta))^2

Both grow with W: the gather by m / beta, the scan by a, a hop. Where a piece is sent in less than a hop takes, no
number of ranks makes the scan the better one. ZeCO hides its hops behind the computation of the chunk, of which nothing
is counted here; neither is that the gather's W pieces are composed by every rank.
"""

import math
from dataclasses import dataclass

MOST = 2**16
"""Ranks that are asked for."""


@dataclass(frozen=True)
class Link:
    """Between two cards: seconds until the first byte, bytes per second."""

    latency: float
    bandwidth: float


def hops(ranks: int) -> int:
    """Rounds in which one rank's news reaches all."""
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


def gather_seconds(piece: float, ranks: int, link: Link) -> float:
    """Every rank's ``piece`` bytes to all of them; a scatter of sums takes as long."""
    return link.latency * hops(ranks) + (ranks - 1) * piece / link.bandwidth


def reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """The sum of ``size`` bytes over all ranks, on all of them (a ring)."""
    return 2 * (link.latency * hops(ranks) + (ranks - 1) / ranks * size / link.bandwidth)


def scan_seconds(piece: float, ranks: int, link: Link) -> float:
    """``piece`` bytes from rank to rank, in the best number of blocks, and what all of them do to everybody."""
    if ranks < 2:
        return 0.0
    blocks = max(1, round(math.sqrt((ranks - 2) * piece / (link.latency * link.bandwidth))))
    passed = (ranks - 2 + blocks) * (link.latency + piece / (blocks * link.bandwidth))
    return passed + link.latency * hops(ranks) + piece / link.bandwidth


def scan_from(piece: float, link: Link) -> int | None:
    """The least W from which on the scan takes less than the gather, by powers of two; None where there is none."""
    ranks, found = 2, None
    while ranks <= MOST:
        if scan_seconds(piece, ranks, link) >= gather_seconds(piece, ranks, link):
            found = None
        elif found is None:
            found = ranks
        ranks *= 2
    return found
