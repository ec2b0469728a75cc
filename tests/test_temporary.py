"""Temporary folders of killed processes go with the next one that is made; those in use stay."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rwkv_rev.folders.temporary import LOCK_NAME, make_temporary_folder, temporary_folder

HOLDER = """
    import sys, tempfile
    tempfile.tempdir = sys.argv[1]
    from rwkv_rev.folders.temporary import make_temporary_folder
    folder, remove = make_temporary_folder("tokens")
    (folder / "tokens.bin").write_text("ids")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_process(scratch: Path) -> None:
    arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), str(scratch)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with temporary_folder("verify"):
            assert (left / "tokens.bin").exists(), "it is in use"
        process.kill()
    assert left.exists()
    folder, remove = make_temporary_folder("tokens")
    assert [path.name for path in scratch.iterdir()] == [folder.name], "what was killed is gone"
    remove()
    assert not list(scratch.iterdir())


def test_what_is_not_ours_stays(scratch: Path) -> None:
    """Other names, links, folders that somebody may be about to lock; but not those that nobody locked for an hour."""
    (scratch / "elsewhere").mkdir()
    (scratch / "elsewhere" / LOCK_NAME).touch()
    for name in ("rwkv-rev-tokens-mine", "rwkv-rev-tokens-01234567", "rwkv-rev-verify-abcdefgh"):
        (scratch / name).mkdir()
    (scratch / "rwkv-rev-tokens-01234567" / "tokens.bin").touch()
    if sys.platform != "win32":
        (scratch / "rwkv-rev-tokens-89abcdef").symlink_to("elsewhere")
    before = {path.name for path in scratch.iterdir()}
    with temporary_folder("tokens"):
        pass
    assert {path.name for path in scratch.iterdir()} == before
    old = time.time() - 7200
    for name in before:
        os.utime(scratch / name, (old, old))
    with temporary_folder("tokens"):
        pass
    assert {path.name for path in scratch.iterdir()} == before - {"rwkv-rev-verify-abcdefgh"}
