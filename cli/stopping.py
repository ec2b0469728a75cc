"""Ctrl-C and SIGTERM: exceptions, so that half-written outputs are removed, and a note that one came.

The note, because native code that an exception interrupts may put an error of its own in its place.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rwkv_rev.cli import output as out

STUCK = 10.0
"""Seconds after which a process that waits for others in native code, where it hears no signal, is ended: before those
who start processes (torchrun after 30 s) kill it without a word."""

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
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        _end_if_stuck()


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


def _end_if_stuck() -> None:
    """A collective on a GPU never returns once another process is gone, and Python calls handlers in between only: the
    system's part of the handler writes each signal's number into a socket, which a thread reads."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def watch(_kept: socket.socket) -> None:
        while number := reading.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            time.sleep(STUCK)
            if not _received:
                out.note("error: stopped while it waited for another process, which may be gone")
                os._exit(128 + number[0])

    threading.Thread(target=watch, args=(writing,), name="rwkv-rev-stopping", daemon=True).start()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
