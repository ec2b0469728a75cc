"""Numbers of tokens on the command line, by every command that takes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from rwkv_rev.cli.counts import count, counts


def test_units() -> None:
    assert [count(text) for text in ("1", "4096", "16k", "2K", "1m", 512)] == [
        1,
        4096,
        16384,
        2048,
        1 << 20,
        512,
    ]
    assert counts("4096,16k", "--lengths", count) == (4096, 16384)


@pytest.mark.parametrize("text", ["", "k", "0", "-3", "1.5k", "16kb", "١٦", "1e3"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="such as 4096, 16k or 1m"):
        count(text)


def test_every_command_takes_them(
    bundled: dict[str, Path], cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_text("some words " * 300)
    model = bundled["5.2"]
    for arguments in (
        ("inspect", model, "--context-length", "16k", "--chunk-length", "2k"),
        (
            "finetune",
            model,
            "--data",
            data,
            "--output",
            tmp_path / "out",
            "--context-length",
            "1k",
            "--dry-run",
        ),
        ("eval", model, "--data", data, "--context-length", "1k", "--device", "cpu"),
    ):
        code, out, err = cli(*arguments)
        assert code == 0, err
        assert "16,384" in out or "1,024" in out or "1024" in out
    code, _, err = cli("inspect", model, "--context-length", "16q")
    assert code == 2 and "16k or 1m" in err
