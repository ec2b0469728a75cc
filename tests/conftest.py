"""Fixtures shared by the tests: one thread each, the bundled checkpoints converted once a session, the commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rwkv_rev
from rwkv_rev.cli import main

BUNDLED = {"4": "rwkv-4", "5.2": "rwkv-5.2"}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and test processes that run side by side lose much by them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the converted bundled checkpoints, by version."""
    root = tmp_path_factory.mktemp("bundled")
    for name in BUNDLED.values():
        rwkv_rev.convert(f"bundled:{name}", root / name)
    return {version: root / name for version, name in BUNDLED.items()}


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "error")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("warnings.showwarning", None)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return int(exit_.value.code or 0), streams.out, streams.err

    return run
