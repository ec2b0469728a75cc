"""Text from files and arguments as a terminal may have it: escaped, and shortened.

A name in a file can hold anything: escape sequences that clear the screen, line ends that fake a second message,
right-to-left marks that turn a line around, two megabytes of it. What goes to a terminal passes :func:`printable`,
in :mod:`rwkv_rev.cli`; a name that is quoted in a sentence passes :func:`shortened`.
"""

MOST_QUOTED = 120
"""Characters of a name or value inside a sentence."""
MOST_LINE = 4000
"""Characters of a message: what was not shortened when it was quoted is, when it is printed."""


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with every character escaped that is neither printable nor in ``keep``.

    Escaped are control and format characters (C0, C1, bidirectional marks, zero-width ones), separators other than
    the space, surrogates and code points without a meaning, all as Python writes them (``\\x1b``, ``\\u202e``).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: names of files may be other bytes, and JSON may write half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(value: object, most: int = MOST_QUOTED) -> str:
    """The text of ``value`` in one line of about ``most`` characters: its ends, and how much lies between."""
    text = str(value)
    if len(text) > most:
        ends = printable(text[: most * 2 // 3]), printable(text[-most // 4 :])
        return f"{ends[0]}...({len(text):,} characters)...{ends[1]}"
    return printable(text)


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2,000 files``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def one_message(error: BaseException | str) -> str:
    """An error or warning as one line, whatever names stand in it."""
    text = str(error)
    if not isinstance(error, str | Warning) and not text:
        text = type(error).__name__
    return shortened(text, MOST_LINE)
