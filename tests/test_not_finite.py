"""Weights that hold NaN, scores that are not finite: what the commands say, and the JSON that they print."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, settings
from safetensors.torch import load_file, save_file

import rwkv_rev
from rwkv_rev.cli import output
from rwkv_rev.errors import CheckpointError, ConfigError
from rwkv_rev.json_text import finite, json_text
from rwkv_rev.sampling import Sampling
from rwkv_rev.tokenization import RwkvByteTokenizer

Cli = Callable[..., tuple[int, str, str]]
REFUSED = "error: the model's logits are not finite, so no token can be chosen"


def strict(text: str) -> Any:
    """JSON as every reader takes it."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def broken(bundled: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder one of whose weights is NaN."""
    folder = tmp_path / "broken"
    shutil.copytree(bundled["5.2"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.blocks.0.channel_mix.key.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("drawn", [("--temperature", 0), ("--seed", 1), ("--seed", 1, "--top-k", 3)])
def test_generate_says_so(cli: Cli, broken: Path, drawn: tuple[Any, ...]) -> None:
    code, _, err = cli("generate", broken, "--prompt", "a", "--max-new-tokens", 3, "--no-stream", *drawn)
    assert code == 1 and err.startswith(REFUSED) and err.count("\n") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chat_says_so(broken: Path, temperature: float) -> None:
    talk = rwkv_rev.chat(broken, device="cpu")
    with pytest.raises(CheckpointError, match="logits are not finite"):
        talk.say("Hello", Sampling(temperature), max_new_tokens=3)


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(), Sampling(0.5, 0.9, 3, 1.0, 1.0)])
def test_which_logits_are_refused(sampling: Sampling) -> None:
    processors: Any = sampling.processors(RwkvByteTokenizer())
    said = torch.zeros(1, 0, dtype=torch.int64)
    for wrong in (math.nan, math.inf):
        logits = torch.zeros(1, 256)
        logits[0, 7] = wrong
        with pytest.raises(CheckpointError, match="logits are not finite"):
            processors(said, logits)
    allowed = torch.full((1, 256), -math.inf)
    allowed[0, 7] = 1.0  # what forbids tokens leaves the others
    assert sampling.choose(processors(said, allowed)) == 7


def test_every_token_is_forbidden() -> None:
    """The weights have nothing to do with it; of rows of both kinds NaN is told of."""
    processors: Any = Sampling().processors(RwkvByteTokenizer())
    said, logits = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 256)
    logits[1] = -math.inf
    with pytest.raises(ConfigError, match=r"every token is forbidden.*bad_words_ids, suppress_tokens"):
        processors(said, logits)
    logits[0, 3] = math.nan
    with pytest.raises(CheckpointError, match="logits are not finite"):
        processors(said, logits)


@pytest.mark.parametrize("changes", [{}, {"tune": "lora"}])
def test_finetune_tells_of_weights(broken: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """No learning rate mends them, whether they are trained or not."""
    data = counting_text(tmp_path / "data.txt", 100)
    config = settings(broken, data, tmp_path / "out", context_length=64, **changes)
    with pytest.raises(
        CheckpointError, match=r"step 1: weights of the model held NaN .*blocks\.0\.channel_mix"
    ):
        finetune(config)
    assert not (tmp_path / "out").exists()


def test_eval_warns_and_prints_json(cli: Cli, broken: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("some text to read")
    options = ("--data", tmp_path / "data.txt", "--cache-dir", tmp_path / "cache", "--device", "cpu")
    code, out, err = cli("eval", broken, *options, "--json")
    assert code == 0 and strict(out)["total"]["perplexity"] is None
    assert "warning: the score is not finite at positions 0-1k: weights of the model hold NaN" in err
    _, _, err = cli("eval", broken, *options)
    assert "not finite" in err


def test_no_json_has_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": [math.nan, {"b": -math.inf}], "c": (1.5, Path("d"))})
    assert strict(capsys.readouterr().out) == {"a": [None, {"b": None}], "c": [1.5, "d"]}
    assert finite({"a": (math.nan, 2)}) == {"a": [None, 2]}
    assert json_text([math.inf, 1e300, True]) == "[null, 1e+300, true]"


def test_export_warns_and_keeps_the_bits(cli: Cli, broken: Path, tmp_path: Path) -> None:
    code, out, err = cli("export", broken, "--output", tmp_path / "out.pth", "--json")
    (name,) = strict(out)["not_finite"]
    assert code == 0 and name == "blocks.0.ffn.key.weight"
    assert err.splitlines()[-1].startswith(f"warning: {name}: NaN or infinity, written as it is")
    stored = torch.load(tmp_path / "out.pth", weights_only=True)[name]
    assert int(stored.isnan().sum()) == 1
    code, _, err = cli("export", broken, "--to", "hf", "--output", tmp_path / "out")
    assert code == 1 and "NaN or infinite" in err and not (tmp_path / "out").exists()
