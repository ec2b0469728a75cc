"""An architecture is new files and one line: pasted into the package, they are as good as any that stand there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_cases import environment
from pasted import ROOT, paste, pasted
from processes import run_python
from test_architectures import toy_checkpoint
from test_imports import circles, imports, packages, sources

RUFF = shutil.which("ruff", path=str(Path(sys.executable).parent))
COMMANDS = """
import os, sys
from pathlib import Path
folder = sys.argv[1]
os.chdir(folder)
for name in [name for name in sys.modules if name.split(".")[0] == "rwkv_rev"]:
    del sys.modules[name]  # of the package as it is, where this was forked
sys.path.insert(0, folder)
import rwkv_rev
from rwkv_rev.cli import main
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
    """In a copy of the package, and by nothing of the one here: made, verified, converted with verification."""
    package = tmp_path / "rwkv_rev"
    ignored = shutil.ignore_patterns("*.pth")
    shutil.copytree(ROOT / "rwkv_rev", package, ignore=ignored)
    for folder in ("converters", "cli"):
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    paste(package)
    torch.save(toy_checkpoint(), tmp_path / "toy.pth")
    found = run_python([sys.executable, "-c", COMMANDS, tmp_path], env=environment())
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("PASS") >= 2 and (tmp_path / "model" / "model.safetensors").exists()
