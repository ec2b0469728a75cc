"""What files say of tokens in words that the ``tokenizers`` library has none for.

It prints such a word on stdout as it is, whatever terminal reads that, and goes on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.printable import shortened

_KNOWN = {name for name in dir(AddedToken) if not name.startswith("_")} | {"id", "__type"}


def refuse_unknown_fields(directory: Path) -> None:
    """Raise ValueError for the first field of a token, in the files of a tokenizer, that means nothing."""
    for file, tokens in (
        ("tokenizer_config.json", _of_settings),
        ("special_tokens_map.json", _of_map),
        ("tokenizer.json", lambda read: _of_map({"added_tokens": read.get("added_tokens")})),
    ):
        for token in tokens(read_object(directory / file)):
            if strange := [name for name in token if name not in _KNOWN]:
                raise ValueError(
                    f"{file}: a token has the field {shortened(repr(strange[0]))}, which means nothing"
                )


def _of_settings(read: Any) -> Iterator[dict[str, Any]]:
    """Of the decoder, and wherever a type says that it is one."""
    if isinstance(read, dict):
        yield from _of_map(read.get("added_tokens_decoder"))
        if read.get("__type") == "AddedToken":
            yield read
    for value in read.values() if isinstance(read, dict) else read if isinstance(read, list) else ():
        yield from _of_settings(value)


def _of_map(read: Any) -> Iterator[dict[str, Any]]:
    """Every object among the values, and in lists of them."""
    for value in read.values() if isinstance(read, dict) else ():
        yield from (
            token for token in (value if isinstance(value, list) else [value]) if isinstance(token, dict)
        )
