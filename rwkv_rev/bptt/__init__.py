"""Gradient strategies, one file each, chosen by name; :mod:`rwkv_rev.bptt.strategy` is the seam.

Terms: ``docs/terms.md``.
"""

from rwkv_rev.bptt.checkpoint import Checkpoint
from rwkv_rev.bptt.full import Full
from rwkv_rev.bptt.reversible import Reversible
from rwkv_rev.bptt.reversible_lossy import ReversibleLossy
from rwkv_rev.bptt.strategy import LossInputs, LossResult, Strategy
from rwkv_rev.bptt.truncated import Truncated
from rwkv_rev.bptt_settings import CHUNK_LENGTH
from rwkv_rev.errors import StrategyError

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Full, Checkpoint, Reversible, ReversibleLossy, Truncated)
}


def choose_strategy(
    name: str,
    length: int,
    *,
    chunk_length: int | str,
    tape: str = "host",
    tape_dir: str | None = None,
    remnants: str = "auto",
    at_once: int | None = None,
) -> Strategy:
    """The strategy called ``name`` for a context of ``length`` tokens.

    ``auto`` is ``full`` up to one chunk and ``reversible`` above it. Of a model that is not known here, a
    ``chunk_length`` of ``auto`` is :data:`~rwkv_rev.bptt_settings.CHUNK_LENGTH`. ``at_once``: tokens in which several
    chunks are run where that gives the same gradient (:func:`rwkv_rev.forecast.tokens_at_once`); None for one by one.

    Raises:
        StrategyError: if there is no such strategy.
    """
    chunk_length = CHUNK_LENGTH if isinstance(chunk_length, str) else chunk_length
    if name == "auto":
        name = "full" if length <= chunk_length else "reversible"
    if name not in STRATEGIES:
        raise StrategyError(f"bptt = {name!r} does not exist; use auto, {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    return kind(at_once if at_once and kind.joins_chunks else chunk_length, tape, tape_dir, remnants)


__all__ = ["STRATEGIES", "LossInputs", "LossResult", "Strategy", "choose_strategy"]
