"""What a command names is looked at before anything heavy is imported: a wrong path should not cost seconds."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_rev.converters.source import parse_source
from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.training.documents import find_sources


def refuse_no_model(directory: str | Path) -> None:
    """Refuse what is no folder of a converted model; what is in it is looked at later.

    Raises:
        SourceError, CheckpointError: in the words of :class:`rwkv_rev.converters.converted.ConvertedModel`.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise SourceError(f"{directory} is not a folder; make a model with: rwkv-rev convert SOURCE")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a converted model (config.json with model_type rwkv_rev); convert it first: "
            "rwkv-rev convert SOURCE"
        )


def refuse_no_source(source: str, *, file: str | None = None, revision: str | None = None) -> None:
    """Refuse a source that does not exist on this disk. Raises SourceError."""
    parse_source(source, file=file, revision=revision)


def refuse_no_data(data: Sequence[str]) -> None:
    """Refuse data that is not there. Raises DataError."""
    find_sources(data)
