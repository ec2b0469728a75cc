"""Upload a converted folder to the Hub, without the paths of this machine."""

import json
from pathlib import Path

from rwkv_rev.converters.converted import RECORD_NAME
from rwkv_rev.converters.source import Source, parse_source
from rwkv_rev.errors import OutputError, SourceError

NOT_UPLOADED = ("training/runs",)  # TensorBoard's event files hold the paths of this machine


def refuse_unpublishable(repository: str) -> None:
    """Raise OutputError for what can be known before there is anything to upload: a wrong name, no token, offline."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(
            f"{repository!r} is no name of a repository: {' '.join(str(error).split())}"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"nothing can be uploaded to {repository}: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise OutputError(
            f"nothing can be uploaded to {repository}: not signed in; use hf auth login or set HF_TOKEN"
        )


def publish(directory: str | Path, repository: str, *, kind: str = "converted") -> str:
    """Create ``repository`` on the Hub if needed and upload the folder in one commit; return its address.

    ``conversion.json`` is uploaded with the file name only where the source was a local path. ``kind`` is how the
    model was made, for the commit's message.

    Raises:
        OutputError: if the Hub refuses (not signed in, no right to write) or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    folder = Path(directory)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).as_posix().startswith(NOT_UPLOADED)
    )
    operations = [
        CommitOperationAdd(
            path.relative_to(folder).as_posix(),
            _public_record(path) if path.name == RECORD_NAME else str(path),
        )
        for path in files
    ]
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Upload a model {kind} by rwkv-rev")
    except (
        *(HTTPError, HFValidationError, OfflineModeIsEnabled, OSError),
        *(RuntimeError, ValueError),  # of a large file, and of metadata, that is refused
    ) as error:
        causes = [error] if error.__cause__ is None else [error, error.__cause__]
        reason = " ".join(" ".join(str(cause) for cause in causes).split())
        raise OutputError(
            f"the Hub did not take {repository}: {reason}; the folder {directory} is complete: sign in with "
            f"hf auth login if need be, then hf upload {repository} {directory}"
        ) from error
    return str(address)


def _public_record(path: Path) -> bytes:
    record = json.loads(path.read_text(encoding="utf-8"))
    if _is_local(record["source"]):
        record["source"] = Path(record["source"]).name
    return (json.dumps(record, indent=2) + "\n").encode()


def _is_local(text: str) -> bool:
    try:
        source: Source = parse_source(text)
    except SourceError:
        return True
    return source.kind in ("file", "directory")
