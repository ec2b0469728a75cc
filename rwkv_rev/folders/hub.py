"""Find the files of a source: on disk, or on the Hugging Face Hub through its own client.

The client does all network access: cache, resumed downloads, tokens (``HF_TOKEN`` or ``hf auth login``),
mirrors (``HF_ENDPOINT``) and offline mode (``HF_HUB_OFFLINE=1``) work as everywhere else. Without a
connection a repository that is in the cache is used as it is there.

Which weights: ``--file`` if given (a name or a glob; exactly one must match), else the Hugging Face weights
(``model.safetensors``, its index, ``pytorch_model.bin``, its index; the first there is), else the only
``.pth``. Of the rest only configuration and tokenizer files are fetched, never code.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CachedRevisionInfo, HfApi, constants, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # base of the client's connection errors, whichever HTTP library it uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from rwkv_rev.errors import SourceError
from rwkv_rev.folders.safe_input import refuse_special, refuse_special_inside
from rwkv_rev.folders.selection import INDEX_SUFFIX, choose_weights, one_line, weight_map
from rwkv_rev.folders.source import Source
from rwkv_rev.printable import shortened

# Small files that travel with the weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class LocalCheckpoint:
    """The files of a source, all on this machine.

    Attributes:
        source: what was asked for.
        files: the weight files; several if sharded, in the order of the index.
        directory: where configuration and tokenizer files lie, if the source has such a place.
        commit: the commit of a Hub repository.
        index: the ``*.index.json`` of a sharded checkpoint.
        chosen: path inside the repository or directory of the weight file or index that was chosen.
    """

    source: Source
    files: tuple[Path, ...]
    directory: Path | None = None
    commit: str | None = None
    index: Path | None = None
    chosen: str | None = None


@dataclass(frozen=True)
class Expected:
    """What converting a source would read: path and size in bytes of each file, and the commit."""

    files: tuple[tuple[str, int | None], ...]
    commit: str | None = None


@dataclass(frozen=True)
class _Place:
    """A repository or directory: its files with sizes, and how to bring one here."""

    files: Mapping[str, int | None]
    fetch: Callable[[str], Path]
    commit: str | None = None


def resolve(source: Source, *, progress: bool = True) -> LocalCheckpoint:
    """Find the files of ``source``, downloading what is not in the cache (``progress``: bars on stderr).

    Raises:
        SourceError: if the source has no weights or several, or the Hub does not give them (missing, gated,
            offline).
        CheckpointError: if a shard index is damaged.
    """
    if source.kind in ("file", "bundled"):
        if not source.path.is_file():
            raise SourceError(f"{source} does not exist any more")
        return LocalCheckpoint(source, (source.path,))
    with _hub_errors(source), _progress_bars(progress):
        place = _open_place(source)
        chosen = choose_weights(place.files, source.file, str(source))
        first = place.fetch(chosen)
        names, index = _weights(place, source, chosen, first)
        for name in COMPANIONS:
            if name in place.files:
                place.fetch(name)
        files = tuple(first if name == chosen else place.fetch(name) for name in names)
        directory = _root(first, chosen)
        if any(_root(path, name) != directory for path, name in zip(files, names, strict=True)):
            raise SourceError(f"{source} changed while it was downloaded; run the command again")
    return LocalCheckpoint(source, files, directory, place.commit, index, chosen)


def expected_files(source: Source) -> Expected:
    """What :func:`resolve` would read, downloading nothing but a shard index.

    Raises:
        SourceError: as :func:`resolve`.
    """
    if source.kind in ("file", "bundled"):
        if not source.path.is_file():
            raise SourceError(f"{source} does not exist any more")
        return Expected(((source.path.name, source.path.stat().st_size),))
    with _hub_errors(source), _progress_bars(False):
        place = _open_place(source)
        chosen = choose_weights(place.files, source.file, str(source))
        names, _ = _weights(place, source, chosen, None)
    return Expected(tuple((name, place.files[name]) for name in names), place.commit)


def _root(path: Path, name: str) -> Path:
    return path.parents[len(PurePosixPath(name).parts) - 1]


def _weights(
    place: _Place, source: Source, chosen: str, first: Path | None
) -> tuple[tuple[str, ...], Path | None]:
    """Names of the weight files behind ``chosen``, and the index if it is one."""
    if not chosen.endswith(INDEX_SUFFIX):
        return (chosen,), None
    index = first or place.fetch(chosen)
    folder = PurePosixPath(chosen).parent
    names = tuple(dict.fromkeys(str(folder / file) for file in weight_map(index).values()))
    for name in names:
        if name not in place.files:
            where = f"which {shortened(chosen)} names"
            raise SourceError(f"{source} lacks the shard {shortened(name)}, {where}; download it again")
    return names, index


def _open_place(source: Source) -> _Place:
    return _open_repository(source) if source.kind == "hub" else _open_directory(source)


def _open_directory(source: Source) -> _Place:
    root = source.path
    if not root.is_dir():
        raise SourceError(f"{source} does not exist any more")
    refuse_special_inside(root)
    paths = [path for path in root.iterdir() if path.is_file()]
    if source.file and "/" in source.file and not Path(source.file).is_absolute():
        try:
            inside = list(root.glob(source.file))
        except (ValueError, NotImplementedError) as error:
            raise SourceError(f"--file {source.file} is no pattern: {one_line(error)}") from error
        for path in inside:
            refuse_special(path)
        paths += [path for path in inside if path.is_file()]
    files = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    return _Place(files, lambda name: root / name)


def _open_repository(source: Source) -> _Place:
    api = HfApi(library_name="rwkv-rev")
    try:
        info = api.model_info(source.location, revision=source.revision, files_metadata=True)
    except HfHubHTTPError:
        raise
    except (OfflineModeIsEnabled, HTTPError) as error:
        return _open_cached(source, error)

    def fetch(name: str) -> Path:
        # By revision, not by commit: only then the client notes in its cache what the revision means offline.
        return Path(api.hf_hub_download(source.location, name, revision=source.revision))

    # a name that cannot be printed is none that a model needs
    files = {file.rfilename: file.size for file in info.siblings or () if file.rfilename.isprintable()}
    return _Place(files, fetch, info.sha)


def _open_cached(source: Source, reason: Exception) -> _Place:
    wanted = source.revision or "main"
    why = (
        "offline mode is on"
        if isinstance(reason, OfflineModeIsEnabled)
        else f"no connection ({one_line(reason)})"
    )
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repositories = frozenset()
    for repository in repositories:
        if repository.repo_type != "model" or repository.repo_id != source.location:
            continue
        for revision in repository.revisions:
            if wanted in revision.refs or wanted == revision.commit_hash:
                return _snapshot(revision)
    raise SourceError(
        f"{source} (revision {wanted}) is not in the cache and {why}; connect once to download it"
    )


def _snapshot(revision: CachedRevisionInfo) -> _Place:
    root = revision.snapshot_path
    files = {file.file_path.relative_to(root).as_posix(): file.size_on_disk for file in revision.files}
    return _Place(files, lambda name: root / name, revision.commit_hash)


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """Say in one line what the system or the Hub client says in many."""
    if source.kind != "hub":
        try:
            yield
        except OSError as error:
            raise SourceError(f"{source} cannot be read: {error.strerror or one_line(error)}") from error
        return
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except HFValidationError as error:
        raise SourceError(f"{source} is not a valid Hub id: {one_line(error)}") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{source} is gated: ask for access on its page on the Hub, then {login}"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"the Hub has no repository {source} that you may see, nor is there a local path of that name; "
            f"check the name, and if it is private {login}"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{source} has no revision {source.revision or 'main'!r}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = login if status in (401, 403) else "try again later"
        raise SourceError(f"the Hub answered {status} for {source}; {hint}") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"a file of {source} is not in the cache and the Hub cannot be reached") from error
    except HTTPError as error:
        raise SourceError(
            f"the download of {source} broke off ({one_line(error)}); run the command again"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: the client's Xet transfers
        raise SourceError(f"downloading {source} failed: {one_line(error)}") from error
