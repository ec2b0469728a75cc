"""Where this machine's user keeps what can be made again."""

from pathlib import Path

import pytest

from rwkv_rev.folders.user_cache import user_cache


def test_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RWKV_REV_CACHE", str(tmp_path / "own"))
    assert user_cache("tokens") == tmp_path / "own" / "tokens"
    monkeypatch.delenv("RWKV_REV_CACHE")
    assert user_cache("sources").parts[-2:] == ("rwkv-rev", "sources")
