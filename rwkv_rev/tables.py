"""Tables that read as Markdown and as plain text, and fit :data:`WIDTH` columns."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from rwkv_rev.printable import printable

WIDTH = 80
_width: ContextVar[int] = ContextVar("rwkv_rev_width", default=WIDTH)


@contextmanager
def of_width(width: int) -> Iterator[None]:
    """Inside, tables and prose fit so many columns instead of :data:`WIDTH`."""
    token = _width.set(width)
    try:
        yield
    finally:
        _width.reset(token)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines of a table; the first column to the left, all others to the right.

    Columns that do not fit beside the others follow in a further table, below, with the first one repeated. Where
    even one column does not fit beside the first, rows are written as prose.
    """
    width = width or _width.get()
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]
    lines: list[str] = []
    if widths[0] + max(widths[1:], default=0) + 7 > width:
        for name, *cells in rows:
            facts = (f"{column} {cell}".strip() for column, cell in zip(header[1:], cells, strict=True))
            lines += wrapped(f"{name or header[0]}: {'; '.join(facts)}", width)
        return wrapped(header[0], width) * bool(header[0]) + lines
    for columns in folded([size + 3 for size in widths], width - 1):
        lines += [""] if lines else []
        lines += _table(
            [[line[i] for i in columns] for line in (header, *rows)], [widths[i] for i in columns]
        )
    return lines


def folded(widths: Sequence[int], width: int, keys: int = 1) -> list[list[int]]:
    """Columns by table: as many as fit side by side, the first ``keys`` in each."""
    first = list(range(min(keys, len(widths))))
    tables = [list(first)]
    for column in range(len(first), len(widths)):
        taken = sum(widths[i] for i in tables[-1])
        if len(tables[-1]) > len(first) and taken + widths[column] > width:
            tables.append(list(first))
        tables[-1].append(column)
    return tables


def wrapped(text: str, width: int | None = None) -> list[str]:
    """Lines of prose; words longer than a line, such as paths, stay whole, and so does ``53 %``."""
    tied = printable(text).replace(" %", "\xa0%")  # no other is left: it is not printable
    lines = textwrap.wrap(tied, width or _width.get(), break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines] or [""]


def _table(cells: list[list[str]], widths: list[int]) -> list[str]:
    def line(row: Sequence[str]) -> str:
        first, *others = row
        padded = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return [line(cells[0]), rule, *map(line, cells[1:])]
