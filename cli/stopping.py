"""Ctrl-C and SIGTERM: exceptions, so that half-written outputs are removed, and a note that one came.

The note, because native code that an exception interrupts may put an error of its own in its place.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rwkv_rev.cli import output as out

_received: list[int] = []
_told = False


def install_handlers() -> None:
    """In place of the system's own; a program in the background, told to ignore Ctrl-C, still does."""
    global _told
    _received.clear()
    _told = False
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    sys.unraisablehook = _come_again


def exit_code(error: BaseException) -> int | None:
    """Of a program that ends with ``error`` because it was told to stop; None if it was not."""
    if _received:  # what fails then fails because of it
        return 128 + _received[0]
    return 130 if isinstance(error, KeyboardInterrupt) else None


def tell(state: str | None) -> None:
    """One line, the first time, that says what state things are in, if any; of several processes the first speaks."""
    global _told
    if not _told and os.environ.get("RANK", "0") == "0":
        _told = True
        out.note("stopped" if state is None else f"stopped; {state}")


@contextmanager
def telling_if_stopped(output: Path | None) -> Iterator[None]:
    """When stopped, one line that says what is there now (None: an output named after its source)."""
    try:
        yield
    except BaseException as error:
        if exit_code(error) is None:
            raise
        if output is None:
            there = "the output is whole or not there"
        elif os.path.lexists(output):
            there = f"{output} is whole, the old one or the new"
        else:
            there = f"{output} is not there"
        tell(f"{there}; the same command begins anew")
        raise


def _come_again(unheard: Any) -> None:
    """For what was raised where nobody hears it (a destructor, a callback of native code): a stop comes once more."""
    if _received and isinstance(unheard.exc_value, KeyboardInterrupt | SystemExit):
        threading.Timer(0.01, signal.raise_signal, (_received[0],)).start()  # here it would be unheard again
    else:
        sys.__unraisablehook__(unheard)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
