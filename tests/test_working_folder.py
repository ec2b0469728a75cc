"""What stands in OUTPUT.training that no run wrote stays there, whatever is asked for; what runs wrote goes."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import copied_run, finetune, stopped_run

from rwkv_rev.errors import CheckpointError, OutputError
from rwkv_rev.training import working_folder
from rwkv_rev.training.callbacks import read_log
from rwkv_rev.training.checkpoints import CHECKSUMS, checkpoints, damage
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.finetune import plan, run
from rwkv_rev.training.remains import foreign
from rwkv_rev.training.working_folder import refuse_output, resume_from

HAS_PIPES = pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")


@pytest.fixture(scope="module")
def stopped(
    shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinetuneConfig, Path]:
    return stopped_run(shallow["4"], tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def config(stopped: tuple[FinetuneConfig, Path], tmp_path: Path) -> FinetuneConfig:
    return copied_run(stopped, tmp_path)


PLACES = (
    "thesis.txt",
    "notes/thesis.txt",
    "checkpoint-4/thesis.txt",
    "checkpoint-4/notes/model.safetensors",
    "checkpoint-old/model.safetensors",
    "runs/thesis.txt",
    ".writing/thesis.txt",
    "log.jsonl.bak",
)


@pytest.mark.parametrize("how", [{}, {"resume": "auto"}, {"force": True}], ids=["", "resume", "force"])
@pytest.mark.parametrize("place", PLACES)
def test_files_of_somebody_else_are_refused_by_name(
    config: FinetuneConfig, place: str, how: dict[str, Any]
) -> None:
    path = config.working_directory / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("thesis")
    config = FinetuneConfig(**(config.to_dict() | {"resume": None} | how))
    for act in (plan, finetune):
        with pytest.raises(OutputError, match="which no run wrote: move it away") as error:
            act(config)
        assert place in str(error.value) and "\n" not in str(error.value)
    assert path.read_text() == "thesis" and len(checkpoints(config.working_directory)) == 2


def test_without_any_run_before(config: FinetuneConfig, tmp_path: Path) -> None:
    work = tmp_path / "g.training"
    (work / "sub").mkdir(parents=True)
    config = FinetuneConfig(**(config.to_dict() | {"output": str(tmp_path / "g"), "resume": None}))
    with pytest.raises(OutputError, match=r"g\.training holds sub, which no run wrote"):
        finetune(config)
    (work / "sub").rmdir()
    (work / ".DS_Store").write_text("of a file manager")
    assert finetune(config).steps == 4 and not work.exists()


def test_a_link_is_refused(config: FinetuneConfig, tmp_path: Path) -> None:
    """To whatever it points, inside the folder too."""
    work, victim = config.working_directory, tmp_path / "victim"
    work.rename(victim)
    work.symlink_to(victim)
    before = sorted(victim.rglob("*"))
    for changes in ({}, {"resume": None}, {"force": True, "resume": None}):
        with pytest.raises(OutputError, match=r"out\.training is a link; remove it yourself"):
            finetune(FinetuneConfig(**(config.to_dict() | changes)))
    assert sorted(victim.rglob("*")) == before
    work.unlink()
    work.mkdir()
    (work / "checkpoint-4").symlink_to(victim / "checkpoint-4")
    with pytest.raises(OutputError, match="holds checkpoint-4, which no run wrote"):
        finetune(config)
    assert sorted(victim.rglob("*")) == before


def test_what_runs_leave_is_known(config: FinetuneConfig) -> None:
    """Damaged or half-removed, too."""
    work = config.working_directory
    (work / ".log.jsonl").touch()
    (work / ".checkpoint-2.deleted" / "inner").mkdir(parents=True)
    (work / ".writing" / "checkpoint-5").mkdir(parents=True)
    (work / ".writing" / "checkpoint-5" / "half").touch()
    (work / "runs" / "today").mkdir(parents=True)
    (work / "runs" / "today" / "events.out.tfevents.1").touch()
    (work / "checkpoint-4" / CHECKSUMS).unlink()
    assert foreign(work) == []
    config = FinetuneConfig(**(config.to_dict() | {"resume": None, "force": True}))
    assert finetune(config).steps == 4 and not work.exists()


def test_what_is_put_there_meanwhile_stays(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkpoint that would go, and in the folder itself."""
    from rwkv_rev.training import trainer

    work = config.working_directory
    (work / "checkpoint-3").rename(work / "checkpoint-2")  # older ones go when one is written
    shutil.rmtree(work / "checkpoint-4")
    said: list[str] = []

    def seal(folder: Path) -> None:
        (work / "checkpoint-2" / "thesis.txt").write_text("thesis")
        sealed(folder)

    sealed = trainer.seal
    monkeypatch.setattr(trainer, "seal", seal)
    config = FinetuneConfig(**(config.to_dict() | {"save_total": 1}))
    run(config, notify=said.append, quiet=True)
    assert said[-1] == f"warning: {work} stays: it holds checkpoint-2/thesis.txt, which no run wrote"
    assert (work / "checkpoint-2" / "thesis.txt").read_text() == "thesis"
    assert [path.name for path in work.iterdir()] == ["checkpoint-2"]


