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
CHUNK_LENGTH = 1024
"""Tokens per chunk where nothing else is asked for."""


@named_fields
@dataclass(frozen=True)
class BpttSettings:
    """How the gradient of a loss is made.

    Attributes:
        strategy: ``auto`` is ``full`` up to one chunk and ``reversible`` above it.
        chunk_length: C, tokens per chunk; without gradients, too, longer contexts are read in pieces of C.
        tape: where remnants are kept, ``host``, ``device`` or ``disk``.
        tape_dir: folder of the ``disk`` tape; the system's temporary folder when None.

    Raises:
        StrategyError: for a strategy, tape, length or folder that does not exist.
    """

    strategy: str = "auto"
    chunk_length: int = CHUNK_LENGTH
    tape: str = "host"
    tape_dir: str | None = None

    def __post_init__(self) -> None:
        for field, value, known in (("bptt", self.strategy, BPTT_STRATEGIES), ("tape", self.tape, TAPES)):
            if value not in known:
                raise StrategyError(f"{field} = {value!r} does not exist; use one of {', '.join(known)}")
        whole = isinstance(self.chunk_length, Integral) and not isinstance(self.chunk_length, bool)
        if not (whole and 1 <= self.chunk_length <= MOST):
            raise StrategyError(
                f"chunk_length = {shortened(repr(self.chunk_length))} must be a whole number from 1 to {MOST}"
            )
        if self.tape_dir is not None and not self._is_writable():
            raise StrategyError(
                f"tape_dir = {shortened(repr(self.tape_dir))} is no folder that can be written to"
            )

    def _is_writable(self) -> bool:
        assert self.tape_dir is not None
        try:
            return os.path.isdir(self.tape_dir) and os.access(self.tape_dir, os.W_OK | os.X_OK)  # noqa: PTH112
        except (TypeError, ValueError):  # no path at all
            return False
