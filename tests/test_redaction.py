"""A model folder says nothing about where on this machine anything lies, whoever looks and however it is uploaded."""

from pathlib import Path

import pytest
from finetune_cases import counting_text, finetune, settings
from foreign import blinkdl_state_dict

import rwkv_rev
from rwkv_rev.converters.export import export
from rwkv_rev.equivalence.verification import verify_directory
from rwkv_rev.folders.redaction import public, public_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/secret/a.txt", "a.txt"),
        ("/home/alice/my books/*.txt", "*.txt"),
        ("~/secret/a.txt", "a.txt"),
        ("C:\\Users\\alice\\a.txt", "a.txt"),
        ("\\\\server\\alice\\a.txt", "a.txt"),
        ("cannot read /home/alice/a.txt: gone", "cannot read a.txt: gone"),
        ("1,024 tokens/s and 3 / 4", "1,024 tokens/s and 3 / 4"),
        ("owner/name", "owner/name"),
        ("https://hf.co/owner/name", "https://hf.co/owner/name"),
        ("| 1e-6 | a/b |", "| 1e-6 | a/b |"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_settings_that_name_files() -> None:
    values = {
        "settings": {
            "model": "../alice/model",
            "data": ["alice/**/*.txt", "hf:owner/name:train", "./x.jsonl", "alice/corpus/"],
            "cache_dir": "x/alice",
            "lr": 0.1,
        },
        "notes": ["alice/x.txt is odd"],
        "output": Path("alice/out"),
    }
    assert public(values) == {
        "settings": {
            "model": "model",
            "data": ["*.txt", "hf:owner/name:train", "x.jsonl", "corpus"],
            "lr": 0.1,
        },
        "output": "out",
    }


def test_no_file_of_a_model_names_a_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources and data by absolute path, relative path and glob; and the source is still found."""
    import torch

    home = tmp_path / "alice" / "private"
    home.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    torch.save(blinkdl_state_dict("5.2", vocab=256, D=32, head_size=8), home / "a.pth")
    counting_text(home / "one.txt", 60)
    counting_text(home / "two.txt", 60)
    for source in (home / "a.pth", Path("alice/private/a.pth")):
        rwkv_rev.convert(source, "model", verify=True, force=True)
        assert not named(tmp_path / "model", "alice", str(tmp_path))
    assert verify_directory("model", oracle="naive", tokens=16).passed, "the original was found"
    config = settings(Path("model"), Path("alice/private/*.txt"), tmp_path / "out", max_steps=1)
    config.data += [str(home / "one.txt")]
    config.eval_data = ["alice/private/two.txt"]
    finetune(config)
    assert not named(tmp_path / "out", "alice", str(tmp_path))
    export(tmp_path / "out", tmp_path / "hf", to="hf")
    assert not named(tmp_path / "hf", "alice", str(tmp_path))


def named(folder: Path, *words: str) -> list[str]:
    """Files of a folder that hold one of the words."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    ]
