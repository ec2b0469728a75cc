"""Drawings of ``--plot``: refused before anything is computed, written whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_rev.errors import OutputError
from rwkv_rev.training.plots import plot_buckets, refuse_plot

pytest.importorskip("matplotlib")

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", ["notes.pdf", "text.png", "folder.png", "letter.png/curve.png", "."])
@pytest.mark.parametrize("command", ["eval", "bench"])
def test_refused_before_anything_is_read(
    cli: Cli,
    shallow: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr("rwkv_rev.training.evaluate.evaluate_directory", never)
    monkeypatch.setattr("rwkv_rev.benchmark.run.run_benchmark", never)
    (tmp_path / "folder.png").mkdir()
    for file in ("text.png", "letter.png"):
        (tmp_path / file).write_text("a letter")
    (tmp_path / "memory-by-context.png").write_text("a letter")
    place = tmp_path / name
    if command == "eval":
        code, out, err = cli("eval", shallow["5.2"], "--data", __file__, "--plot", place)
    elif name in ("notes.pdf", "folder.png"):
        pytest.skip("a folder may be named so")
    else:
        code, out, err = cli("bench", "training", "--quick", "--plot", place)
    assert (code, out) == (1, "") and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "unexpected" not in err
    assert (tmp_path / "text.png").read_text() == "a letter"


@pytest.mark.parametrize("name", ["memory-by-context.png", "speed-by-context.png"])
def test_bench_replaces_no_other_file(cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a letter")
    code, out, err = cli("bench", "training", "--quick", "--plot", tmp_path)
    assert (code, out) == (1, "") and name in err and "is no PNG file" in err
    assert (tmp_path / name).read_text() == "a letter"


def test_written_whole_and_again(tmp_path: Path) -> None:
    place = tmp_path / "new" / "curve.PNG"
    for _ in range(2):
        refuse_plot(place)
        plot_buckets(["0-1", "1-2"], {"model": [1.0, 0.5]}, place, "Title", "bits")
    assert [path.name for path in place.parent.iterdir()] == ["curve.PNG"]
    assert place.read_bytes().startswith(b"\x89PNG")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        plot_buckets(["0-1"], {"model": [1.0]}, tmp_path / "curve.png", "Title", "bits")
    assert not list(tmp_path.iterdir())


def test_what_was_measured_is_told_where_it_cannot_be_drawn(
    cli: Cli, shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OutputError("cannot write curve.png: No space left on device")

    monkeypatch.setattr("rwkv_rev.training.plots.plot_buckets", broken)
    (tmp_path / "data.txt").write_text("some words " * 20)
    code, out, err = cli(
        "eval",
        shallow["5.2"],
        "--data",
        tmp_path / "data.txt",
        "--device",
        "cpu",
        "--plot",
        tmp_path / "curve.png",
    )
    assert code == 1 and "bits/byte" in out and "No space left" in err
