"""What a folder of a converted model is known by. Imports nothing heavy: commands look here before anything else."""

import json
from pathlib import Path
from typing import Any

from rwkv_rev.errors import CheckpointError, SourceError

MODEL_TYPE = "rwkv_rev"
"""``model_type`` in the configuration of every model that this package converted."""


def is_converted(directory: str | Path) -> bool:
    """Whether a folder holds a model that this package converted."""
    return read_json(Path(directory) / "config.json").get("model_type") == MODEL_TYPE


def refuse_no_model(directory: str | Path) -> None:
    """Refuse what is no folder of a converted model.

    Raises:
        SourceError: if there is no such folder.
        CheckpointError: if it holds something else.
    """
    if not Path(directory).is_dir():
        raise SourceError(f"{directory} is not a folder; make a model with: rwkv-rev convert SOURCE")
    if not is_converted(directory):
        raise CheckpointError(
            f"{directory} is not a converted model (config.json with model_type {MODEL_TYPE}); convert it first: "
            "rwkv-rev convert SOURCE"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
