"""Fixtures shared by the tests: one thread each, and the bundled checkpoints converted once a session."""

from pathlib import Path

import pytest
import torch

import rwkv_rev

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
