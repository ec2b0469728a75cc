"""What is copied from one model folder into another: files of a list, and no link's target but the Hub cache's own."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import counting_text, finetune, settings

from rwkv_rev.converters.export import export
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.folder import refuse_links, tokenizer_files
from rwkv_rev.training.saving import save_finetuned

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


@pytest.fixture
def model(bundled: dict[str, Path], tmp_path: Path) -> Path:
    copy = shutil.copytree(bundled["5.2"], tmp_path / "model")
    (tmp_path / "private.txt").write_text("secret words")
    return copy


def words(folder: Path) -> list[str]:
    return [
        path.name for path in folder.rglob("*") if path.is_file() and b"secret words" in path.read_bytes()
    ]


def test_finetune_copies_no_link_and_no_stranger(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the model, nor out of its own working folder, where somebody may put one while it runs."""
    (model / "notes.txt").symlink_to(tmp_path / "private.txt")
    (model / ".env").write_text("secret words")
    events = tmp_path / "out.training" / "runs"

    def save(*values: Any) -> None:
        events.mkdir()
        (events / "link").symlink_to(tmp_path / "private.txt")
        save_finetuned(*values)

    monkeypatch.setattr("rwkv_rev.training.finetune.save_finetuned", save)
    finetune(settings(model, counting_text(tmp_path / "data.txt", 60), tmp_path / "out", max_steps=1))
    assert not words(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (events / "link").is_symlink()
    export(model, tmp_path / "hf", to="hf")
    assert not words(tmp_path / "hf")


@pytest.mark.parametrize("name", ["chat_template.jinja", "conversion.json", "generation_config.json"])
def test_a_link_under_a_known_name_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "private.txt")
    with pytest.raises(CheckpointError, match=f"{name} is a link to a file outside the model"):
        finetune(settings(model, counting_text(tmp_path / "data.txt", 60), tmp_path / "out", max_steps=1))
    with pytest.raises(CheckpointError, match="is a link"):
        export(model, tmp_path / "hf", to="hf")
    assert not (tmp_path / "out").exists() and not (tmp_path / "hf").exists()


def test_a_pipe_is_refused(model: Path) -> None:
    os.mkfifo(model / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is not a regular file"):
        tokenizer_files(model)


def test_links_of_the_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    """Into the blobs of the same repository, and no further."""
    repository = tmp_path / "models--me--tuned"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert {path.name for path in tokenizer_files(snapshot)} >= {"tokenizer.json", "tokenizer_config.json"}
    export(snapshot, tmp_path / "hf", to="hf")
    (snapshot / "vocab.txt").symlink_to(Path("..", "..", "..", "private.txt"))
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link"):
        refuse_links(snapshot)
    (snapshot / "vocab.txt").unlink()
    (repository / "blobs" / "x").symlink_to(tmp_path / "private.txt")
    (snapshot / "vocab.txt").symlink_to(Path("..", "..", "blobs", "x"))
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link"):
        refuse_links(snapshot)
