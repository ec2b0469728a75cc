"""An architecture is new files and one line: pasted into the package, they are as good as any that stand there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pasted import ROOT, paste, pasted
from test_architectures import toy_checkpoint
from test_imports import circles, imports, packages, sources

RUFF = shutil.which("ruff", path=str(Path(sys.executable).parent))
COMMANDS = """
import sys
from pathlib import Path
import rwkv_rev
from rwkv_rev.cli import main
folder = sys.argv[1]
assert Path(rwkv_rev.__file__).parents[1] == Path(folder)
checks = ["--tokens", "8", "--reversal", "--gradients", "--context", "14", "--chunk", "6"]
small = ["--set", "hidden_size=16", "--set", "num_hidden_layers=2"]
for command in (
    ["init", "--architecture", "gated-unit", *small, "--output", f"{folder}/unit"],
    ["verify", f"{folder}/unit", *checks],
    ["inspect", f"{folder}/toy.pth"],
    ["convert", f"{folder}/toy.pth", "--output", f"{folder}/model", "--verify"],
    ["verify", f"{folder}/model", *checks],
):
    try:
        main(command)
    except SystemExit as ended:
        assert not ended.code, command
"""


@pytest.mark.skipif(RUFF is None, reason="needs the tools of `make lint`")
@pytest.mark.parametrize("name", pasted())
def test_style(name: str) -> None:
    assert RUFF is not None
    for command in (["check"], ["format", "--check"]):
        found = subprocess.run(
            [RUFF, *command, "--stdin-filename", f"rwkv_rev/architectures/{name}", "-"],
            input=pasted()[name],
            text=True,
            encoding="utf-8",
            capture_output=True,
            cwd=ROOT,
        )
        assert found.returncode == 0, found.stdout + found.stderr


def test_imports() -> None:
    files = {module: path.read_text(encoding="utf-8") for module, path in sources().items()}
    more = files | {
        f"rwkv_rev.architectures.{name.removesuffix('.py')}": text for name, text in pasted().items()
    }
    assert not circles(imports(more))
    before, after = (packages(imports(some, dynamic=False)) for some in (files, more))
    assert not circles(after)
    assert after["rwkv_rev.architectures"] == before["rwkv_rev.architectures"]


def test_commands(tmp_path: Path) -> None:
    """In a copy of the package: made, verified, converted with verification, by no other change."""
    package = tmp_path / "rwkv_rev"
    ignored = shutil.ignore_patterns("*.pth")
    shutil.copytree(ROOT / "rwkv_rev", package, ignore=ignored)
    for folder in ("converters", "cli"):
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    paste(package)
    torch.save(toy_checkpoint(), tmp_path / "toy.pth")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("PASS") >= 2 and (tmp_path / "model" / "model.safetensors").exists()
