"""Where the sources of converted models lie, remembered on this machine and never in a model's folder.

One file for each source in ``sources`` beside the cache of tokens, named by the checksums of its weights: it is found
again whatever becomes of the model's folder.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkv_rev.folders.user_cache import user_cache


def remember(record: dict[str, Any], source: Path) -> None:
    """Keep where the files lie whose checksums are in ``record``. Nothing depends on it: a failure is none."""
    place = _place(record)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(str(source.absolute()), "utf-8", "surrogateescape")


def recall(record: dict[str, Any]) -> Path | None:
    """Where they lie, if that is known and something is there."""
    with suppress(OSError):
        source = Path(_place(record).read_text("utf-8", "surrogateescape"))
        return source if record.get("sha256") and source.exists() else None
    return None


def _place(record: dict[str, Any]) -> Path:
    checksums = json.dumps(record.get("sha256"), sort_keys=True).encode()
    return user_cache("sources") / hashlib.sha256(checksums).hexdigest()[:32]
