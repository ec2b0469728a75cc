"""What reaches the terminal: escaped, short, and one line where one line is promised."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import blinkdl_state_dict
from safetensors.torch import save_file

from rwkv_rev.cli import main
from rwkv_rev.cli import output as out
from rwkv_rev.printable import MOST_LINE, counted, one_message, printable, shortened

Cli = Callable[..., tuple[int, str, str]]
NASTY = {
    "escape sequence": "\x1b[2J\x1b[31mowned",
    "C1": "\x9b2Jowned",
    "line end": "a\nerror: all is well\r",
    "right to left": "a\u202egnp.exe",
    "zero width": "a\u200b\ufeffb",
    "line separator": "a\u2028b\x85c",
    "bell and backspace": "a\x07\x08\x7f",
    "surrogate": "a\udcffb",
    "null": "a\0b",
}


@pytest.mark.parametrize("kind", NASTY)
def test_printable(kind: str) -> None:
    found = printable(NASTY[kind])
    assert found.isprintable() and found.encode()
    assert found.encode().decode("unicode_escape").encode("utf-8", "surrogatepass") == NASTY[kind].encode(
        "utf-8", "surrogatepass"
    )


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("", "a b", "Grüße, 漢字 🙂, naïve", "C:\\folder\\x1b"):
        assert printable(text) == text == shortened(text) == one_message(text)
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_shortened() -> None:
    text = "a" * 2_000_000 + "\x1b" * 30
    found = shortened(text)
    assert found.startswith("aaa") and "(2,000,030 characters)" in found and found.endswith("\\x1b")
    assert len(found) < 260
    assert len(one_message(ValueError(text))) < 1.5 * MOST_LINE
    assert one_message(ValueError()) == "ValueError"


def clean(text: str) -> bool:
    return text.replace("\n", "").isprintable() and len(text) < 3 * MOST_LINE


@pytest.mark.parametrize("kind", [kind for kind in NASTY if kind not in ("surrogate", "null")])
def test_names_of_tensors(cli: Cli, tmp_path: Path, kind: str) -> None:
    state = blinkdl_state_dict("5.2") | {f"blocks.0.{NASTY[kind]}": torch.ones(2)}
    torch.save(state, tmp_path / "m.pth")
    save_file(state, tmp_path / "m.safetensors")
    for source in ("m.pth", "m.safetensors"):
        for arguments in (("convert", source, "--output", "x"), ("inspect", source)):
            code, found, err = cli(*arguments)
            assert (code, found, err.count("\n")) == (1, "", 1)
            assert clean(err) and printable(NASTY[kind]) in err


@pytest.mark.parametrize("form", ["m.pth", "m.safetensors"])
def test_a_name_of_two_megabytes(cli: Cli, tmp_path: Path, form: str) -> None:
    state = blinkdl_state_dict("5.2") | {"blocks.0." + "x" * 2_000_000: torch.ones(2)}
    (torch.save if form == "m.pth" else save_file)(state, tmp_path / form)
    code, _, err = cli("inspect", form)
    assert (code, err.count("\n")) == (1, 1)
    assert "impossible name" in err and "(2,000,009 characters)" in err and len(err) < 600


@pytest.mark.skipif(sys.platform == "win32", reason="such names are no names of files there")
@pytest.mark.parametrize("kind", [kind for kind in NASTY if kind != "null"])
def test_names_of_files(cli: Cli, tmp_path: Path, shallow: dict[str, Path], kind: str) -> None:
    """In errors, tables, fields and notes, of every command that names a path."""
    name = NASTY[kind]
    shutil.copytree(shallow["5.2"], tmp_path / name)
    (tmp_path / "folder").mkdir()
    for suffix in ("1.pth", "2.pth"):
        (tmp_path / "folder" / f"{name}{suffix}").write_bytes(b"short")
    (tmp_path / f"{name}.txt").write_text("some text")
    for arguments in (
        ("convert", "folder"),
        ("convert", f"folder/{name}1.pth"),
        ("inspect", name),
        ("inspect", f"./{name}/config.json"),
        ("export", name, "--output", f"{name}.pth"),
        ("export", name, "--output", f"{name}.pth"),
        ("convert", f"{shallow['4']}.pth", "--output", f"{name}-2", "--no-verify"),
        ("eval", name, "--data", f"{name}.txt", "--context-length", 8, "--cache-dir", "cache"),
        ("eval", name, "--data", f"{name}.md", "--context-length", 8),
        (
            "finetune",
            name,
            "--data",
            f"{name}.txt",
            "--output",
            f"{name}-3",
            "--dry-run",
            "--cache-dir",
            "cache",
        ),
        ("verify", name, "--oracle", "naive", "--tokens", 4, "--no-reversal", "--no-gradients"),
    ):
        code, found, err = cli(*arguments)
        assert clean(found) and clean(err), arguments
        assert code == 0 or (err.startswith("error: ") and err.count("\n") == 1), err
        assert "unexpected" not in err


def test_fields_of_records(cli: Cli, tmp_path: Path, bundled: dict[str, Path]) -> None:
    for number, key in enumerate([*NASTY.values(), "x" * 2_000_000]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({key: "a"}) + "\n")
        code, _, err = cli("eval", bundled["4"], "--data", path, "--cache-dir", tmp_path / "cache")
        assert (code, err.count("\n")) == (1, 1)
        assert "no field 'text'" in err and clean(err)


def test_json_documents_are_escaped_and_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"names": [*NASTY.values(), "Grüße 漢字"]}
    out.print_json(value)
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and "漢字" in text
    assert json.loads(text) == value


def test_tables_fields_notes_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    for nasty in NASTY.values():
        out.print_table(f"title {nasty}".replace("\n", " "), ["a", ">b"], [[nasty, 1]])
        out.print_fields(f"title {nasty}".replace("\n", " "), {"name": nasty})
        out.print_text(nasty)
        out.note(nasty)
        streams = capsys.readouterr()
        assert clean(streams.out) and clean(streams.err)
        assert streams.err.count("\n") == 1


def test_a_path_is_raw_for_programs_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out.print_path(Path("a\x1bb"))
    assert capsys.readouterr().out == "a\x1bb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out.print_path(Path("a\x1bb"))
    assert capsys.readouterr().out == "a\\x1bb\n"


def test_warnings(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn(NASTY["escape sequence"] + NASTY["line end"] + "x" * 100_000, stacklevel=1)
        raise RuntimeError(NASTY["escape sequence"] + "\n")

    monkeypatch.setattr("rwkv_rev.converters.inspection.inspect_source", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = cli("inspect", "bundled:rwkv-4")
    assert (code, err.count("\n")) == (1, 2) and clean(err)
    assert err.startswith("warning: ") and "error: unexpected RuntimeError: \\x1b" in err


def test_usage_errors(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "bundled:rwkv-4", NASTY["escape sequence"]])
    assert "\x1b" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (12345, "12,345 files")]
)
def test_numbers_agree(count: int, said: str) -> None:
    assert counted(count, "file") == said
