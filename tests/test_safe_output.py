"""Outputs appear whole or not at all, whatever goes wrong and when."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from processes import run_python

from rwkv_rev.errors import OutputError
from rwkv_rev.folders.safe_output import require_space, whole_directory, whole_file


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def model_folder(path: Path, mark: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(mark)
    return path


def test_directory_appears_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep" / "model"
    with whole_directory(output) as folder:
        (folder / "config.json").write_text("{}")
        assert not output.exists()
        assert folder.parent == output.parent
    assert everything(tmp_path) == {"new", "new/deep", "new/deep/model", "new/deep/model/config.json"}
    umask = os.umask(0)
    os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputError])
@pytest.mark.parametrize("make", [whole_directory, whole_file])
def test_nothing_is_left_after(tmp_path: Path, make, error: type[BaseException]) -> None:
    with pytest.raises(error), make(tmp_path / "a" / "b" / "out") as path:
        (path / "x" if path.is_dir() else path).write_text("half")
        raise error("stop")
    assert everything(tmp_path) == set()


def test_an_existing_directory_needs_force(tmp_path: Path) -> None:
    output = model_folder(tmp_path / "model", "old")
    with pytest.raises(OutputError, match="already exists; pass force=True to"), whole_directory(output):
        pytest.fail("must refuse before anything is made")
    with whole_directory(output, force=True) as folder:
        (folder / "config.json").write_text("new")
        assert (output / "config.json").read_text() == "old"
    assert everything(tmp_path) == {"model", "model/config.json"}
    assert (output / "config.json").read_text() == "new"


def test_a_failure_keeps_what_force_would_have_replaced(tmp_path: Path) -> None:
    output = model_folder(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt), whole_directory(output, force=True) as folder:
        (folder / "config.json").write_text("new")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"model", "model/config.json"}
    assert (output / "config.json").read_text() == "old"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()], ids=repr)
def test_a_failing_rename_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    output = model_folder(tmp_path / "model", "old")

    def fails(self: Path, target: Path) -> Path:
        assert not output.exists()
        raise error

    monkeypatch.setattr(Path, "replace", fails)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), whole_directory(output, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert everything(tmp_path) == {"model", "model/config.json"}
    assert (output / "config.json").read_text() == "old"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with pytest.raises(OutputError, match="already exists"), whole_directory(output):
        model_folder(output, "someone else's")
    assert (output / "config.json").read_text() == "someone else's"
    assert everything(tmp_path) == {"model", "model/config.json"}


def test_force_never_deletes_what_is_no_model(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not a model folder"), whole_directory(home, force=True):
        pytest.fail("must refuse")
    assert (home / "letter.txt").exists()


def test_force_is_not_advised_where_it_would_not_help(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("dear", encoding="utf-8")
    (tmp_path / "letter").write_text("dear", encoding="utf-8")
    for name, make in (("letters", whole_directory), ("letter", whole_file)):
        with pytest.raises(OutputError, match="so force=True does not replace it"), make(tmp_path / name):
            raise AssertionError


def test_force_never_replaces_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder(tmp_path / "model", "old"))
    for output in (".", "..", tmp_path / "model"):
        with pytest.raises(OutputError), whole_directory(output, force=True):
            pytest.fail("must refuse")


def test_an_empty_directory_is_replaced_with_force(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with whole_directory(tmp_path / "empty", force=True) as folder:
        (folder / "a").touch()
    assert everything(tmp_path) == {"empty", "empty/a"}


def test_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(model_folder(tmp_path / "model", "x"))
    for output, make in (("file", whole_directory), ("folder", whole_file), ("file/below", whole_directory)):
        with pytest.raises(OutputError), make(tmp_path / output, force=True):
            pytest.fail("must refuse")
    with pytest.raises(OutputError, match="is a link"), whole_directory(tmp_path / "link", force=True):
        pytest.fail("must refuse")


def test_file_replaced_only_with_force(tmp_path: Path) -> None:
    output = tmp_path / "model.pth"
    for data, force in ((b"PK\3\4 one", False), (b"PK\3\4 two", True)):
        with whole_file(output, force=force) as path:
            path.write_bytes(data)
    assert output.read_bytes() == b"PK\3\4 two"
    with pytest.raises(OutputError, match="already exists"), whole_file(output):
        pytest.fail("must refuse")
    assert everything(tmp_path) == {"model.pth"}


def test_force_replaces_only_files_that_could_be_ours(tmp_path: Path) -> None:
    """No letter, no link, no pipe, no device."""
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "real.pth").write_bytes(b"PK\3\4")
    outputs = {"letter.txt": "no file of weights", "/dev/null": "a device or a pipe"}
    if sys.platform == "win32":
        outputs.pop("/dev/null")
    else:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link.pth").symlink_to("real.pth")
        (tmp_path / "lost.pth").symlink_to("nowhere")
        outputs |= {"pipe": "a device or a pipe", "link.pth": "is a link", "lost.pth": "is a link"}
    before = everything(tmp_path)
    for name, reason in outputs.items():
        with pytest.raises(OutputError, match=reason), whole_file(tmp_path / name, force=True):
            pytest.fail("must refuse")
    assert everything(tmp_path) == before
    assert (tmp_path / "letter.txt").read_text() == "dear"


# What a killed process leaves


def killed(folder: Path, name: str = "model") -> None:
    """Leftovers of each kind."""
    model_folder(folder / f".{name}.0123abcd.partial", "half")
    (folder / f".{name}.4567abcd.partial").write_bytes(b"half of a file")
    (folder / f".{name}.lock").touch()


@pytest.mark.parametrize("make", [whole_directory, whole_file])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, make) -> None:
    killed(tmp_path)
    killed(tmp_path, "model.other")
    (tmp_path / ".model.backup.partial").mkdir()  # a name that is not ours
    others = {name for name in everything(tmp_path) if "other" in name or "backup" in name}
    with make(tmp_path / "model") as path:
        (path / "config.json" if path.is_dir() else path).write_text("new")
    assert everything(tmp_path) - {"model/config.json"} == {*others, "model"}


@pytest.mark.parametrize("force", [False, True])
def test_killed_between_the_renames(tmp_path: Path, force: bool) -> None:
    """The old output comes back, and is replaced by what was asked to replace it."""
    killed(tmp_path)
    model_folder(tmp_path / ".model.89abcdef.previous", "old")
    output = tmp_path / "model"
    if force:
        with pytest.raises(ValueError), whole_directory(output, force=True):
            assert (output / "config.json").read_text() == "old"
            raise ValueError("stop")
    else:
        with pytest.raises(OutputError, match="already exists"), whole_directory(output):
            pytest.fail("must refuse")
    assert (output / "config.json").read_text() == "old"
    assert everything(tmp_path) == {"model", "model/config.json"}


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    script = """
        import sys, time
        from rwkv_rev.folders.safe_output import whole_directory
        with whole_directory(sys.argv[1]) as folder:
            (folder / "config.json").write_text("first")
            print("ready", flush=True)
            sys.stdin.read()
    """
    output = tmp_path / "model"
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(output)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline().strip() == b"ready"
        for force in (False, True):
            with (
                pytest.raises(OutputError, match="is being written by another process"),
                whole_directory(output, force=force),
            ):
                pytest.fail("must refuse")
        process.stdin.close()
    assert process.returncode == 0
    assert everything(tmp_path) == {"model", "model/config.json"}


@pytest.mark.parametrize("fails", [False, True])
def test_without_locks_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """As on some network disks: its own leftovers are its own, the rest may be in use."""

    def no_locks(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    killed(tmp_path)
    before = everything(tmp_path)
    with suppress(ValueError), whole_directory(tmp_path / "model") as folder:
        (folder / "config.json").write_text("new")
        if fails:
            raise ValueError("stop")
    assert everything(tmp_path) == before | (set() if fails else {"model", "model/config.json"})


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_stopped_while_the_lock_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """Its file is there already, and the lock does not know of it."""
    take, calls = FileLock.acquire, []

    def stopped_once(lock: FileLock, **how: Any) -> Any:
        calls.append(how)
        if len(calls) == 1:
            Path(lock.lock_file).touch()
            raise stop
        return take(lock, **how)

    monkeypatch.setattr(FileLock, "acquire", stopped_once)
    with pytest.raises(stop), whole_directory(tmp_path / "model"):
        pytest.fail("must stop")
    assert calls and everything(tmp_path) == set()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_stopped_while_the_lock_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    unlink, calls = Path.unlink, []

    def stopped_once(path: Path, **how: Any) -> None:
        if path.name == ".model.lock":
            calls.append(path)
            if len(calls) == 1:
                raise stop
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", stopped_once)
    with pytest.raises(stop), whole_directory(tmp_path / "model") as folder:
        (folder / "config.json").write_text("new")
    assert calls and everything(tmp_path) == {"model", "model/config.json"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_stopped_while_clearing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    output = model_folder(tmp_path / "model", "old")
    remove, calls = shutil.rmtree, []

    def stopped_once(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise stop
        remove(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("shutil.rmtree", stopped_once)
    with pytest.raises(stop), whole_directory(output, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new"
    assert everything(tmp_path) == {"model", "model/config.json"}


# A full disk, and no memory left


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG", "EIO"])
@pytest.mark.parametrize("make", [whole_directory, whole_file])
def test_a_disk_that_takes_no_more(tmp_path: Path, make, number: str) -> None:
    code = getattr(errno, number)
    with pytest.raises(OutputError) as error, make(tmp_path / "a" / "out") as path:
        (path / "x" if path.is_dir() else path).write_text("half")
        raise OSError(code, os.strerror(code))
    expected = {"ENOSPC": "the disk is full", "EDQUOT": "your share", "EFBIG": "smaller max_shard_size"}
    assert expected.get(number, os.strerror(code)) in str(error.value) and "\n" not in str(error.value)
    assert everything(tmp_path) == set()


@pytest.mark.parametrize(
    "reason",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["python", "torch", "cuda"],
)
def test_no_memory_left(tmp_path: Path, reason: Exception) -> None:
    message = r"out of memory while .*model was written; nothing of it is kept"
    with pytest.raises(OutputError, match=message), whole_directory(tmp_path / "model"):
        raise reason
    assert everything(tmp_path) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_commands_that_may_not_write_enough(bundled: dict[str, Path], tmp_path: Path) -> None:
    """The real thing: the system ends each file at 300 kB."""
    script = """
        import json, resource, sys
        from rwkv_rev.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for arguments in json.loads(sys.argv[1]):
            try:
                main(arguments)
            except SystemExit as end:
                print(end.code)
    """
    output, model = str(tmp_path / "new" / "out"), str(bundled["5.2"])
    commands = [
        ["convert", "bundled:rwkv-5.2", "--no-verify", "--output", output],
        ["export", model, "--output", output],
        ["export", model, "--to", "hf", "--output", output],
    ]
    done = run_python([sys.executable, "-c", textwrap.dedent(script), json.dumps(commands)])
    assert done.stdout.split() == ["1", "1", "1"], done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert (
            line.startswith(f"error: cannot write {output}: a file would be larger")
            and "--max-shard-size" in line
        )
    assert everything(tmp_path) == set()


def test_space_is_checked_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match="not enough disk space"):
        require_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.parametrize("hidden", [False, True], ids=["", "hidden by an error"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, hidden: bool) -> None:
    """The command line turns both into exceptions; a folder half written when they arrive is removed.

    Native code may put an error of its own in their place.
    """
    script = """
        import signal, sys, time, rwkv_rev.cli as cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
        def slow(name):
            def command(source: str) -> None:
                from rwkv_rev.folders.safe_output import whole_directory
                from rwkv_rev.cli.stopping import telling_if_stopped
                with telling_if_stopped(None), whole_directory(source) as folder:
                    (folder / "half").touch()
                    print("ready", flush=True)
                    try:
                        time.sleep(60)
                    except BaseException:
                        if len(sys.argv) > 2:
                            raise ValueError("no shape") from None
                        raise
            return command
        cli._load = slow
        cli.main(["convert", sys.argv[1]])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "deep" / "out"), *["hide"] * hidden],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(number)
        errors = process.stderr.read()
    assert process.returncode == 128 + number
    assert errors.strip() == "stopped; the output is whole or not there; the same command begins anew"
    assert everything(tmp_path) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own there")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [whole_directory, whole_file])
def test_links_that_lead_nowhere(tmp_path: Path, make, force: bool) -> None:
    """To themselves, or to what is not there; they are where a folder should be."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("nowhere")
    before = everything(tmp_path)
    for name in ("loop/x", "loop/deep/x", "lost/x"):
        with (
            pytest.raises(OutputError, match="is a link that leads nowhere"),
            make(tmp_path / name, force=force),
        ):
            pytest.fail("must refuse")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("make", [whole_directory, whole_file])
def test_a_folder_that_is_closed(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def closed(path: Path, **how: bool) -> os.stat_result:
        if tmp_path / "priv" in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", closed)
    with (
        pytest.raises(OutputError, match=r"cannot write .*: Permission denied"),
        make(tmp_path / "priv/x/out"),
    ):
        pytest.fail("must refuse")
