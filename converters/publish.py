"""Upload a converted folder to the Hub, without the paths of this machine."""

import json
from pathlib import Path

from rwkv_rev.converters.converted import RECORD_NAME
from rwkv_rev.converters.source import Source, parse_source
from rwkv_rev.errors import OutputError, SourceError


def publish(directory: str | Path, repository: str) -> str:
    """Create ``repository`` on the Hub if needed and upload the folder in one commit; return its address.

    ``conversion.json`` is uploaded with the file name only where the source was a local path.

    Raises:
        OutputError: if the Hub refuses (not signed in, no right to write, offline).
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    folder = Path(directory)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
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
        api.create_commit(repository, operations, commit_message="Upload a model converted by rwkv-rev")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(
            f"the Hub did not take {repository}: {reason}; the folder {directory} is complete, "
            "sign in with: hf auth login"
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
