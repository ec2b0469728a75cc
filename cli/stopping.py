"""Ctrl-C and SIGTERM: exceptions, so that half-written outputs are removed, and a note that one came.

The note, because native code that an exception interrupts may put an error of its own in its place.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rwkv_rev.cli import output as out

_received: list[int] = []


def install_handlers() -> None:
    """In place of the system's own; a program in the background, told to ignore Ctrl-C, still does."""
    _received.clear()
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def exit_code() -> int | None:
    """Of a program that was told to stop; None if it was not."""
    return 128 + _received[0] if _received else None


@contextmanager
def telling_if_stopped(output: Path | None) -> Iterator[None]:
    """When stopped, one line that says what is there now (None: an output named after its source)."""
    try:
        yield
    except BaseException as error:
        if not (_received or isinstance(error, KeyboardInterrupt)):
            raise
        if output is None:
            there = "the output is whole or not there"
        elif os.path.lexists(output):
            there = f"{output} is whole, the old one or the new"
        else:
            there = f"{output} is not there"
        out.note(f"stopped; {there}; the same command begins anew")
        raise


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
