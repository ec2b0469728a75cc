"""Checkpoints that are no longer what was written: named, and passed over for the newest whole one."""

import shutil
from pathlib import Path

import pytest
from finetune_cases import copied_run, finetune, stopped_run
from safetensors.torch import load_file

from rwkv_rev.errors import CheckpointError, OutputError
from rwkv_rev.training.checkpoints import CHECKSUMS, checkpoints, damage, seal
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.finetune import plan, run
from rwkv_rev.training.working_folder import resume_from


@pytest.fixture(scope="module")
def stopped(
    shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinetuneConfig, Path]:
    return stopped_run(shallow["4"], tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def config(stopped: tuple[FinetuneConfig, Path], tmp_path: Path) -> FinetuneConfig:
    return copied_run(stopped, tmp_path)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    CHECKSUMS,
)


@pytest.mark.parametrize("name", [*FILES, "rwkv_rev_run.json"])
def test_a_missing_file_is_named(config: FinetuneConfig, name: str) -> None:
    older, newest = checkpoints(config.working_directory)
    assert (damage(older), damage(newest)) == (None, None)
    (newest / name).unlink()
    assert resume_from(config) == (older, [f"{newest} is damaged and passed over: {name} is missing"])


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_flipped_bit_is_named(config: FinetuneConfig, name: str) -> None:
    older, newest = checkpoints(config.working_directory)
    flip(newest / name)
    assert resume_from(config) == (
        older,
        [f"{newest} is damaged and passed over: {name} is not what was written"],
    )


def test_damaged_checksums_and_short_files(config: FinetuneConfig) -> None:
    _, newest = checkpoints(config.working_directory)
    path = newest / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert "optimizer.pt has" in str(damage(newest)) and "bytes instead of" in str(damage(newest))
    for text in ("", "[]", '{"a": 1}', '{"a": {"bytes": 1}}', "{}", "\udc80"):
        (newest / CHECKSUMS).write_text(text, "utf-8", "surrogateescape")
        assert "checksums.json" in str(damage(newest)), text


def test_the_run_goes_on_from_the_newest_whole_one(config: FinetuneConfig, tmp_path: Path) -> None:
    """And ends as if nothing had been damaged; ``save_total`` counts no later checkpoint as one of the newest."""
    older, newest = checkpoints(config.working_directory)
    expected = load_file(newest / "model.safetensors")
    flip(newest / "optimizer.pt")
    config.save_total = 1
    said: list[str] = []
    run(config, notify=said.append, quiet=True)
    assert f"warning: {newest} is damaged and passed over: optimizer.pt is not what was written" in said
    assert f"resuming from {older}" in said
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_keep_counts_the_checkpoints_before_the_present_one(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = config.working_directory / "checkpoint-100"
    shutil.copytree(config.working_directory / "checkpoint-4", later)
    flip(later / "optimizer.pt")
    flip(config.working_directory / "checkpoint-4" / "optimizer.pt")
    config.save_total = 1
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(config)
    assert [path.name for path in checkpoints(config.working_directory)] == ["checkpoint-4", "checkpoint-100"]
    assert damage(config.working_directory / "checkpoint-4") is None


def test_a_named_one_is_refused_in_one_line(config: FinetuneConfig) -> None:
    older, newest = checkpoints(config.working_directory)
    flip(newest / "rng_state.pth")
    config.resume = str(newest)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 is damaged: rng_state\.pth is not what"
    ) as error:
        plan(config)
    assert "resume='auto'" in str(error.value) and "\n" not in str(error.value)
    config.resume = str(older)
    assert plan(config).resume_from == older


def test_without_a_whole_one_nothing_begins_in_silence(config: FinetuneConfig) -> None:
    for path in checkpoints(config.working_directory):
        flip(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that is whole .* force=True begins anew"):
        plan(config)


def test_checksums_are_there_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint is sealed with covers every file in it, those in folders too."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "rwkv_rev_run.json").write_text("{}")
    (tmp_path / "inner" / "file").write_bytes(b"abc")
    seal(tmp_path)
    assert damage(tmp_path) is None
    flip(tmp_path / "inner" / "file")
    assert damage(tmp_path) == "inner/file is not what was written"


def test_a_run_that_was_finished_is_not_trained_again(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after OUTPUT was renamed, while the working folder was being removed."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.remove", lambda *_: 1 / 0)
        finetune(config)
    output = tmp_path / "out"
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert output.is_dir() and config.working_directory.is_dir()
    other = FinetuneConfig(**(config.to_dict() | {"lr": 0.5}))
    with pytest.raises(Exception, match="already exists; pass force=True"):
        plan(other)
    for changes, message in (
        (
            {},
            r"out is finished already: this very run has made it, nothing is left to train \(resume='auto' takes",
        ),
        ({"lr": 0.5}, "already exists; pass force=True"),
        (
            {"lr": 0.5, "seed": 1, "save_dtype": "bfloat16"},
            r"\(another run has made it: lr was \S+ and is now 0.5, seed was 0 and is now 1, "
            r"save_dtype was auto and is now bfloat16\)$",
        ),
        (
            {"keep_best": True, "eval_data": config.data, "eval_every": 2},
            "keep_best was False and is now True",
        ),
    ):
        with pytest.raises(OutputError, match=message):
            plan(FinetuneConfig(**(config.to_dict() | {"resume": None} | changes)))
    *older, newest = checkpoints(config.working_directory)
    assert older
    newest.rename(tmp_path / "gone")
    for checkpoint in older:
        (checkpoint / CHECKSUMS).unlink()
    said: list[str] = []
    result = run(config, notify=said.append, quiet=True)
    assert said[-1] == f"{output} is whole already: nothing is left to train"
    assert result.steps == 4 and result.last_loss > 0 and result.output == output
    assert (
        output / "model.safetensors"
    ).stat().st_mtime_ns == before and not config.working_directory.exists()
    assert run(config, quiet=True) == result, "as often as it is asked for"
    elsewhere = {"save_every": 3, "save_total": 1, "log_every": 2, "chunk_length": 8}
    assert run(FinetuneConfig(**(config.to_dict() | elsewhere)), quiet=True) == result, (
        "saved, told, cut otherwise"
    )
