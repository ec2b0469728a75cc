"""``convert`` and ``export`` killed at random moments: the output is whole, the old one or absent, and nothing else.

``RWKV_REV_KILLS=20 pytest -m slow tests/test_output_kill.py -s`` kills 20 times by each signal, which
docs/reliability.md reports; the suite takes a few.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from finetune_cases import environment
from foreign import blinkdl_state_dict
from processes import run_command, start_command

from rwkv_rev.conversion import convert

KILLS = int(os.environ.get("RWKV_REV_KILLS", "2"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs signals"),
]


def contents(path: Path) -> str:
    """A checksum of a file or folder, but for the folder's own record of its age."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path.parent).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 30 MB, the second to replace the first, so that writing takes its time."""
    folder = tmp_path_factory.mktemp("sources")
    for name, seed in (("old", 1), ("new", 2)):
        torch.manual_seed(seed)
        sizes = {"vocab": 256, "D": 512, "head_size": 64, "layers": 2}
        state = blinkdl_state_dict("5.2", **sizes)
        torch.save(
            {key: torch.randn_like(tensor.float()) for key, tensor in state.items()}, folder / f"{name}.pth"
        )
        convert(folder / f"{name}.pth", folder / name)
    return folder


Undisturbed = dict[str, tuple[dict[str, str], float]]
"""Of what a command writes: checksums of old and new; and its seconds."""


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    """Filled by the first test of each kind."""
    return {}


def command(kind: str, name: str, sources: Path, output: Path) -> list[str]:
    if kind == "convert":
        return ["convert", str(sources / f"{name}.pth"), "--output", str(output), "--no-verify", "--force"]
    if kind == "verify":
        return ["convert", str(sources / f"{name}.pth"), "--output", str(output), "--force"]
    to = "hf" if kind == "export-hf" else "blinkdl"
    return ["export", str(sources / name), "--to", to, "--output", str(output), "--force"]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name
)
@pytest.mark.parametrize("kind", ["convert", "export"])
def test_killed(
    kind: str, number: signal.Signals, sources: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Every other time over an old output; convert verifies every tenth time, export writes both layouts."""
    moments = random.Random(f"{kind} {number}")
    scratch, streams = tmp_path / "scratch", tmp_path / "streams"
    scratch.mkdir()
    streams.mkdir()
    env = environment() | {"TMPDIR": str(scratch), "RWKV_REV_CACHE": str(tmp_path / "cache")}
    found: Counter[str] = Counter()
    for count in range(KILLS):
        if kind == "export":
            shape = ("export", "export-hf")[count // 2 % 2]
        else:
            shape = "verify" if count % 10 == 8 else "convert"
        if shape not in undisturbed:
            undisturbed[shape] = run_undisturbed(shape, sources, sources / shape, env)
        expected, seconds = undisturbed[shape]
        here, share = tmp_path / f"{count}", 1.0
        over_old = count % 2 == 0
        while True:  # until it was killed in time
            if over_old:
                shutil.copytree(sources / shape / "old", here)
            else:
                here.mkdir()
            output = here / "out"
            process = start_command(command(shape, "new", sources, output), streams / f"{count}", env)
            errors = streams / f"{count}.err"
            while not errors.exists():
                time.sleep(0.005)
            time.sleep(
                0.02 + share * moments.uniform(0.0, 0.8 * seconds)
            )  # in the command line's own code by then
            assert process.pid is not None
            with suppress(ProcessLookupError):  # it is done
                os.kill(process.pid, number)
            process.join(60)
            if process.exitcode != 0:
                break
            share *= 0.8
            errors.unlink()
            shutil.rmtree(here)
        state = (
            "absent" if not os.path.lexists(output) else expected[contents(output)]
        )  # KeyError: half an output
        hidden = {path.name for path in here.iterdir()} - {"out"}
        if state == "absent":
            assert not over_old or any(name.endswith(".previous") for name in hidden), hidden
        said = errors.read_text("utf-8")
        assert "Traceback" not in said and "unexpected" not in said, said
        if number != signal.SIGKILL and process.exitcode == 128 + number:
            assert not hidden and not list(scratch.iterdir()), (hidden, list(scratch.iterdir()))
            lines = said.strip().splitlines()
            assert len(lines) <= 1 and all(line.startswith("stopped; ") for line in lines), lines
        left = ", leftovers" if hidden or any(scratch.iterdir()) else ""
        found[f"{state}, exit {process.exitcode}{left}"] += 1
        again = run_command(*command(shape, "new", sources, output), env=env)
        assert again.returncode == 0, again.stderr
        assert expected[contents(output)] == "new"
        assert {path.name for path in here.iterdir()} == {"out"}
        if shape == "verify":
            assert not list(scratch.iterdir())
        shutil.rmtree(here)
    print(f"\n{kind}, {number.name}, {KILLS} kills: {dict(found)}", flush=True)


def run_undisturbed(
    shape: str, sources: Path, folder: Path, env: dict[str, str]
) -> tuple[dict[str, str], float]:
    """What the command writes for both models: which checksum is whose, and the seconds of the second run."""
    checksums = {}
    for name in ("new", "old"):
        (folder / name).mkdir(parents=True)
        began = time.monotonic()
        done = run_command(*command(shape, name, sources, folder / name / "out"), env=env)
        seconds = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        checksums[contents(folder / name / "out")] = name
    assert len(checksums) == 2
    return checksums, seconds
