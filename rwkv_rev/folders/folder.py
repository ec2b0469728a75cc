"""What a folder of a converted model is known by. Imports nothing heavy: commands look here before anything else."""

import stat
from pathlib import Path
from shlex import quote

from rwkv_rev.arguments import expanded
from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.folders.safe_input import read_object, refuse_special, refuse_special_inside
from rwkv_rev.folders.source import parse_source

MODEL_TYPE = "rwkv_rev"
"""``model_type`` in the configuration of every model that this package converted."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "20B_tokenizer.json"),
    *("rwkv_vocab_v20230424.txt", "chat_template.jinja", "chat_template.json"),
)
"""Files that a model made from another takes over as they are; everything else is written anew or stays behind."""
RECORD_NAME = "conversion.json"
TOKENIZER_NAMES = ("world", "byte", "neox", "none")
"""What ``tokenizer=`` takes beside paths and ids of the Hub."""


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
    directory = Path(expanded(directory))
    refuse_special(directory)
    if not directory.is_dir():
        raise SourceError(f"{directory} is not a folder; {_how_to_make_one(str(directory))}")
    refuse_special_inside(directory)
    if not is_converted(directory):
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{directory} is an adapter alone: generate and eval take it as --adapter {quote(str(directory))} "
                "beside the model that it was trained on, and rwkv-rev merge puts it into that model's weights"
            )
        raise CheckpointError(
            f"{directory} is not a converted model (config.json with model_type {MODEL_TYPE}); convert it first: "
            f"rwkv-rev convert {quote(str(directory))}"
        )


def _how_to_make_one(name: str) -> str:
    try:
        source = parse_source(name)
    except SourceError:
        return "make a model with: rwkv-rev convert SOURCE"
    of = "if the Hub's is meant, make a model of it" if source.kind == "hub" else "make a model of it"
    return f"{of}: rwkv-rev convert {quote(name)}"


def tokenizer_files(directory: str | Path) -> list[Path]:
    """Those of :data:`TOKENIZER_FILES` that lie in a model folder.

    Raises:
        CheckpointError: as :func:`refuse_links`.
    """
    refuse_links(directory)
    return [path for name in TOKENIZER_FILES if (path := Path(directory) / name).is_file()]


def refuse_links(directory: str | Path) -> None:
    """Refuse a model folder with links to files elsewhere: a copy would end up in another model, and on the Hub.

    Links are followed where the Hub's client makes them: from ``models--*/snapshots/COMMIT`` into ``blobs`` beside it.

    Raises:
        CheckpointError: naming the link, or what is no file at all (a named pipe, say).
    """
    for name in (*TOKENIZER_FILES, RECORD_NAME, "generation_config.json"):
        path = Path(directory) / name
        try:
            found = path.lstat().st_mode
        except OSError:
            continue
        if stat.S_ISLNK(found):
            target = path.resolve()
            if target.parent != _blobs(path) or not target.is_file():
                raise CheckpointError(
                    f"{path} is a link to a file outside the model; put a copy of the file there instead"
                )
        elif not stat.S_ISREG(found):
            raise CheckpointError(f"{path} is not a regular file; remove it")


def _blobs(path: Path) -> Path | None:
    """Where the links of a snapshot in the Hub client's cache lead to; None for any other folder."""
    snapshots = path.parent.resolve().parent
    cached = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent / "blobs" if cached else None
