"""Outputs appear whole or not at all.

Everything is written to a hidden temporary sibling of the output, flushed to the disk, and moved into place
by a rename, which POSIX makes atomic inside one folder. Any exception, Ctrl-C included, removes what was
written. An existing output is replaced only on request and only at the very end: it is renamed away, the
new one is renamed in, then the old one is deleted; if the second rename fails the old one comes back.

A process killed with SIGKILL removes nothing. What it leaves bears the output's name, ``.NAME.*.partial`` and
``.NAME.*.previous``, beside ``.NAME.lock``, a lock that the system releases with the process: the next writer of
that output takes the lock, so it knows that nobody uses the rest, brings the old output back where the kill came
between the two renames, and removes everything else. Where a file system has no locks, nothing is removed. On a
network disk whose locks do not reach other machines, two of them must not write one output at the same time.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rwkv_rev.arguments import expanded
from rwkv_rev.errors import OutputError, RwkvRevError
from rwkv_rev.printable import is_utf8


def check_place(output: Path) -> None:
    """Refuse an output above which there is no folder that can be written to.

    Raises:
        OutputError: naming what stands there instead.
    """
    with _failures(output):
        for folder in output.parents:
            if folder.exists():
                if not folder.is_dir():
                    raise OutputError(f"cannot write {output}: {folder} is a file, not a folder")
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise OutputError(f"cannot write {output}: no permission to write in {folder}")
                break
            if folder.is_symlink():
                raise OutputError(f"cannot write {output}: {folder} is a link that leads nowhere")


def check_output(
    output: Path,
    *,
    force: bool,
    directory: bool,
    reads: Path | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Refuse an output that ``force`` must never delete, and one that exists without ``force``.

    ``reads``: the model folder that is read meanwhile, which ``force`` must not replace either. ``inputs``: whatever
    else is read, as :func:`refuse_inputs`.

    With ``force`` a directory is replaced only if it is empty or looks like a model (it holds
    ``config.json``), a file only if it is empty or such as ``torch.save`` or safetensors write, so that a
    mistyped path cannot delete a home folder or a letter. Links, devices and pipes are never replaced.

    Raises:
        OutputError: naming the output and what would work.
    """
    check_place(output)
    if directory and not is_utf8(str(output)):
        raise OutputError(f"cannot write {output}: this name is no UTF-8, and what writes weights needs that")
    if output.is_symlink():
        raise OutputError(f"{output} is a link; remove it yourself, or choose another --output")
    if reads is not None:
        _refuse_overlap(reads, output)
    refuse_inputs(output, inputs)
    if not os.path.lexists(output):
        return
    if directory and not output.is_dir():
        raise OutputError(f"{output} exists and is not a folder; choose another --output")
    if not directory and output.is_dir():
        raise OutputError(f"{output} is a folder; --output must be the path of a file")
    if not directory and not stat.S_ISREG(output.lstat().st_mode):
        raise OutputError(f"{output} is a device or a pipe, not a regular file; choose another --output")
    if directory:
        if not (output / "config.json").is_file() and any(output.iterdir()):
            raise OutputError(
                f"{output} exists and is not a model folder (no config.json), so --force does not replace it; "
                "choose another --output"
            )
        here = Path.cwd()
        if output.resolve() == here or output.resolve() in here.parents:
            raise OutputError(f"{output} is or holds the current folder; choose another --output")
    else:
        with _failures(output), output.open("rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
        safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") < size
        if start and not start.startswith(b"PK\x03\x04") and not safetensors:
            raise OutputError(
                f"{output} exists and is no file of weights (as torch.save or safetensors write it), so --force does "
                "not replace it; choose another --output"
            )
    if not force:
        raise OutputError(f"{output} already exists; pass --force to replace it, or choose another --output")


def _refuse_overlap(directory: Path, output: Path) -> None:
    """Refuse an output that is, holds or lies in the model folder that is read."""
    inside, made = directory.resolve(), output.resolve()
    if made == inside or made in inside.parents:
        raise OutputError(f"{output} holds the model itself; choose another --output")
    if inside in made.parents:
        raise OutputError(f"{output} is inside the model's folder; choose another --output")


def refuse_inputs(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output whose replacement would delete what is read to make it; None and what is not there pass.

    Raises:
        OutputError: if ``output`` is or holds an input, or is a file of one that is a folder.
    """
    if not os.path.lexists(output):
        return
    made = output.resolve()
    for path in (Path(expanded(each)) for each in inputs if each is not None):
        if not os.path.lexists(path):
            continue
        link = path.parent.resolve() / path.name  # a link goes with the folder, though its target does not
        whole = path.resolve()
        if made in (whole, *whole.parents, link, *link.parents):
            what = "is" if made in (whole, link) else "holds"
            raise OutputError(f"{output} {what} {path}, which is read to make it; choose another --output")
        if whole in made.parents and made.is_file():
            raise OutputError(
                f"{output} is a file of {path}, which is read to make it; choose another --output"
            )


@contextmanager
def whole_directory(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Context manager that gives a temporary folder and renames it to ``output`` when the block succeeds.

    Raises:
        OutputError: if ``output`` exists and may not be replaced, if another process writes it, or if the system
            refuses to write (a full disk, no memory left).
    """
    yield from _whole(Path(output).absolute(), force=force, directory=True)


@contextmanager
def whole_file(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """As :func:`whole_directory` for a single file: gives the path of a temporary file to write."""
    yield from _whole(Path(output).absolute(), force=force, directory=False)


def _whole(output: Path, *, force: bool, directory: bool) -> Iterator[Path]:
    if not _leftovers(output):  # else an old output may be about to come back
        check_output(output, force=force, directory=directory)
    token = secrets.token_hex(4)
    temporary = output.with_name(f".{output.name}.{token}.partial")
    made: list[Path] = []
    try:
        with _failures(output):
            _make_parents(output.parent, made)
            with _only_writer(output) as alone:
                theirs = "[0-9a-z_]{8}" if alone else token
                try:
                    _settle(output, theirs)
                    check_output(output, force=force, directory=directory)
                    temporary.mkdir() if directory else temporary.touch(exist_ok=False)
                    yield temporary
                    sync_tree(temporary)
                    # again: it may have appeared meanwhile
                    check_output(output, force=force, directory=directory)
                    if directory and output.exists():
                        output.rename(temporary.with_suffix(".previous"))
                    temporary.replace(output)
                    _sync(output.parent)
                finally:
                    try:
                        _settle(output, theirs)
                    except (KeyboardInterrupt, SystemExit):  # stopped while it cleared up: it still does
                        _settle(output, theirs)
                        raise
    except BaseException:
        _remove_parents(made)
        raise


def _leftovers(output: Path, token: str = "[0-9a-z_]{8}") -> list[Path]:
    """What writers of this output left beside it, or are writing."""
    theirs = re.compile(rf"\.{re.escape(output.name)}\.{token}\.(partial|previous)")
    with suppress(OSError):
        return [path for path in output.parent.iterdir() if theirs.fullmatch(path.name)]
    return []


def _settle(output: Path, token: str) -> None:
    """Bring an old output back that is away from its place, and remove what else writers left: all, or one of them."""
    for path in _leftovers(output, token):
        if path.suffix == ".previous" and not os.path.lexists(output):
            path.rename(output)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _only_writer(output: Path) -> Iterator[bool]:
    """Hold the lock of an output; gives False where the file system has no locks.

    Raises:
        OutputError: if another process holds it.
    """
    path = output.with_name(f".{output.name}.lock")
    lock = FileLock(path)
    try:
        yield _acquired(lock, output)
    finally:
        try:
            _give_up(lock)
        except (KeyboardInterrupt, SystemExit):  # stopped meanwhile
            _give_up(lock)
            raise


def _give_up(lock: FileLock) -> None:
    """Release a lock, if it is held, without its file."""
    if lock.is_locked:
        path = Path(lock.lock_file)
        with suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        lock.release()
        if os.name == "nt":
            with suppress(OSError):
                path.unlink()


def _acquired(lock: FileLock, output: Path) -> bool:
    try:
        lock.acquire(timeout=0)
    except (KeyboardInterrupt, SystemExit):
        _remove_free(lock)
        raise
    except Timeout:
        if not os.path.lexists(
            lock.lock_file
        ):  # filelock takes a place where nothing can be made for a lock's
            raise OutputError(f"cannot write {output}: no file can be made in {output.parent}") from None
        raise OutputError(
            f"{output} is being written by another process; wait for it, or choose another --output"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return False
    return True


def _remove_free(lock: FileLock) -> None:
    """The file of a lock that nobody holds, as one that was stopped while it was taken may not know of it."""
    again = FileLock(lock.lock_file)
    with suppress(Timeout, NotImplementedError, OSError):
        again.acquire(timeout=0)
        _give_up(again)


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
            f"not enough disk space below {folder}: {nbytes / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        )


@contextmanager
def _failures(output: Path) -> Iterator[None]:
    """One line for a full disk, for memory that ran out, and for whatever else the system refuses."""
    try:
        yield
    except RwkvRevError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {output}: {_reason(error, output)}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("alloc.*memory|out of memory", str(error)):
            raise
        raise OutputError(
            f"out of memory while {output} was written; nothing of it is kept. Close other programs, or use a "
            "machine with more memory"
        ) from error


def _reason(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "the disk is full, or your share of it; nothing of it is kept. Make room, or choose an --output on "
            "another disk"
        )
    if error.errno == errno.EFBIG:
        return (
            "a file would be larger than this disk or your account allows; nothing of it is kept. Choose a smaller "
            "--max-shard-size, or an --output on another disk"
        )
    named = error.filename
    where = f" ({named})" if named and Path(os.fsdecode(named)).parent not in (output.parent, output) else ""
    return " ".join(f"{error.strerror or error}{where}".split())


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Create ``folder``, and put what had to be created in ``made``, innermost first."""
    missing = folder
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    folder.mkdir(parents=True, exist_ok=True)


def _remove_parents(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # someone else put something there
            return


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # there only files can be flushed
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    for inner in (*path.rglob("*"), path):
        _sync(inner)
