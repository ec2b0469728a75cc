"""Outputs appear whole or not at all, whatever goes wrong and when."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rwkv_rev.converters.safe_output import require_space, whole_directory, whole_file
from rwkv_rev.errors import OutputError


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
    with pytest.raises(OutputError, match="already exists; pass --force"), whole_directory(output):
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


def test_a_failing_rename_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = model_folder(tmp_path / "model", "old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OutputError, match="Permission denied"), whole_directory(output, force=True) as folder:
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
    for text, force in (("one", False), ("two", True)):
        with whole_file(output, force=force) as path:
            path.write_text(text)
    assert output.read_text() == "two"
    with pytest.raises(OutputError, match="already exists"), whole_file(output):
        pytest.fail("must refuse")
    assert everything(tmp_path) == {"model.pth"}


def test_space_is_checked_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match="not enough disk space"):
        require_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The command line turns both into exceptions; a folder half written when they arrive is removed."""
    script = """
        import signal, sys, time, rwkv_rev.cli as cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
        def slow(name):
            def command(source: str) -> None:
                from rwkv_rev.converters.safe_output import whole_directory
                with whole_directory(source) as folder:
                    (folder / "half").touch()
                    print("ready", flush=True)
                    time.sleep(60)
            return command
        cli._load = slow
        cli.main(["convert", sys.argv[1]])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "deep" / "out")],
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
    assert "Traceback" not in errors
    assert everything(tmp_path) == set()
