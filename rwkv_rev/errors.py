"""Errors meant for people: one line that says what is wrong and what would work.

The command line prints these without a traceback and exits with :attr:`RwkvRevError.exit_code`.
"""


class RwkvRevError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class SourceError(RwkvRevError):
    """A ``SOURCE`` cannot be found, downloaded or told apart from several candidates."""


class CheckpointError(RwkvRevError):
    """A checkpoint file is damaged, of a foreign kind, or not an RWKV-4/5 model."""


class OutputError(RwkvRevError):
    """An output cannot be written where it was asked for."""


class DataError(RwkvRevError):
    """Training or evaluation data is empty, malformed or does not fit the model."""


class StrategyError(RwkvRevError, ValueError):
    """A gradient strategy was asked for something it cannot do; the message names one that can."""


class ReversalMismatchError(RwkvRevError):
    """A state rebuilt in the backward sweep is not the state the forward sweep left."""


class VerificationFailed(RwkvRevError):
    """A check ran to its end and the models differ."""

    exit_code = 3
