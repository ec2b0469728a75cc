"""The SOURCE grammar."""

from pathlib import Path

import pytest

from rwkv_rev.errors import SourceError
from rwkv_rev.folders.source import Source, parse_source


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "BlinkDL/rwkv-4-pile-169m",
        "BlinkDL/rwkv-5-world",
        "RWKV/rwkv-4-169m-pile",
        "RWKV/v5-Eagle-7B-HF",
        "a/b.c_d",
    ],
)
def test_hub_id(text: str) -> None:
    source = parse_source(text, file="*.pth", revision="main")
    assert source == Source("hub", text, "*.pth", "main")
    assert str(source) == text
    assert source.absolute() == source
    with pytest.raises(ValueError, match="resolve"):
        _ = source.path


def test_file_and_directory(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub/model.pth").write_bytes(b"x")
    assert parse_source("sub/model.pth") == Source("file", "sub/model.pth")
    assert parse_source("./sub", file="model.pth") == Source("directory", "./sub", "model.pth")
    assert parse_source("sub/model.pth").absolute() == Source("file", str(here / "sub/model.pth"))
    assert parse_source(str(here / "sub")).path == here / "sub"


def test_any_suffix_of_an_existing_file(here: Path) -> None:
    (here / "weights").write_bytes(b"x")
    assert parse_source("weights").kind == "file"


def test_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "m.pth").write_bytes(b"x")
    assert parse_source("~/m.pth").path == here / "m.pth"


def test_existing_path_wins_over_hub_id(here: Path) -> None:
    (here / "RWKV/v5").mkdir(parents=True)
    source = parse_source("RWKV/v5")
    assert source.kind == "directory"
    assert str(source) == "./RWKV/v5"  # cannot be taken for a Hub id when the directory is gone
    assert parse_source(str(source)).path.resolve() == source.path.resolve()


@pytest.mark.parametrize("name", ["rwkv-4", "rwkv-5.2", "rwkv-6", "rwkv-7"])
def test_bundled(name: str) -> None:
    source = parse_source(f"bundled:{name}")
    assert (source.kind, source.location, str(source)) == ("bundled", name, f"bundled:{name}")
    assert source.path.is_file()
    assert source.absolute() == source


@pytest.mark.parametrize(
    "text",
    [
        "BlinkDL/rwkv-4-pile-169m",
        "bundled:rwkv-4",
        "bundled:rwkv-5.2",
        "bundled:rwkv-6",
        "bundled:rwkv-7",
        "./d",
        "d",
        "d/m.pth",
    ],
)
def test_text_round_trip(here: Path, text: str) -> None:
    (here / "d").mkdir()
    (here / "d/m.pth").write_bytes(b"x")
    once = parse_source(text)
    again = parse_source(str(once))
    assert again.kind == once.kind
    assert str(again) == str(once)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no source"),
        ("a\nb", "no source"),
        ("missing.pth", "does not exist"),
        ("owner/missing.pth", "does not exist"),
        ("/no/such/place", "does not exist"),
        ("../nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("rwkv", "neither a path that exists nor a Hub id"),
        ("bundled:rwkv-3", "bundled:rwkv-4, bundled:rwkv-5.2, bundled:rwkv-6, bundled:rwkv-7"),
        ("bundled:", "bundled:rwkv-4"),
        ("https://huggingface.co/BlinkDL/rwkv-5-world", "owner/name"),
        ("x" * 5000, "cannot be looked at"),
        ("/dev/null", "is a device, not a regular file"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        parse_source(text)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_options_that_do_not_go_together(here: Path) -> None:
    (here / "m.pth").write_bytes(b"x")
    for text in ("m.pth", "bundled:rwkv-4", "."):
        with pytest.raises(SourceError, match="revision"):
            parse_source(text, revision="main")
    for text in ("m.pth", "bundled:rwkv-4"):
        with pytest.raises(SourceError, match="file"):
            parse_source(text, file="*.pth")
