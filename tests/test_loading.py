"""A model folder without a tokenizer: one line that says so, and never the ids of another one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rwkv_rev
from rwkv_rev.errors import CheckpointError, DataError, SourceError
from rwkv_rev.loading import load_config, load_model, load_tokenizer
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer

Cli = Callable[..., tuple[int, str, str]]
MISSING = "no tokenizer in bare; save it there: tokenizer.save_pretrained('bare')"


@pytest.fixture
def bare(bundled: dict[str, Path], tmp_path: Path) -> Path:
    """A folder as ``save_pretrained`` of a model alone leaves it, and a text beside it."""
    import torch

    load_model(bundled["5.2"], "cpu", torch.float32).save_pretrained(tmp_path / "bare")
    (tmp_path / "data.txt").write_text("a text of some length " * 30, encoding="utf-8")
    return tmp_path / "bare"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "bare", "--prompt", "Hi"),
        ("eval", "bare", "--data", "data.txt"),
        ("finetune", "bare", "--data", "data.txt", "--output", "out", "--dry-run"),
        ("finetune", "bare", "--data", "data.txt", "--output", "out"),
    ],
    ids=lambda arguments: " ".join(arguments[::3]),
)
def test_commands_say_so(
    cli: Cli, bare: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli(*arguments, "--device", "cpu") == (1, "", f"error: {MISSING}\n")


def test_an_export_says_so(cli: Cli, bare: Path, tmp_path: Path) -> None:
    code, _, errors = cli("export", "bare", "--to", "hf", "--output", "hf")
    assert (code, errors) == (0, f"note: {MISSING}, and export again: the folder has none either\n")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert cli("export", "bare", "--output", "m.pth")[::2] == (0, ""), "a .pth holds none"


def test_inspect_tells_of_the_folders_own(cli: Cli, bare: Path, bundled: dict[str, Path]) -> None:
    assert rwkv_rev.inspect(bundled["5.2"]).tokenizer == "byte"
    assert rwkv_rev.inspect(bare).tokenizer == "none in this folder"
    tokenizer = RwkvByteTokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(bare)
    assert rwkv_rev.inspect(bare).tokenizer == "byte"


def test_transformers_takes_no_other_one(bare: Path) -> None:
    with pytest.raises(OSError, match=r"no tokenizer in .*bare; save it there"):
        AutoTokenizer.from_pretrained(str(bare))
    (bare / "tokenizer.json").write_text("{}")  # which neither class reads
    with pytest.raises(OSError, match="no tokenizer in"):
        AutoTokenizer.from_pretrained(str(bare))
    (bare / "tokenizer.json").unlink()
    RwkvWorldTokenizer().save_vocabulary(str(bare))
    assert isinstance(RwkvWorldTokenizer.from_pretrained(str(bare)), RwkvWorldTokenizer)
    with pytest.raises(SourceError, match="no tokenizer in"):
        load_tokenizer(bare)


def test_a_tokenizer_of_another_model_is_refused_before_the_first_token(
    cli: Cli, bare: Path, tmp_path: Path
) -> None:
    RwkvWorldTokenizer().save_pretrained(bare)
    code, out, errors = cli("generate", "bare", "--prompt", "Hi there")
    assert (code, out) == (1, "") and errors.count("\n") == 1
    assert "token id" in errors and "outside the model's vocabulary of 256" in errors
    with pytest.raises(DataError, match="the model's own tokenizer"):
        rwkv_rev.generate(bare, "Hi there")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"memory_bits": 16, "memory_exponent": -40},
            "memory_exponent = -40 must be from -14 to 0 for int16",
        ),
        ({"memory_bits": 8}, "memory_bits = 8 must be one of 16, 32, 64"),
        (
            {"memory_bits": None, "memory_exponent": None},
            "attention says memory_bits, memory_exponent, and this",
        ),
    ],
)
def test_fields_of_an_architecture_that_a_file_has_not(
    cli: Cli, tmp_path: Path, change: dict[str, int | None], told: str
) -> None:
    """Or of values that do not fit each other; None: it is lost. A default would be another model."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1}
    rwkv_rev.init("linear-attention", tmp_path / "model", settings=sizes)
    path = tmp_path / "model" / "config.json"
    stored = json.loads(path.read_text("utf-8")) | change
    path.write_text(json.dumps({k: v for k, v in stored.items() if v is not None}), "utf-8")
    for function in (load_config, lambda folder: load_model(folder, "cpu", "auto")):
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/model.*{told}"):
            function(tmp_path / "model")
    for arguments in (("generate", "model", "--prompt", "Hi"), ("verify", "model"), ("inspect", "model")):
        code, _, errors = cli(*arguments)
        assert code == 1 and errors.startswith("error: model/config.json is damaged (") and told in errors
