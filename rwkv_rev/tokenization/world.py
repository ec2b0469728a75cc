"""The tokenizer of RWKV "world" models: at each byte, take the longest vocabulary entry that matches.

Source: ``rwkv_vocab_v20230424.txt`` and ``TRIE_TOKENIZER`` of the ``rwkv`` package. Ids 1 to 65529 are byte
strings, id 0 is the end of text, 65530 to 65535 are unused rows of the model. Greedy longest match needs one
pass; the Rust trie of ``pyrwkv_tokenizer`` does it for valid UTF-8 and a short Python one, with the same ids,
for everything else (and where the wheel does not import). Decoding uses our own table of byte strings: the
Rust one aborts on incomplete UTF-8.

The tokenizer published as remote code with some models strips spaces and prepends id 0; this one does
neither.
"""

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.printable import is_utf8
from rwkv_rev.tokenization.byte_level import ByteLevelTokenizer

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
END_OF_TEXT = 0
END_OF_TEXT_TOKEN = "<|endoftext|>"


def find_world_vocabulary() -> Path:
    """The vocabulary file of an installed package, found without importing it.

    Raises:
        SourceError: when neither package that carries it is installed.
    """
    for package in ("pyrwkv_tokenizer", "rwkv"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / VOCABULARY_FILE).is_file():
                return path
    raise SourceError(
        f"{VOCABULARY_FILE} not found: pip install pyrwkv-tokenizer (or rwkv), or give it: --tokenizer PATH"
    )


def read_world_vocabulary(path: Path) -> dict[int, bytes]:
    """Read ``id literal length`` lines, the literal a Python ``str`` or ``bytes``, the length in bytes.

    Returns:
        id -> byte string.

    Raises:
        SourceError: when the file cannot be read.
        CheckpointError: when a line is malformed, an id or token appears twice, or a byte has no token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the world vocabulary {path}: {error}") from error
    try:
        return dict(_entries(text))
    except ValueError as error:
        raise CheckpointError(f"{path}{error}") from error


@functools.lru_cache(maxsize=1)  # takes a third of a second, and a saved model has the same
def _entries(text: str) -> dict[int, bytes]:
    """Entries of a vocabulary's text; ``ValueError`` with what is wrong, to be said of its file."""
    table: dict[int, bytes] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            index, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            # The evaluation costs most of the loading time, and few lines need it.
            value = (
                literal[1:-1] if literal[0] in "'\"" and "\\" not in literal else ast.literal_eval(literal)
            )
            piece = value.encode() if isinstance(value, str) else bytes(value)
            if len(piece) != int(length) or not piece or int(index) <= END_OF_TEXT or int(index) in table:
                raise ValueError(line)
            table[int(index)] = piece
        except (ValueError, SyntaxError, TypeError, IndexError) as error:
            raise ValueError(f", line {number}: not an entry of a world vocabulary") from error
    pieces = set(table.values())
    if len(pieces) != len(table) or not all(bytes([byte]) in pieces for byte in range(256)):
        raise ValueError(" is not a world vocabulary: entries are missing or appear twice")
    return table


class GreedyTrie:
    """Longest match over bytes, in Python: the lengths that can follow the next two bytes, longest first."""

    def __init__(self, table: Mapping[int, bytes]) -> None:
        self.ids = {piece: i for i, piece in table.items()}
        lengths: dict[bytes, set[int]] = {}
        for piece in self.ids:
            lengths.setdefault(piece[:2], set()).add(len(piece))
        self.lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def encode(self, data: bytes) -> list[int]:
        """Ids of a byte string."""
        result, position = [], 0
        while position < len(data):
            for length in self.lengths.get(data[position : position + 2], ()):
                # Near the end the slice is shorter than `length`; a token it is then the longest possible.
                piece = data[position : position + length]
                if piece in self.ids:
                    break
            else:
                piece = data[position : position + 1]
            result.append(self.ids[piece])
            position += len(piece)
        return result


_rust: dict[bytes, tuple[Any, Mapping[int, bytes] | None]] = {}
"""The last trie, by its file, and the table that it was found to agree with, which takes as long as reading it: whoever
loads the same vocabulary again, from wherever, need do neither."""


def load_rust_trie(path: Path, table: Mapping[int, bytes]) -> Any | None:
    """The Rust trie of the same file; None where its wheel does not import or reads it differently."""
    if not path.is_file():
        return None
    try:
        from pyrwkv_tokenizer import WorldTokenizer

        content = path.read_bytes()
        trie, agreed = _rust.get(content, (None, None))
        if trie is None:
            trie = WorldTokenizer(str(path))
            _rust.clear()
            _rust[content] = trie, None
        elif agreed == table:
            return trie
    except (ImportError, OSError, ValueError):
        return None
    ours = {piece.decode("utf-8", "surrogateescape"): i for i, piece in table.items()}
    others = ours.items() - trie.get_vocab().items()  # which holds one placeholder for all that is no UTF-8
    if any(is_utf8(piece) for piece, _ in others):
        return None
    _rust[content] = trie, dict(table)
    return trie


class WorldTrie:
    """The Rust trie where it can, the Python one where it must."""

    def __init__(self, path: Path, table: Mapping[int, bytes]) -> None:
        self.path, self.table = path, table
        self.rust = load_rust_trie(path, table)

    @functools.cached_property
    def python(self) -> GreedyTrie:
        """Made when first needed."""
        return GreedyTrie(self.table)

    def encode(self, data: bytes) -> list[int]:
        """Ids of a byte string."""
        if self.rust is not None:
            try:
                return self.rust.encode(data.decode())
            except UnicodeDecodeError:
                pass
        return self.python.encode(data)

    def __reduce__(self) -> tuple[Any, ...]:
        # The Rust object cannot be pickled (worker processes, fingerprints of datasets); it is read again.
        return WorldTrie, (self.path, self.table)


class RwkvWorldTokenizer(ByteLevelTokenizer):
    """Exact greedy trie tokenizer of world models (vocabulary 65536).

    Id 0 ends a text and pads; nothing is prepended, stripped or normalised. Ids that are no token (65530 to
    65535) decode to U+FFFD. The vocabulary file is saved with the model and read back from there.

    Args:
        vocab_file: vocabulary like ``rwkv_vocab_v20230424.txt``; that of the installed package when None.
        split_special_tokens: treat the text of special tokens as text (default).

    Raises:
        SourceError: no vocabulary file.
        CheckpointError: a malformed one.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012 (declared so by the base class)

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        bos_token: str = END_OF_TEXT_TOKEN,
        eos_token: str = END_OF_TEXT_TOKEN,
        pad_token: str = END_OF_TEXT_TOKEN,
        split_special_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        path = Path(vocab_file) if vocab_file else find_world_vocabulary()
        self.token_bytes = read_world_vocabulary(path)
        self.token_ids = {END_OF_TEXT_TOKEN: END_OF_TEXT}
        self.token_ids.update((p.decode("utf-8", "surrogateescape"), i) for i, p in self.token_bytes.items())
        self.trie = WorldTrie(path, self.token_bytes)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of a byte string by longest match."""
        return self.trie.encode(data)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary file, from memory: the file it was read from may be gone."""
        path = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + VOCABULARY_FILE)
        lines = []
        for i, piece in self.token_bytes.items():
            try:
                literal = repr(piece.decode())
            except UnicodeDecodeError:
                literal = repr(piece)
            lines.append(f"{i} {literal} {len(piece)}\n")
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        return (str(path),)
