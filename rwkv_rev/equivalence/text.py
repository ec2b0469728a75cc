"""The text a verification reads: real English by default, the same everywhere one version of Python runs.

The default is the language reference that ships inside Python (``pydoc_data.topics``, 0.5 MB), so nothing
is downloaded and nothing is shipped. Models are compared with each other on it, not with other people's
figures.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rev.errors import DataError
from rwkv_rev.folders.safe_input import refuse_special
from rwkv_rev.loading import load_tokenizer

# No tokenizer in use makes tokens longer than this on average over a text.
_CHARACTERS_PER_TOKEN = 16


def default_text() -> str:
    """Python's own language reference, topics in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: missing, unreadable or not UTF-8.
    """
    refuse_special(path, DataError)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); give a plain text file") from None


def encode_text(text: str, directory: Path, *, vocabulary: int, tokens: int) -> Tensor:
    """The first ``tokens`` ids ``[T]`` of the text, by the tokenizer of a converted directory.

    A directory without a tokenizer is read byte by byte when its vocabulary is 256. Fewer ids come back
    when the text is shorter.

    Raises:
        DataError: no tokenizer, an empty text, or ids the model does not have.
    """

    def encode(part: str) -> list[int]:
        return _encode(part, directory, vocabulary)

    return encode_by(
        encode, text, vocabulary=vocabulary, tokens=tokens, named=f"the tokenizer of {directory}"
    )


def encode_by(
    encode: Callable[[str], list[int]], text: str, *, vocabulary: int, tokens: int, named: str
) -> Tensor:
    """As :func:`encode_text` by any tokenizer, which is ``named`` so for people.

    Raises:
        DataError: an empty text, or ids the model does not have.
    """
    head = text[: tokens * _CHARACTERS_PER_TOKEN]
    ids = encode(head)
    if len(ids) < tokens and len(head) < len(text):
        ids = encode(text)
    ids = ids[:tokens]
    if not ids:
        raise DataError("the text is empty: give --text a file with at least one token")
    if max(ids) >= vocabulary:
        raise DataError(f"{named} gives id {max(ids)}, the model knows ids below {vocabulary}")
    return torch.tensor(ids, dtype=torch.long)


def _encode(text: str, directory: Path, vocabulary: int) -> list[int]:
    if not (directory / "tokenizer_config.json").is_file() and not (directory / "tokenizer.json").is_file():
        if vocabulary == 256:
            return list(text.encode("utf-8"))
        raise DataError(
            f"{directory} has no tokenizer for its {vocabulary} tokens: save it there, or convert with --tokenizer"
        )
    return list(load_tokenizer(directory).encode(text, add_special_tokens=False))