@HAS_PIPES
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "link", "lost link", "file"])
def test_a_working_folder_that_is_none(config: FinetuneConfig, kind: str, force: bool) -> None:
    work = config.working_directory
    shutil.rmtree(work)
    if kind == "pipe":
        os.mkfifo(work)
    elif kind == "file":
        work.write_text("thesis")
    else:
        work.symlink_to(config.data[0] if kind == "link" else "nowhere")
    config = FinetuneConfig(**(config.to_dict() | {"resume": None, "force": force}))
    with pytest.raises(OutputError, match=r"is not a folder|is a link"):
        finetune(config)
    assert os.path.lexists(work)


@HAS_PIPES
@pytest.mark.parametrize("name", ["log.jsonl", ".lock", "checkpoint-4/optimizer.pt"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_something_else_of_a_name_of_ours(config: FinetuneConfig, name: str, kind: str) -> None:
    path = config.working_directory / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(config.data[0])
    before = sorted(config.working_directory.rglob("*"))
    with pytest.raises(OutputError, match=f"holds {name}, which no run wrote"):
        finetune(config)
    assert sorted(config.working_directory.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_is_closed(config: FinetuneConfig) -> None:
    config.working_directory.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot write .*no permission"):
        refuse_output(config)


def test_a_lock_that_cannot_be_taken(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(working_folder.FileLock, "acquire", fails)
    with pytest.raises(OutputError, match=r"cannot write .*Permission denied; choose another"):
        finetune(config)


# Checksums that hang or break their reader


@HAS_PIPES
@pytest.mark.parametrize("name", [CHECKSUMS, "optimizer.pt"])
def test_a_pipe_in_a_checkpoint_is_damage(config: FinetuneConfig, tmp_path: Path, name: str) -> None:
    """Of a checkpoint that is named, outside the working folder."""
    (config.working_directory / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / name
    path.unlink()
    os.mkfifo(path)
    config = FinetuneConfig(**(config.to_dict() | {"resume": str(path.parent)}))
    with pytest.raises(CheckpointError, match=f"is damaged: {name} is no regular file"):
        plan(config)


@pytest.mark.parametrize("text", ["[" * 20_000, '{"model.safetensors": {"bytes": Infinity, "crc32": "0"}}'])
def test_checksums_that_no_run_wrote(config: FinetuneConfig, text: str) -> None:
    older, newest = checkpoints(config.working_directory)
    (newest / CHECKSUMS).write_text(text)
    assert damage(newest) == f"{CHECKSUMS} cannot be read"
    assert resume_from(config)[0] == older


# The log


def rewritten(change: Any, text: str) -> str:
    lines = [json.loads(line) for line in text.splitlines()]
    return "".join(json.dumps(line) + "\n" for line in change(lines))


DAMAGES = {
    "missing": lambda text: None,
    "empty": lambda text: "",
    "doubled": lambda text: text + text,
    "cut": lambda text: text[: len(text) // 2],
    "edited": lambda text: rewritten(lambda rows: [{**rows[0], "loss": 1.0}, *rows[1:]], text),
    "no JSON": lambda text: "[" * 20_000 + text,
    "no text": lambda text: "\udc80" + text,
}


@pytest.mark.parametrize("kind", ["whole", "longer", *DAMAGES])
def test_a_damaged_log_is_named_and_rebuilt(config: FinetuneConfig, kind: str) -> None:
    """From the rows in the checkpoint; rows after it, of steps that a kill undid, are no damage."""
    log = config.working_directory / "log.jsonl"
    whole = log.read_text("utf-8")
    if kind == "longer":
        log.write_text(whole + '{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    elif (text := DAMAGES.get(kind, str)(whole)) is None:
        log.unlink()
    else:
        log.write_text(text, "utf-8", "surrogateescape")
    said: list[str] = []
    result = run(config, notify=said.append, quiet=True)
    warnings = [line for line in said if "log.jsonl" in line]
    expected = "warning: log.jsonl is not what was written; its rows are taken from checkpoint-4"
    assert warnings == ([] if kind in ("whole", "longer") else [expected])
    rows = [json.loads(line) for line in whole.splitlines()]
    assert read_log(result.output / "training" / "log.jsonl") == rows and len(rows) == 4
