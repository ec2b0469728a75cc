"""``keep_best``, ``patience`` and ``save_total``: what stays, what OUTPUT holds, when a run ends, and after a kill."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from safetensors.torch import load_file

from rwkv_rev.errors import CheckpointError, ConfigError
from rwkv_rev.training.best import best_step, held_out_losses, never_better, without_improvement
from rwkv_rev.training.callbacks import StopAtBadLoss
from rwkv_rev.training.checkpoints import checkpoints
from rwkv_rev.training.config import FinetuneConfig, build_config
from rwkv_rev.training.finetune import FinetuneResult, plan
from rwkv_rev.training.trainer import RwkvRevTrainer

FALLS_THEN_RISES = {1: 3.0, 2: 2.0} | {step: float(step) for step in range(3, 9)}


def rows(*held_out: float | None) -> list[dict[str, Any]]:
    """A log with training rows between evaluations at steps 0, 1, 2, ..."""
    return [
        row
        for step, loss in enumerate(held_out)
        for row in ({"step": step, "loss": 0.0}, {"step": step, "eval_loss": loss})
    ]


def test_the_best_step_by_the_log() -> None:
    assert best_step([]) is None and best_step(rows(1.0)) is None, (
        "the one before the first step does not count"
    )
    assert best_step(rows(0.5, 3.0, 2.0, 2.0, 9.0)) == 2, "of equal ones the earlier"
    assert best_step(rows(0.5, math.nan, None, math.inf)) is None
    assert best_step(rows(0.5, math.nan, 7.0, None)) == 2
    assert held_out_losses(rows(1.0, math.nan, None)) == {1: math.inf, 2: math.inf}


def test_evaluations_without_improvement() -> None:
    assert without_improvement(rows(0.1, 3.0, 2.0, 2.0, 2.5)) == (2, 2)
    assert without_improvement(rows(0.1, 3.0, 3.1, 2.9)) == (0, 3)
    assert without_improvement(rows(0.1, math.nan, math.nan)) == (2, None)
    slow = rows(9.0, 3.0, 2.9, 2.8, 2.7)
    assert without_improvement(slow, 0.15) == (1, 3), "what falls slowly falls, in the end"
    assert without_improvement(slow, 1.0) == (3, 1)


def test_no_step_better_than_the_beginning() -> None:
    assert never_better(rows(2.0, 3.0, 1.9)) is None
    assert never_better(rows(2.0, math.nan)) is None and never_better([]) is None
    assert never_better(rows(2.0)) is None and never_better(rows(None, 3.0)) is None
    said = never_better(rows(2.0, 3.0, 2.5, 2.6))
    assert said is not None and "was 2.0000 before the first step and 2.5000 after step 2" in said
    assert never_better(rows(2.0, 2.0)) is not None, "as good is not better"


@contextmanager
def held_out(scripted: dict[int, float]) -> Iterator[None]:
    """Inside, the held-out loss is scripted by step, whatever the model."""
    evaluate = RwkvRevTrainer.evaluate

    def scripted_evaluate(trainer: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        log = trainer.log
        loss = scripted.get(trainer.state.global_step, 99.0)
        trainer.log = lambda row, *rest: log(row | ({"eval_loss": loss, "eval_bits_per_byte": loss}))
        try:
            return evaluate(trainer, *args, **kwargs)
        finally:
            del trainer.log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RwkvRevTrainer, "evaluate", scripted_evaluate)
        yield


class Interrupted(Exception):
    pass


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    def stop(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == step and logs and "loss" in logs:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopAtBadLoss, "on_log", stop)
        with pytest.raises(Interrupted):
            yield


Settings = Callable[..., FinetuneConfig]


@pytest.fixture
def config(shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    data = counting_text(tmp_path / "data.txt", 100)

    def make(output: str = "out", version: str = "4", **changes: Any) -> FinetuneConfig:
        values = {
            "context_length": 32,
            "chunk_length": 16,
            "batch_size": 1,
            "max_steps": 4,
            "save_every": 0,
            "lr": 1e-2,
            "lr_schedule": "constant",
            "eval_data": [str(data)],
            "eval_every": 1,
            "eval_tokens": 32,
        }
        return settings(shallow[version], data, tmp_path / output, **(values | changes))

    return make


def weights(output: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(output) / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tune", ["full", "lora", "state"])
def test_a_kill_between_two_checkpoints(config: Settings, tune: str) -> None:
    """The output holds the best step, bit for bit what a run that ends there has, and all that it says agrees."""
    more: dict[str, Any] = {"tune": tune, "version": "5.2" if tune == "state" else "4"}
    more |= {"lora_rank": 4, "lora_dropout": 0.2} if tune == "lora" else {}
    settings = config(keep_best=True, save_total=1, save_every=3, **more)
    with held_out(FALLS_THEN_RISES):
        with killed_at(4):
            finetune(settings)
        there = [path.name for path in checkpoints(settings.working_directory)]
        assert there == ["checkpoint-2", "checkpoint-3"]
        result = finetune(replace(settings, resume="auto"))
    assert (result.steps, result.best_step, result.held_out) == (4, 2, (99.0, 2.0))
    assert result.to_dict()["best_step"] == 2 and len(losses(result.output)) == 4
    assert "step 2, the lowest held-out loss" in (result.output / "README.md").read_text("utf-8")
    finetune(config("two", max_steps=2, eval_every=0, **more))
    assert same(weights("out"), weights("two"))
    summary = json.loads((result.output / "training" / "summary.json").read_text("utf-8"))["result"]
    assert FinetuneResult.from_dict(summary, result.output) == replace(
        result, process_bytes=summary["process_bytes"]
    )


def test_a_kill_before_the_best_step(config: Settings) -> None:
    """Of which there is no checkpoint then; and a kill while the output was written, when all is trained."""
    settings = config(keep_best=True, save_total=1, save_every=1)
    with held_out(FALLS_THEN_RISES):
        with killed_at(2):
            finetune(settings)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
            finetune(replace(settings, resume="auto"))
        names = [path.name for path in checkpoints(settings.working_directory)]
        assert names == ["checkpoint-2", "checkpoint-4"]
        two = weights(settings.working_directory / names[0])
        result = finetune(replace(settings, resume="auto"))
    assert result.best_step == 2
    after = weights(settings.output)
    assert all(torch.equal(after[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize("total", [1, 2])
def test_what_stays(config: Settings, total: int) -> None:
    """The newest ``save_total`` checkpoints, and the best one however old it is."""
    for keep_best, before in ((True, [2]), (False, [])):
        settings = config(str(keep_best), keep_best=keep_best, save_total=total, save_every=1, max_steps=5)
        with held_out(FALLS_THEN_RISES), killed_at(5):
            finetune(settings)
        wanted = sorted({*before, *range(5 - total, 5)})
        there = [path.name for path in checkpoints(settings.working_directory)]
        assert there == [f"checkpoint-{step}" for step in wanted]


def test_a_best_checkpoint_that_is_gone_or_damaged(config: Settings) -> None:
    """One warning by name, and the best of what is there."""
    settings = config(keep_best=True, save_total=9, save_every=1)
    with held_out(FALLS_THEN_RISES), killed_at(4):
        finetune(settings)
    kept = Path("kept")
    shutil.copytree(settings.working_directory, kept)
    with (settings.working_directory / "checkpoint-2" / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"damaged!")
    one = weights(kept / "checkpoint-1")
    told: list[str] = []
    with held_out(FALLS_THEN_RISES):
        result = finetune(replace(settings, resume="auto"), notify=told.append)
    (line,) = [line for line in told if "lowest held-out loss" in line]
    assert re.fullmatch(
        r"warning: step 2 has the lowest held-out loss, but .*checkpoint-2 is damaged: model.safetensors is not what "
        "was written; the best of what is there is kept",
        line,
    )
    after = weights("out")
    assert result.best_step == 1 and all(torch.equal(after[name], tensor) for name, tensor in one.items())
    # named from elsewhere: what was before lies beside it
    shutil.rmtree(kept / "checkpoint-2")
    told.clear()
    with held_out(FALLS_THEN_RISES):
        changed = replace(settings, output="elsewhere", resume=str(kept / "checkpoint-3"))
        result = finetune(changed, notify=told.append)
    assert result.best_step == 1 and any("checkpoint-2 is not there" in line for line in told)
    assert (kept / "checkpoint-1").is_dir(), "read, and left there"


def test_patience(config: Settings) -> None:
    """One line, whole outputs, and the weights of the step where it stopped."""
    told: list[str] = []
    with held_out(FALLS_THEN_RISES):
        result = finetune(config(patience=2, max_steps=8), notify=told.append)
    stops = [line for line in told if line.startswith("stopping")]
    assert stops == ["stopping after step 4 of 8: no lower held-out loss in 2 evaluations since step 2"]
    assert (result.steps, result.planned_steps, result.best_step) == (4, 8, None)
    assert len(losses(result.output)) == 4 and not Path("out.training").exists()
    finetune(config("four", eval_every=0))
    assert same(weights("out"), weights("four"))


def test_a_minimum_delta(config: Settings) -> None:
    with held_out({step: 5.0 - 0.1 * step for step in range(1, 9)}):
        assert finetune(config(patience=1, max_steps=4)).steps == 4
        assert finetune(config("other", patience=2, max_steps=4, min_delta=0.5)).steps == 3


def test_a_resumed_run_goes_on_counting(config: Settings) -> None:
    """And one that was killed when it had stopped, but before its output was whole, has nothing left to train."""
    settings = config(patience=3, save_every=2, max_steps=8)
    with held_out(FALLS_THEN_RISES):
        with killed_at(5):
            finetune(settings)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
            finetune(replace(settings, resume="auto"))
        assert [path.name for path in checkpoints(settings.working_directory)] == [
            "checkpoint-4",
            "checkpoint-5",
        ]
        shutil.copytree(settings.working_directory, "more.training")
        told: list[str] = []
        result = finetune(replace(settings, resume="auto"), notify=told.append)
        more = finetune(replace(settings, output="more", resume="auto", patience=4))
    assert result.steps == 5 and sum(line.startswith("stopping after step 5 of 8") for line in told) == 1
    assert more.steps == 6, "with more patience it goes on"


def test_losses_of_another_held_out_text(config: Settings, tmp_path: Path) -> None:
    settings = config(save_every=1, patience=4)
    with killed_at(2):
        finetune(settings)
    other = counting_text(tmp_path / "other.txt", 50)
    for changes in ({"eval_data": [str(other)]}, {"eval_tokens": 16}):
        with pytest.raises(
            CheckpointError, match=r"has held-out losses of another eval_data or eval_tokens, .*keep_best"
        ):
            plan(replace(settings, resume="auto", **changes))
        plan(replace(settings, resume="auto", patience=None, **changes))
    plan(replace(settings, resume="auto", patience=2, keep_best=True, save_total=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep_best": True, "eval_every": 0, "eval_data": []},
            "^keep_best=True needs held-out text, .*: eval_data=FILE",
        ),
        ({"patience": 2, "eval_every": 0, "eval_data": []}, "^patience needs held-out text, .*eval_every=N"),
        ({"keep_best": True, "eval_every": 0}, "^keep_best=True needs evaluations on the way: eval_every=N"),
        ({"patience": 2, "eval_every": 0}, "^patience needs evaluations on the way: eval_every=N"),
        ({"patience": 0}, "^patience = 0 must be at least 1"),
        ({"save_total": 0}, "^save_total = 0 must be at least 1"),
        ({"min_delta": 0.1}, "^min_delta belongs to patience=N; this run has none"),
        ({"min_delta": -0.1, "patience": 1}, "^min_delta = -0.1 must be at least 0"),
        ({"min_delta": math.nan, "patience": 1}, "^min_delta = nan must be a finite number"),
    ],
)
def test_refusals(config: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config(**changes).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("keep", "save_total"),
        ("save_total_limit", "save_total"),
        ("early_stopping_patience", "patience"),
        ("load_best_model_at_end", "keep_best"),
    ],
)
def test_names_elsewhere(name: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is not a setting; did you mean {ours}\?"):
        build_config(pairs=[f"{name}=2"])


def test_the_command_line(
    cli: Callable[..., tuple[int, str, str]],
    config: Settings,
    shallow: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "rwkv_rev.training.saving.has_matplotlib", lambda: False
    )  # a curve takes as long as a run
    common = ["finetune", shallow["4"], "--data", "data.txt", "--output", "out", "--device", "cpu"]
    common += ["--context-length", 32, "--chunk-length", 16, "--max-steps", 8, "--keep-best"]
    common += ["--eval-data", "data.txt", "--eval-every", 1, "--patience", 2, "--save-total", 1]
    common += ["--set", "eval_tokens=32"]
    code, out, _ = cli(*common, "--dry-run")
    assert code == 0 and re.search(r"keep_best +True", out) and re.search(r"patience +2", out)
    assert re.search(r"save_total +1", out)
    code, out, _ = cli(*common, "--dry-run", "--json")
    shown = json.loads(out)["settings"]
    assert (shown["keep_best"], shown["patience"], shown["save_total"]) == (True, 2, 1)
    with held_out(FALLS_THEN_RISES | {0: 1.5}):
        code, out, err = cli(*common)
        assert code == 0, err
        printed = " ".join(out.split())
        assert "steps 4 of 8" in printed and "kept step 2, the lowest held-out loss" in printed
        assert err.count("stopping after step 4 of 8") == 1 and err.count("no lower held-out loss") == 1
        assert "no step was better" in err and "none was lower than before the first step" in printed
        code, out, err = cli(*common, "--force", "--json")
        assert err.count("warning: no step was better than the beginning: the held-out loss was") == 1
        values = json.loads(out)
        assert (code, values["steps"], values["planned_steps"], values["best_step"]) == (0, 4, 8, 2)
    with held_out(FALLS_THEN_RISES | {0: 9.0}):
        code, out, err = cli(*common, "--force")
        assert code == 0 and "no step was better" not in err and "none was lower" not in " ".join(out.split())
    code, out, err = cli(*common[: common.index("--eval-data")])
    assert (
        (code, out) == (2, "")
        and err.startswith("error: --keep-best needs held-out text")
        and err.count("\n") == 1
    )
