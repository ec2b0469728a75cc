"""Inputs are looked at before they are read: what never ends, never answers or is no use is refused by name.

A file of a model folder may be a FIFO that nobody writes to, a device that gives zeros for ever, or a text that is
nested or long beyond any use. :func:`refuse_special` stands before everything that opens a file whose name people
or other files give, :func:`read_object` reads every JSON text. Imports nothing heavy.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any

from rwkv_rev.errors import CheckpointError, RwkvRevError, SourceError
from rwkv_rev.printable import shortened

MOST_JSON_BYTES = 64 << 20
"""The index of a model of a million tensors is as large."""
READ_BY_LOADERS = (".json", ".txt", ".jinja", ".model", ".pth", ".pt", ".bin", ".safetensors")
"""Suffixes of what tokenizers and models are loaded from, by us or by transformers."""
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def refuse_special(path: Path, error: type[RwkvRevError] = SourceError) -> None:
    """Refuse what is neither a regular file nor a folder, links followed; what is not there passes.

    Raises:
        RwkvRevError: ``error``, naming the kind, or why the system does not say (too long a name, no permission).
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # absent: whoever opens it says so
        return
    except OSError as failure:
        if failure.errno == errno.EINVAL:  # Windows, for a glob
            return
        raise error(f"{path} cannot be looked at: {failure.strerror or failure}") from failure
    for holds, kind in _KINDS:
        if holds(mode):
            raise error(f"{path} is {kind}, not a regular file; give a file")


def refuse_special_inside(directory: Path) -> None:
    """:func:`refuse_special` of everything in a folder that a loader may open by itself.

    Raises:
        SourceError: naming the first.
    """
    try:
        names = sorted(path for path in directory.iterdir() if path.name.endswith(READ_BY_LOADERS))
    except OSError:
        return
    for path in names:
        refuse_special(path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        SourceError, CheckpointError: as :func:`read_json`, and if it holds anything but one object.
    """
    refuse_special(path)
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds {_kind(value)}, not a JSON object")
    return value


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        SourceError: if it is no regular file or cannot be read.
        CheckpointError: if it is no JSON, or too long or nested too deep to be of use.
    """
    refuse_special(path)
    try:
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise CheckpointError(f"{path} is no configuration: {size / 1e6:,.0f} MB of JSON")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: its JSON is nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: no valid JSON ({shortened(error)})") from None


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )
