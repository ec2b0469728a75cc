"""How a run makes its gradients: strategy, chunk length, tape. No property of a model, so never saved with one.

Set by :meth:`rwkv_rev.modeling.RwkvRevForCausalLM.set_bptt`. Nothing heavy is imported: commands check arguments here.
"""

import os
from dataclasses import dataclass
from numbers import Integral

from rwkv_rev.arguments import named_fields
from rwkv_rev.counts import MOST
from rwkv_rev.errors import StrategyError
from rwkv_rev.printable import shortened

BPTT_STRATEGIES = ("auto", "full", "checkpoint", "reversible", "reversible-lossy", "truncated")
TAPES = ("host", "device", "disk")
HIDDEN_STATES = ("device", "host")
REMNANTS = ("auto", "whole", "lifted")
AUTO = "auto"
"""The chunk length that :mod:`rwkv_rev.chunk_length` chooses."""
CHUNK_LENGTH = 1024
"""Tokens per chunk where none is asked for and none can be chosen, and of a reading without gradients then."""


@named_fields
@dataclass(frozen=True)
class BpttSettings:
    """How the gradient of a loss is made.

    Attributes:
        strategy: ``auto`` is ``full`` up to one chunk and ``reversible`` above it.
        chunk_length: C, tokens per chunk, or ``auto`` (:mod:`rwkv_rev.chunk_length`). Without gradients, too, longer
            contexts are read in pieces of C, of :data:`CHUNK_LENGTH` under ``auto``.
        tape: where remnants are kept, ``host``, ``device`` or ``disk``.
        tape_dir: folder of the ``disk`` tape; the system's temporary folder when None.
        hidden_states: where those are, and the gradient by them, that a loss of one's own is computed from: on the
            ``device`` or in ``host`` memory.
        remnants: of memories that can be kept in two ways, RWKV-7's: ``lifted``, what a chunk forgets, by integer
            lifting (:mod:`rwkv_rev.reversal.lifting`), for ``reversible`` and to the same bits for ``checkpoint``; or
            the ``whole`` state. What ``auto`` is: :mod:`rwkv_rev.remnants`.

    Raises:
        StrategyError: for a strategy, tape, length, kind of remnants or folder that does not exist.
    """

    strategy: str = "auto"
    chunk_length: int | str = AUTO
    tape: str = "host"
    tape_dir: str | None = None
    hidden_states: str = "device"
    remnants: str = "auto"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("bptt", self.strategy, BPTT_STRATEGIES),
            ("tape", self.tape, TAPES),
            ("hidden_states", self.hidden_states, HIDDEN_STATES),
            ("remnants", self.remnants, REMNANTS),
        ):
            if value not in known:
                raise StrategyError(f"{field} = {value!r} does not exist; use one of {', '.join(known)}")
        whole = isinstance(self.chunk_length, Integral) and not isinstance(self.chunk_length, bool)
        if not (whole and 1 <= int(self.chunk_length) <= MOST) and self.chunk_length != AUTO:
            raise StrategyError(
                f"chunk_length = {shortened(repr(self.chunk_length))} must be a whole number from 1 to {MOST}, or auto"
            )
        if whole:  # numpy's are no int
            object.__setattr__(self, "chunk_length", int(self.chunk_length))
        if self.tape_dir is not None and not self._is_writable():
            raise StrategyError(
                f"tape_dir = {shortened(repr(self.tape_dir))} is no folder that can be written to"
            )

    @property
    def read_length(self) -> int:
        """Tokens that are read at once without gradients: under ``auto`` as many on every device."""
        return CHUNK_LENGTH if isinstance(self.chunk_length, str) else self.chunk_length

    def _is_writable(self) -> bool:
        assert self.tape_dir is not None
        try:
            return os.path.isdir(self.tape_dir) and os.access(self.tape_dir, os.W_OK | os.X_OK)  # noqa: PTH112
        except (TypeError, ValueError):  # no path at all
            return False
