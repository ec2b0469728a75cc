"""What the commands print: data on stdout, everything else on stderr.

Tables are for people; ``--json`` prints one JSON document instead, ``--quiet`` the bare result. Progress
bars go to stderr and switch themselves off when it is not a terminal.

Everything but the text that a model generates leaves through here or through ``rwkv_rev.cli``, escaped: names in files
hold escape sequences (:mod:`rwkv_rev.printable`). A standard output that takes no more is told of here, where it is
known to be the one that failed.
"""

import codecs
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rwkv_rev.errors import OutputError
from rwkv_rev.json_text import json_text
from rwkv_rev.printable import MOST_LINE, printable, shortened
from rwkv_rev.tables import WIDTH, folded, wrapped


def write_anything() -> None:
    """Let stdout and stderr take every text: what their encoding does not have is escaped, as Python writes it.

    A file name that is no text goes out as the bytes that it is.
    """
    codecs.register_error("rwkv-rev", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="rwkv-rev")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    if all(0xDC80 <= ord(c) <= 0xDCFF for c in error.object[error.start : error.end]):
        return codecs.lookup_error("surrogateescape")(error)
    return codecs.lookup_error("backslashreplace")(error)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], keys: int = 1) -> None:
    """Print a table on stdout; columns whose name starts with ``>`` are right-aligned numbers.

    Columns that do not fit beside the others follow in a further table, below, with the first ``keys`` repeated.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = _console()
    names = [column.removeprefix(">") for column in columns]
    cells = [["" if cell is None else shortened(cell, MOST_LINE) for cell in row] for row in rows]
    widths = [max(map(len, (name, *column))) + 3 for name, *column in zip(names, *cells, strict=True)]
    for number, kept in enumerate(
        folded(widths, console.width + 1, keys)
    ):  # 3 between two columns, 1 at each end
        table = Table(title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        table.title = printable(title, keep="\n") if number == 0 else None
        for column in kept:
            table.add_column(names[column], justify="right" if columns[column].startswith(">") else "left")
        for row in cells:
            table.add_row(*(row[column] for column in kept))
        with _standard_output():
            console.print(table)


def print_fields(title: str, fields: dict[str, object]) -> None:
    """Print names and values, one pair a line, under a title."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = printable(title, keep="\n"), "left", "bold"
    for name, value in fields.items():
        table.add_row(name, "" if value is None else shortened(value, MOST_LINE))
    with _standard_output():
        _console().print(table)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; numbers that are not finite become ``null``."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json_text(value, indent=2, ensure_ascii=ascii_only, default=str)
    if not text.replace(
        "\n", ""
    ).isprintable():  # JSON itself escapes the control characters below the space only
        text = re.sub(r"[^\n]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text)
    write(text + "\n")


def print_text(text: str) -> None:
    """Print text of ours on stdout, of as many lines as it has."""
    write(printable(text, keep="\n") + "\n")


def print_prose(text: str) -> None:
    """Print sentences of ours on stdout, wrapped, and an empty line behind them."""
    print_text("\n".join([*wrapped(text), ""]))


def print_path(path: object) -> None:
    """Print a path on stdout: as it is, for a program that reads it, or as a terminal may have it."""
    write((printable(str(path)) if sys.stdout.isatty() else str(path)) + "\n")


def write(text: str) -> None:
    """Write to stdout as it is, at once: what a model generates, and what was made printable before.

    Raises:
        OutputError: where stdout takes no more. BrokenPipeError: where nobody reads it.
    """
    with _standard_output():
        sys.stdout.write(text)


def note(text: str) -> None:
    """Tell people something on stderr: in one line for programs, which a terminal has folded between words."""
    line = shortened(text, MOST_LINE)
    columns = min(WIDTH, shutil.get_terminal_size().columns) if sys.stderr.isatty() else len(line)
    sys.stderr.write("\n".join(wrapped(line, columns) if len(line) > columns else [line]) + "\n")


def width() -> int:
    """Columns that a line may have."""
    return int(_console().width)


def human_bytes(count: float) -> str:
    """``1.5 MB`` and the like, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def _standard_output() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"cannot write to the standard output: {error.strerror}") from None


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
