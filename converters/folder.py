"""What a folder of a converted model is known by. Imports nothing heavy: commands look here before anything else."""

from pathlib import Path

from rwkv_rev.converters.safe_input import read_object, refuse_special, refuse_special_inside
from rwkv_rev.errors import CheckpointError, SourceError

MODEL_TYPE = "rwkv_rev"
"""``model_type`` in the configuration of every model that this package converted."""


def is_converted(directory: str | Path) -> bool:
    """Whether a folder holds a model that this package converted.

    Raises:
        SourceError, CheckpointError: if its config.json cannot be read.
    """
    return read_object(Path(directory) / "config.json").get("model_type") == MODEL_TYPE


def refuse_no_model(directory: str | Path) -> None:
    """Refuse what is no folder of a converted model, and what a loader must not open.

    Raises:
        SourceError: if there is no such folder, or a file of it is a FIFO, a socket or a device.
        CheckpointError: if it holds something else, or its config.json is damaged.
    """
    directory = Path(directory)
    refuse_special(directory)
    if not directory.is_dir():
        raise SourceError(f"{directory} is not a folder; make a model with: rwkv-rev convert SOURCE")
    refuse_special_inside(directory)
    if not is_converted(directory):
        raise CheckpointError(
            f"{directory} is not a converted model (config.json with model_type {MODEL_TYPE}); convert it first: "
            "rwkv-rev convert SOURCE"
        )
