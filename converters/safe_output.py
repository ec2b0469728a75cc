"""Outputs appear whole or not at all.

Everything is written to a hidden temporary sibling of the output, flushed to the disk, and moved into place
by a rename, which POSIX makes atomic inside one folder. Any exception, Ctrl-C included, removes what was
written. An existing output is replaced only on request and only at the very end: it is renamed away, the
new one is renamed in, then the old one is deleted; if the second rename fails the old one comes back.

Limit: a process killed with SIGKILL leaves the hidden temporary folder (``.NAME.*.partial``), never a half
output.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rwkv_rev.errors import OutputError


def check_output(output: Path, *, force: bool, directory: bool) -> None:
    """Refuse an output that exists without ``force``, or that ``force`` must never delete.

    With ``force`` a directory is replaced only if it is empty or looks like a model (it holds
    ``config.json``), so that a mistyped path cannot delete a home folder.

    Raises:
        OutputError: naming the output and what would work.
    """
    for folder in output.parents:
        if folder.exists():
            if not folder.is_dir():
                raise OutputError(f"cannot write {output}: {folder} is a file, not a folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(f"cannot write {output}: no permission to write in {folder}")
            break
    if not os.path.lexists(output):
        return
    if directory and not output.is_dir():
        raise OutputError(f"{output} exists and is not a folder; choose another --output")
    if not directory and output.is_dir():
        raise OutputError(f"{output} is a folder; give --output the path of a file")
    if not force:
        raise OutputError(f"{output} already exists; pass --force to replace it, or choose another --output")
    if directory:
        if output.is_symlink():
            raise OutputError(f"{output} is a link; remove it yourself, or choose another --output")
        if not (output / "config.json").is_file() and any(output.iterdir()):
            raise OutputError(
                f"{output} is not a model folder (no config.json), so --force does not replace it; "
                "choose another --output"
            )
        here = Path.cwd()
        if output.resolve() == here or output.resolve() in here.parents:
            raise OutputError(f"{output} is or holds the current folder; choose another --output")


@contextmanager
def whole_directory(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Context manager that gives a temporary folder and renames it to ``output`` when the block succeeds.

    Raises:
        OutputError: if ``output`` exists and may not be replaced, or the system refuses to write.
    """
    output = Path(output).absolute()
    check_output(output, force=force, directory=True)
    made = _make_parents(output.parent)
    temporary: Path | None = None
    try:
        with _system_errors(output):
            temporary = Path(
                tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial")
            )
            temporary.chmod(0o777 & ~_umask())
        yield temporary
        with _system_errors(output):
            _sync_tree(temporary)
            _move_into_place(temporary, output, force=force)
            _sync(output.parent)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_parents(made)
        raise


@contextmanager
def whole_file(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """As :func:`whole_directory` for a single file: gives the path of a temporary file to write.

    Raises:
        OutputError: if ``output`` exists and may not be replaced, or the system refuses to write.
    """
    output = Path(output).absolute()
    check_output(output, force=force, directory=False)
    made = _make_parents(output.parent)
    temporary: Path | None = None
    try:
        with _system_errors(output):
            handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial")
            os.close(handle)
            temporary = Path(name)
            temporary.chmod(0o666 & ~_umask())
        yield temporary
        with _system_errors(output):
            _sync(temporary)
            check_output(output, force=force, directory=False)
            temporary.replace(output)
            _sync(output.parent)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        _remove_parents(made)
        raise


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse early when the disk below ``folder`` has fewer than ``nbytes`` bytes free.

    Raises:
        OutputError: with both numbers.
    """
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"not enough disk space below {folder}: {nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _move_into_place(temporary: Path, output: Path, *, force: bool) -> None:
    check_output(output, force=force, directory=True)  # again: it may have appeared in the meantime
    if not output.exists():
        temporary.rename(output)
        return
    previous = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".previous"))
    previous.rmdir()
    output.rename(previous)
    try:
        temporary.rename(output)
    except BaseException:
        previous.rename(output)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    """Create ``folder`` and return what had to be created, innermost first."""
    made = []
    missing = folder
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    with _system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove_parents(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # someone else put something there
            return


@contextmanager
def _system_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
