"""How a run makes its gradients: strategy, chunk length, tape. No property of a model, so never saved with one.

Set by :meth:`rwkv_rev.modeling.RwkvRevForCausalLM.set_bptt`. Nothing heavy is imported: commands check arguments here.
"""

from dataclasses import dataclass

from rwkv_rev.errors import StrategyError

BPTT_STRATEGIES = ("auto", "full", "checkpoint", "reversible", "reversible-lossy", "truncated")
TAPES = ("host", "device", "disk")
CHUNK_LENGTH = 1024
"""Tokens per chunk where nothing else is asked for."""


@dataclass(frozen=True)
class BpttSettings:
    """How the gradient of a loss is made.

    Attributes:
        strategy: ``auto`` is ``full`` up to one chunk and ``reversible`` above it.
        chunk_length: C, tokens per chunk; without gradients, too, longer contexts are read in pieces of C.
        tape: where remnants are kept, ``host``, ``device`` or ``disk``.
        tape_dir: folder of the ``disk`` tape; the system's temporary folder when None.

    Raises:
        StrategyError: for a strategy, tape or length that does not exist.
    """

    strategy: str = "auto"
    chunk_length: int = CHUNK_LENGTH
    tape: str = "host"
    tape_dir: str | None = None

    def __post_init__(self) -> None:
        for field, value, known in (("bptt", self.strategy, BPTT_STRATEGIES), ("tape", self.tape, TAPES)):
            if value not in known:
                raise StrategyError(f"{field} = {value!r} does not exist; use one of {', '.join(known)}")
        if self.chunk_length < 1:
            raise StrategyError(f"chunk_length = {self.chunk_length} must be at least 1 token")
