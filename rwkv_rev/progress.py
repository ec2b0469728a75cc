"""How far something is, on stderr: a bar on a terminal, else a line every :data:`EVERY` seconds.

A line every so often tells a log file, a notebook or a pipe that a long job is alive, also where one step of it takes
minutes; what takes less than :data:`EVERY` seconds says nothing.
"""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rwkv_rev.tables import WIDTH

EVERY = 30.0
"""Seconds between lines where there is no terminal."""
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc} {percentage:3.0f}%, {n_fmt} of {total_fmt} {unit} in {elapsed}, {remaining} left{postfix}"


@contextmanager
def beside_bars() -> Iterator[None]:
    """Inside, something else may write lines to stderr: bars go, and come back after it."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


class Progress:
    """Context manager that tells how much of ``total`` is done.

    Args:
        what: is done, in a word.
        total, done: in ``unit`` s, which stands in the plural.
        wanted: whether to tell at all.
        scaled: shorten numbers to 1.2k and 3.4M.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        wanted: bool = True,
        scaled: bool = True,
    ) -> None:
        self._what, self._total, self._unit, self._scaled = what, total, unit, scaled
        self._begun_at, self._done = done, done
        self._wanted = wanted and total > 0
        self._began = time.monotonic()
        self._facts: tuple[str, ...] = ()
        self._closed = threading.Event()
        self._bar: Any = None
        if self._wanted and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                unit_scale=scaled,
                bar_format=_BAR,
                dynamic_ncols=True,
                leave=None,
            )
        elif self._wanted:
            threading.Thread(target=self._tell, name=f"rwkv-rev-{what}", daemon=True).start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, count: int, *facts: str) -> None:
        """``count`` more are done. ``facts``: shown behind, the most important first, as many as fit a line."""
        self._done += count
        self._facts = facts or self._facts
        if self._bar is not None:
            if facts:
                self._bar.set_postfix_str(self._that_fit(shutil.get_terminal_size().columns), refresh=False)
            self._bar.update(count)

    def say(self, text: str) -> None:
        """A line of its own above the bar; nothing where there is none."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is, or tell no more."""
        self._closed.set()
        if self._bar is not None:
            self._bar.close()

    def _that_fit(self, columns: int) -> str:
        """As many facts as stand behind a bar of four letters."""
        taken = len(self._what) + 2 * len(str(self._total)) + len(" 100%|####| / [1:00:00<1:00:00, ]")
        return self._in(columns - taken - 1)

    def _tell(self) -> None:
        while not self._closed.wait(EVERY):
            sys.stderr.write(self._line() + "\n")
            sys.stderr.flush()

    def _line(self) -> str:
        """With as many facts as fit."""
        return self._with(self._in(WIDTH - len(self._with("")) - len(", ")))

    def _in(self, room: int) -> str:
        """As many facts as fit into so many characters."""
        lists = (", ".join(self._facts[:count]) for count in range(len(self._facts), 0, -1))
        return next((facts for facts in lists if len(facts) <= room), "")

    def _with(self, postfix: str) -> str:
        from tqdm import tqdm

        return tqdm.format_meter(
            self._done,
            self._total,
            time.monotonic() - self._began,
            prefix=self._what,
            unit=self._unit,
            unit_scale=self._scaled,
            postfix=postfix,
            bar_format=_LINE,
            initial=self._begun_at,
        )
