"""How fast cards and what joins them are: measured, but for what is called an assumption.

A step's seconds are put together of few rates (:mod:`rwkv_rev.simulation.step`). Where each comes from:

- ``matrix``: in a profile of shape 5.2-1.5b at C = 4,096, matrix products were 53 % of the GPU's time (docs/h200.md):
  46 TFLOP in 67 ms. One large product alone reaches 798 TFLOP/s.
- ``recurrence``: kernels alone, ``rwkv-rev bench kernels``, 32,768 tokens of 2,048 channels (docs/h100.md, h200.md).
- ``within``: all-reduce between two H100 of one host, bus bandwidth, the lowest of several measurements (329 to 361).
- ``vectors``, ``gap``, ``unrecorded``, ``bandwidth`` of the H200, ``STEP``, ``ADAPTER``, ``PIECES``: fitted to the rows
  that ``tests/test_simulation.py`` compares. ``SHARDED``, and ``unrecorded`` of RWKV-4 are of one row each,
  which is no test of them.
- ``bandwidth`` of the H100 is 85 % of its data sheet's 3.35 TB/s, and its ``memory`` what such cards usually have: both
  are assumptions, and what is fitted beside the former makes up for it.
- ``LATENCY``, :data:`BETWEEN`, ``gap`` of RWKV-4 (as RWKV-5), ``unrecorded`` of RWKV-6 (as RWKV-5) and 7 (half as much
  again) and what a further rank's piece takes are assumptions: nothing was measured with more than two cards, or over
  several hosts.
"""

from dataclasses import dataclass

from rwkv_rev.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as people ask for it. title: as it calls itself.
        memory: bytes.
        matrix: operations per second of 16-bit matrix products within a step.
        bandwidth: bytes per second that elementwise kernels read and write within a step.
        within: bytes per second between the cards of a host.
    """

    name: str
    title: str
    memory: int
    matrix: float
    bandwidth: float
    within: float


CARDS = {
    card.name: card
    for card in (
        Card("h100", "NVIDIA H100", 84_900_000_000, 690e12, 2.85e12, 329e9),
        Card("h200", "NVIDIA H200", 150_110_011_392, 690e12, 3.4e12, 329e9),
    )
}
"""The H200's rows are of an earlier state of the code, with less recorded and made again: its bandwidth is theirs."""


def card_of(name: str) -> Card:
    """A card by its name.

    Raises:
        ConfigError: where it was not measured.
    """
    if name.lower() not in CARDS:
        raise ConfigError(f"gpu = {name}: nothing was measured on it; choose one of {', '.join(CARDS)}")
    return CARDS[name.lower()]


@dataclass(frozen=True)
class Generation:
    """What a generation of RWKV takes beside matrix products.

    Attributes:
        forward, both: seconds of the recurrence alone per token and channel, forward, and forward with gradients.
        vectors: numbers of 2 bytes that a layer reads and writes per token and channel otherwise, in forward and
            gradient together; in the first sweep a third as many again.
        gap: seconds of a layer's chunk in which a card that replays recordings has little or nothing to do.
        unrecorded: seconds that a layer's chunk takes longer where launches are not recorded.
        piece: what a piece takes beside what its tokens take, in forwards of the recurrence.
        matrices: as large as the memory, of which a piece is made: what its tokens write, and what they do to a memory.
        factors: numbers per channel that a piece has beside them.
    """

    forward: float
    both: float
    vectors: float
    gap: float
    unrecorded: float
    piece: float
    matrices: int = 1
    factors: int = 0


_TOKENS = 32768 * 2048
GENERATIONS = {
    "4": Generation(0.38e-3 / _TOKENS, 1.35e-3 / _TOKENS, 335, 0.2e-3, 2.3e-3, 1),
    "5": Generation(0.77e-3 / _TOKENS, 3.06e-3 / _TOKENS, 126, 0.2e-3, 6e-3, 1),
    "6": Generation(1.49e-3 / _TOKENS, 4.85e-3 / _TOKENS, 330, 0.65e-3, 6e-3, 1, factors=1),
    "7": Generation(2.6e-3 / _TOKENS, 6.7e-3 / _TOKENS, 380, 0.6e-3, 9e-3, 3, matrices=2),
}
STEP = 0.02
"""Seconds of a step in which the card waits, however long it is: plans, exact states, the optimizer's start."""
ADAPTER = 60
"""Bytes read and written per token for each number that LoRA's additions take and give, in both sweeps."""
PIECES = 0.55e-3
"""Seconds per layer and chunk of a shared context, beside what is sent: of four rows, two cards."""
SCAN = 0.09
"""Of RWKV-7's recurrence what is a scan over the states, for which ranks wait: torch.profiler, 131,072 tokens."""
FURTHER_PIECE = 80e-6
"""The same for each rank beyond the second: 20 launches of 4 us. An assumption."""
LATENCY = {"within": 20e-6, "between": 40e-6}
"""Seconds until the first byte of a collective. An assumption."""
BETWEEN = 50e9
"""Bytes per second and card between hosts: a port of 400 Gbit/s for each card. An assumption."""
SHARD_COPIES = 32
"""Bytes read and written per weight and chunk where blocks are gathered and their gradients scattered."""
SHARDED = 5e-3
"""Seconds per layer and chunk that the host takes for a block's gathers and scatters: of one row, RWKV-7."""
