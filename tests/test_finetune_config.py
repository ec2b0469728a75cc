"""Settings: where they come from, which are refused, and what the message names."""

import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import settings

from rwkv_rev.errors import ConfigError, StrategyError
from rwkv_rev.training.config import FinetuneConfig, build_config
from rwkv_rev.training.planning import plan

GOOD: dict[str, Any] = {"model": "m", "data": ["d.txt"], "output": "o"}


def test_options_and_pairs_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nbatch-size: 4\nseed: 1\ndata: one.txt\n")
    config = build_config(file=file, pairs=["batch_size=5"], options={"seed": 3, "lr": None})
    assert (config.lr, config.batch_size, config.seed, config.data) == (1e-3, 5, 3, ["one.txt"])


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("lr=1e-4", 1e-4),
        ("lr=2", 2.0),
        ("max_steps=null", None),
        ("end_token=0", 0),
        ("end_token=none", "none"),
        ("pack=true", True),
        ("lora_targets=[key, value]", ["key", "value"]),
        ("lora_targets=key", ["key"]),
    ],
)
def test_types(pair: str, value: object) -> None:
    assert getattr(build_config(pairs=[pair]), pair.split("=")[0]) == value


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("lerning_rate=1", r"lerning_rate is not a setting; did you mean lr\?"),
        ("contextlength=4", "did you mean context_length?"),
        ("xyzzy=4", "xyzzy is not a setting; did you mean"),
        ("seed", "'seed' is not key=value"),
        ("seed=one", "seed = 'one' must be a whole number"),
        ("seed=true", "seed = True must be a whole number"),
        ("seed=1.5", "seed = 1.5 must be a whole number"),
        ("lr=fast", "lr = 'fast' must be a number or null"),
        ("pack=1", "pack = 1 must be true or false"),
        ("data=[1]", r"data = \[1\] must be a list of texts"),
        ("seed=[", "is not valid YAML|not valid YAML"),
    ],
)
def test_wrong_settings_are_named(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_config(pairs=[pair])
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_wrong_files(tmp_path: Path) -> None:
    for text, message in (
        ("- 1\n", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
        ("sede: 1\n", "run.yaml: sede is not a setting; did you mean seed?"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            build_config(file=tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        build_config(file=tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert build_config(file=tmp_path / "empty.yaml") == FinetuneConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"seed": 2**32}, "seed = 4294967296 must be at most 4294967295"),
        ({"lr": float("nan")}, "lr = nan must be a finite number"),
        ({"lr": float("inf")}, "lr = inf must be a finite number"),
        ({"epochs": 1e308}, r"epochs = 1e\+308 must be at most"),
        ({"weight_decay": float("nan")}, "weight_decay = nan must be a finite number"),
        ({"epochs": float("inf")}, "epochs = inf must be a finite number"),
        ({"end_token": -5}, "end_token = -5 must be a token id"),
        ({"context_length": 10**18}, "context_length = 1000000000000000000 must be at most"),
        ({"model": ""}, "model is missing"),
        ({"data": []}, "^data is missing"),
        ({"output": ""}, "^output is missing"),
        ({"tune": "all"}, "tune = 'all' does not exist; choose one of full, lora, state"),
        ({"tape": "tapes"}, "choose one of host, device, disk"),
        ({"bptt": "exact"}, "choose one of auto, full"),
        ({"context_length": 1}, "context_length = 1 must be at least 2"),
        ({"lr": 0.0}, "lr = 0.0 must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"pack": True, "carry_state": True}, "exclude each other"),
        ({"prompt_field": "q"}, "go together"),
        ({"eval_every": 5}, "eval_every needs held-out text: eval_data=FILE"),
        ({"lora_targets": ["key"]}, "lora_targets belongs to tune='lora'"),
        ({"end_token": "eos"}, "must be auto, none or a token id"),
    ],
)
def test_check(changes: dict[str, Any], message: str) -> None:
    FinetuneConfig(**GOOD).check()
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**(GOOD | changes)).check()


def test_the_learning_rate_follows_what_is_tuned() -> None:
    rates = [FinetuneConfig(tune=tune).learning_rate for tune in ("full", "lora", "state")]
    assert rates == sorted(rates) and len(set(rates)) == 3
    assert FinetuneConfig(tune="state", lr=2.0).learning_rate == 2.0


def settings_table() -> str:
    """Name, default and meaning of every setting, as the class says."""
    attributes = (inspect.getdoc(FinetuneConfig) or "").partition("Attributes:\n")[2]
    entries = re.split(r"\n(?=    \w)", textwrap.indent(textwrap.dedent(attributes), "    "))
    rows = ["| setting | default | |", "|---|---|---|"]
    for entry, item in zip(entries, dataclasses.fields(FinetuneConfig), strict=True):
        name, _, text = " ".join(entry.split()).partition(": ")
        assert name == item.name
        value = getattr(FinetuneConfig(), name)
        shown = (
            f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`" if value else "needed"
        )
        if name == "data":
            shown = "needed"
        text = re.sub(r" \(:mod:[^)]*\)", "", text).replace("``", "`").replace("None", "`null`")
        rows.append(f"| `{name}` | {shown} | {text} |")
    return "\n".join(rows) + "\n"


def test_docs_list_every_setting(request: pytest.FixtureRequest) -> None:
    """``pytest tests/test_finetune_config.py -k docs --write-docs`` writes the table."""
    page = Path(__file__).parents[1] / "docs" / "finetuning.md"
    text = page.read_text(encoding="utf-8")
    start = text.index("| setting | default | |")
    end = text.index("\n\n", start) + 1 if "\n\n" in text[start:] else len(text)
    if request.config.getoption("--write-docs"):
        page.write_text(text[:start] + settings_table() + text[end:], encoding="utf-8")
    assert page.read_text(encoding="utf-8")[start:].startswith(settings_table())


AMBIGUOUS = {
    "context_length: 0400": "0400",  # 256 in YAML 1.1
    "seed: 010": "010",
    "seed: -010": "-010",
    "seed: 0b11": "0b11",
    "max_steps: 1:30": "1:30",  # 90
    "lr: 1:30.5": "1:30.5",
    "batch_size: 1_000": "1_000",
    "lr: 1_0.5": "1_0.5",
    "output: 007": "007",
    "data: [a, 1_0]": "1_0",
    "seed: 1\nlr: 1\nseed: 2": "seed stands there twice (line 3)",
    "save_every: 1\nsave-every: 2": "save-every stands there twice (line 2)",
}


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_what_readers_of_yaml_disagree_about(tmp_path: Path, text: str) -> None:
    """Refused by name and line, in files and in pairs."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        build_config(file=tmp_path / "run.yaml")
    assert "run.yaml: " + AMBIGUOUS[text].split(" ")[0] in str(error.value) and "(line" in str(error.value)
    assert AMBIGUOUS[text] in str(error.value) and "\n" not in str(error.value)
    if "\n" not in text:
        with pytest.raises(ConfigError, match="is read otherwise by other readers"):
            build_config(pairs=[text.replace(": ", "=")])


@pytest.mark.parametrize("text", ["'1_0'", "1_0e1", "'1:30'", "' 1'", "infinity", "0x10"])
def test_texts_that_are_no_numbers(text: str) -> None:
    """Though Python reads some of them as such."""
    if text == "0x10":
        assert build_config(pairs=["lr=0x10"]).lr == 16
        return
    with pytest.raises(ConfigError, match=r"lr = .* must be a number|is read otherwise"):
        build_config(pairs=[f"lr={text}"])


def test_lengths_with_units(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("context_length: 16k\nchunk_length: 2K\neval_tokens: 1m\n")
    config = build_config(file=tmp_path / "run.yaml", pairs=["chunk_length=1k"])
    assert (config.context_length, config.chunk_length, config.eval_tokens) == (16384, 1024, 1 << 20)
    for pair in ("context_length=16q", "context_length=1.5k", "chunk_length=-1k", "seed=16k"):
        with pytest.raises(ConfigError, match=r"such as 4096, 16k or 1m|must be a whole number"):
            build_config(pairs=[pair])


@pytest.mark.parametrize(
    ("pairs", "options"),
    [
        (["save_every=1", "save_every=2"], {}),
        (["save_every=1", "save-every=1"], {}),
        (["save-every=2"], {"save_every": 3}),
        (["data=a", "data=b"], {}),
        (["data=a"], {"data": ["b"]}),
        (["model=a"], {"model": "b"}),
    ],
)
def test_a_setting_given_twice(tmp_path: Path, pairs: list[str], options: dict[str, Any]) -> None:
    """The last would win in silence; a file is there to be changed."""
    name = pairs[0].partition("=")[0].replace("-", "_")
    with pytest.raises(ConfigError, match=f"^{name} is given twice, by .*; give it once"):
        build_config(pairs=pairs, options=options)
    (tmp_path / "run.yaml").write_text("save_every: 1\ndata: a\nmodel: a\n")
    assert build_config(file=tmp_path / "run.yaml", pairs=pairs[:1], options={}).model


@pytest.mark.parametrize("version", ["4", "7"])
def test_a_plan_refuses_what_cannot_be_divided_back(
    version: str, bundled: dict[str, Path], tmp_path: Path
) -> None:
    """Before any data is read, and so in a dry run, too; the caller's random numbers stay as they were."""
    data = tmp_path / "data.txt"
    data.write_text("some text\n" * 20)
    config = settings(bundled[version], data, tmp_path / "out", bptt="reversible-lossy")
    before = torch.get_rng_state()
    with pytest.raises(StrategyError, match="cannot be divided back"):
        plan(config)
    assert torch.equal(torch.get_rng_state(), before) and not list(tmp_path.glob("out*"))
