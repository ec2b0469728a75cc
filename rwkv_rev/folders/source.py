"""The one grammar by which every command and function names a checkpoint.

    SOURCE := owner/name                    a repository of the Hugging Face Hub
            | path/to/file                  a .pth, .bin or .safetensors file on disk
            | path/to/directory             a directory in Hugging Face layout, or holding .pth files
            | bundled:rwkv-4 | bundled:rwkv-5.2 | bundled:rwkv-6 | bundled:rwkv-7
                                            the checkpoints that ship with this package

A path that exists wins over a Hub id of the same spelling. Where a repository or directory holds several
checkpoints, ``file`` (a name or a glob) chooses one; ``revision`` (branch, tag or commit) goes with Hub ids
only.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rwkv_rev.bundled import BUNDLED, bundled_path
from rwkv_rev.errors import SourceError
from rwkv_rev.folders.safe_input import refuse_special
from rwkv_rev.printable import shortened

BUNDLED_PREFIX = "bundled:"
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_GRAMMAR = "a Hub id (owner/name), a file, a directory, or " + " or ".join(
    BUNDLED_PREFIX + n for n in BUNDLED
)

Kind = Literal["hub", "file", "directory", "bundled"]


@dataclass(frozen=True)
class Source:
    """A parsed ``SOURCE``: where a checkpoint comes from. ``str()`` gives the grammar back.

    Attributes:
        kind: one of ``hub``, ``file``, ``directory``, ``bundled``.
        location: the Hub id, the path as it was given, or the bundled name without its prefix.
        file: name or glob that chooses one checkpoint of a repository or directory.
        revision: branch, tag or commit of a Hub repository.
    """

    kind: Kind
    location: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.kind == "bundled":
            return BUNDLED_PREFIX + self.location
        if self.kind != "hub" and (
            _HUB_ID.fullmatch(self.location) or self.location.startswith(BUNDLED_PREFIX)
        ):
            return f"./{self.location}"
        return self.location

    @property
    def path(self) -> Path:
        """Where the file or directory lies on disk.

        Raises:
            ValueError: for a Hub repository, which has to be resolved first.
        """
        if self.kind == "hub":
            raise ValueError(f"{self} lies on the Hub; resolve it first")
        return bundled_path(self.location) if self.kind == "bundled" else Path(self.location)

    def absolute(self) -> "Source":
        """The same source, independent of the working directory."""
        if self.kind in ("file", "directory"):
            return replace(self, location=str(Path(self.location).absolute()))
        return self


def parse_source(text: str, *, file: str | None = None, revision: str | None = None) -> Source:
    """Parse a ``SOURCE``; looks at the local disk, never at the network.

    Raises:
        SourceError: if the text is no source, the path does not exist, or ``file`` or ``revision`` do not go
            with it.
    """
    source = Source(_kind(text), _location(text), file or None, revision or None)
    if source.revision and source.kind != "hub":
        raise SourceError(
            f"--revision {source.revision} goes with a Hub id only; {text} is a local checkpoint"
        )
    if source.file and source.kind in ("file", "bundled"):
        raise SourceError(
            f"--file {source.file} chooses from a repository or directory; {text} is one checkpoint"
        )
    return source


def _location(text: str) -> str:
    if text.startswith(BUNDLED_PREFIX):
        return text.removeprefix(BUNDLED_PREFIX)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _kind(text: str) -> Kind:
    if not text or "\0" in text or "\n" in text:
        raise SourceError(f"{shortened(repr(text))} is no source; give {_GRAMMAR}")
    if text.startswith(BUNDLED_PREFIX):
        if _location(text) not in BUNDLED:
            known = ", ".join(BUNDLED_PREFIX + name for name in BUNDLED)
            raise SourceError(f"no checkpoint {text} is bundled; there are {known}")
        return "bundled"
    path = Path(_location(text))
    try:
        if path.is_dir():
            return "directory"
        if path.is_file():
            return "file"
        refuse_special(path)
    except OSError as error:
        raise SourceError(f"{text} cannot be looked at: {error.strerror}") from error
    if re.match(r"\w+://", text):
        raise SourceError(
            f"{text} is a URL; give the Hub id alone (owner/name), with --file for one of its files"
        )
    if _HUB_ID.fullmatch(text) and not text.endswith(WEIGHT_SUFFIXES):
        return "hub"
    if path.suffix in WEIGHT_SUFFIXES or "/" in text:
        raise SourceError(f"{text} does not exist; a source is {_GRAMMAR}")
    raise SourceError(f"{text} is neither a path that exists nor a Hub id; a source is {_GRAMMAR}")
