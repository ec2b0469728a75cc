"""Upload a model folder to the Hub. It was written without the paths of this machine (:mod:`.redaction`)."""

import json
import shlex
from pathlib import Path, PurePath

from rwkv_rev.arguments import checked
from rwkv_rev.errors import OutputError
from rwkv_rev.folders.folder import RECORD_NAME, refuse_no_model
from rwkv_rev.folders.redaction import public
from rwkv_rev.printable import shortened

NOT_UPLOADED = ("training/runs",)  # TensorBoard's event files hold the paths of this machine


def refuse_unpublishable(repository: str) -> None:
    """Raise OutputError for what can be known before there is anything to upload: a wrong name, no token, offline."""
    from huggingface_hub import constants, get_token

    _refuse_no_name(repository)
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"nothing can be uploaded to {repository}: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise OutputError(
            f"nothing can be uploaded to {repository}: not signed in; use hf auth login or set HF_TOKEN"
        )


def _refuse_no_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.endswith("\n"):  # which older versions of huggingface-hub let through
            raise HFValidationError("a line break is no part of a name")
    except HFValidationError as error:
        raise OutputError(
            f"{shortened(repr(repository))} is no name of a repository, such as owner/name: "
            f"{shortened(' '.join(str(error).split()), 300)}"
        ) from error


@checked
def publish(directory: str | Path, repository: str, *, kind: str = "converted") -> str:
    """Create ``repository`` on the Hub if needed and upload the folder in one commit; return its address.

    Hidden files, links and TensorBoard's files stay here.

    Args:
        directory: a model folder.
        repository: ``owner/name``.
        kind: how the model was made, for the commit's message.

    Raises:
        SourceError, CheckpointError: if ``directory`` is no model folder.
        OutputError: for what is no name of a repository, and if the Hub refuses (not signed in, no right to write) or
            cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    _refuse_no_name(repository)
    refuse_no_model(directory)
    folder = Path(directory)
    operations = [
        CommitOperationAdd(
            path.relative_to(folder).as_posix(),
            _record(path) if path.name == RECORD_NAME else str(path),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and _is_uploaded(path.relative_to(folder))
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
            f"the Hub did not take {repository}: {reason}; the folder {directory} is complete: to upload it "
            f"later: rwkv-rev publish {shlex.quote(str(directory))} {repository} (hf auth login signs in)"
        ) from error
    return str(address)


def _is_uploaded(path: PurePath) -> bool:
    return not path.as_posix().startswith(NOT_UPLOADED) and not any(
        part.startswith(".") for part in path.parts
    )


def _record(path: Path) -> bytes:
    """As it is written today; older folders say where their source lay."""
    return (json.dumps(public(json.loads(path.read_text("utf-8"))), indent=2) + "\n").encode()
