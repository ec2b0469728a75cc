"""Every setting refuses what is of another kind or beyond sense, by name, from Python and from YAML files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_rev.errors import ConfigError
from rwkv_rev.training.config import FinetuneConfig, build_config

Cli = Callable[..., tuple[int, str, str]]
GOOD: dict[str, Any] = {"model": "m", "data": ["d.txt"], "output": "o"}
NAMES = [item.name for item in dataclasses.fields(FinetuneConfig)]


@pytest.mark.parametrize("name", NAMES)
def test_another_kind_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Mappings, dates, nested lists and lists where one value is expected; the file and Python alike."""
    for text in ("{a: 1}", "2024-01-01", "[[1]]", "[1, 2]"):
        (tmp_path / "run.yaml").write_text(f"{name}: {text}\n")
        with pytest.raises(ConfigError, match=f"^{name} = .* must be") as error:
            build_config(file=tmp_path / "run.yaml")
        assert "\n" not in str(error.value)
    for value in ({"a": 1}, [[1]], object(), b"x"):
        with pytest.raises(ConfigError, match=f"^{name} = .* must be"):
            FinetuneConfig(**(GOOD | {name: value})).check()


@pytest.mark.parametrize(
    "name", [name for name in NAMES if isinstance(getattr(FinetuneConfig(), name), int | float)]
)
def test_numbers_are_no_texts_from_python(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = '3' must be"):
        FinetuneConfig(**(GOOD | {name: "3"})).check()


def test_a_huge_value_is_shown_in_short() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(options={"seed": "x" * 10_000})
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1e300}, "epochs = 1e\\+300 must be at most"),
        ({"max_steps": 10**30}, "max_steps is a number of more than 63 bits"),
        ({"batch_size": 10**12}, "batch_size = 1000000000000 must be at most"),
        ({"grad_accum": 10**18}, "grad_accum = 1000000000000000000 must be at most"),
        ({"num_workers": 10_000}, "num_workers = 10000 must be at most 61"),
        ({"lora_rank": 10**12, "tune": "lora"}, "lora_rank = 1000000000000 must be at most"),
        ({"warmup": 1e300}, "warmup = 1e\\+300 must be at most"),
        ({"warmup": 5.5}, "warmup = 5.5 must be a whole number of steps, or a share below 1"),
        ({"warmup": -0.1}, "warmup = -0.1 must be at least 0"),
        ({"lora_alpha": 0.0, "tune": "lora"}, "lora_alpha = 0.0 must be above 0"),
        ({"lora_alpha": float("nan"), "tune": "lora"}, "lora_alpha = nan must be a finite number"),
        ({"lora_dropout": float("nan"), "tune": "lora"}, "lora_dropout = nan must be a finite number"),
        ({"lora_rank": 8}, "lora_rank belongs to tune='lora'; this run has tune = full"),
        (
            {"lora_alpha": 8.0, "tune": "state"},
            "lora_alpha belongs to tune='lora'; this run has tune = state",
        ),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0 must be at least 0"),
        ({"text_field": ""}, "text_field is empty; leave it out"),
        ({"text_field": "t", "prompt_field": "p", "completion_field": "c"}, "exclude each other"),
        ({"tape_dir": "."}, "tape_dir belongs to tape='disk'"),
        ({"tape_dir": "no/such", "tape": "disk"}, "tape_dir = 'no/such' is no folder"),
        ({"data": [""]}, "data holds an empty text"),
        ({"save_dtype": "int8"}, "save_dtype = 'int8' does not exist"),
        ({"report_to": "all"}, "report_to = 'all' does not exist"),
    ],
)
def test_beyond_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**(GOOD | changes)).check()


@pytest.mark.parametrize("targets", ["query", "", "key,wrong", "embeddings", "ln1"])
@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_wrong_targets_are_refused_before_the_model_is_loaded(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path, targets: str, more: tuple[str, ...]
) -> None:
    (tmp_path / "data.txt").write_text("some text\n" * 30)
    common = ("finetune", bundled["4"], "--data", "data.txt", "--output", "out", "--tune", "lora")
    code, out, err = cli(*common, "--set", f"lora_targets=[{targets or repr('')}]", *more)
    wrong = targets.split(",")[-1]
    assert (code, out) == (1, "")
    assert err == (
        f"error: lora_targets: no linear map is called {wrong!r}; there are key, output, receptance, value\n"
    )
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "-1"), "seed = -1 must be at least 0"),
        (("--lr", "nan"), "lr = nan must be a finite number"),
        (("--weight-decay", "inf"), "weight_decay = inf must be a finite number"),
        (("--set", f"context_length={10**15}"), f"context_length = {10**15} must be at most"),
        (("--set", "end_token=-3"), "end_token = -3 must be a token id"),
        (("--lora-rank", "8"), "lora_rank belongs to --tune lora"),
    ],
)
def test_dry_runs_refuse_as_runs_do(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "data.txt").write_text("some text\n" * 30)
    for more in (("--dry-run",), ()):
        code, out, err = cli(
            "finetune", bundled["4"], "--data", "data.txt", "--output", "out", *arguments, *more
        )
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
