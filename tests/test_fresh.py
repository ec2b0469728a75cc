"""Freshly initialised models of every architecture, through every command that takes a model folder."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import counting_text, finetune, losses, settings
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.architectures import registry
from rwkv_rev.architectures.registry import ARCHITECTURES
from rwkv_rev.architectures.registry import architecture as find
from rwkv_rev.errors import CheckpointError, ConfigError, OutputError
from rwkv_rev.fresh import init
from rwkv_rev.loading import load_model, load_tokenizer

TINY = {"hidden_size": 16, "num_hidden_layers": 2}
OTHERS = tuple(name for name in ARCHITECTURES if not name[0].isdigit())
"""Those that are no RWKV."""

Cli = Callable[..., tuple[int, str, str]]


def values(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_every_architecture(tmp_path: Path, architecture: str) -> None:
    made = init(architecture, tmp_path / "model", settings=TINY, seed=3)
    model, tokenizer = load_model(tmp_path / "model", "cpu", "auto"), load_tokenizer(tmp_path / "model")
    ids = tokenizer("some bytes", return_tensors="pt")["input_ids"]
    assert model.config.rwkv_version == architecture and model.config.vocab_size == 256
    assert made.parameters == sum(p.numel() for p in model.parameters())
    assert torch.isfinite(model(ids).logits).all()
    found = rwkv_rev.inspect(tmp_path / "model")
    assert (found.version, found.layers, found.parameters) == (architecture, 2, made.parameters)
    assert found.tokenizer == "byte"
    card = (tmp_path / "model/README.md").read_text("utf-8")
    assert f"A freshly initialised model of {model.config.architecture.called}" in card


def test_the_seed_decides(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        init("linear-attention", tmp_path / name, settings=TINY, seed=seed)
    assert torch.equal(torch.rand(3), expected)  # of the caller
    one, same, other = (values(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize("architecture", OTHERS)
def test_every_command(cli: Cli, tmp_path: Path, architecture: str) -> None:
    text = counting_text(tmp_path / "data.txt", lines=8)
    short = {"context_length": 10, "chunk_length": 4}
    code, out, _ = cli(
        *("init", "--architecture", architecture, "--output", "model", "--seed", 1, "--json"),
        *("--set", "hidden_size=16", "--set", "num_hidden_layers=2"),
    )
    assert code == 0 and json.loads(out)["architecture"] == architecture

    finetune(settings(tmp_path / "model", text, tmp_path / "trained", max_steps=4, lr=1e-2, **short))
    assert losses(tmp_path / "trained")[-1] < losses(tmp_path / "trained")[0] - 0.02
    tunings = ("lora", "state") if find(architecture).tunes_state else ("lora",)
    for tune in tunings:
        finetune(settings(tmp_path / "trained", text, tmp_path / tune, tune=tune, max_steps=1, **short))
    if "state" in tunings:
        before, after = values(tmp_path / "trained"), values(tmp_path / "state")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(float(tensor.abs().max()) > 0 for name, tensor in after.items() if name not in before)

    code, out, _ = cli("eval", tunings[-1], "--data", text, "--context-length", 10, "--json")
    assert code == 0 and 0 < json.loads(out)["total"]["bits_per_byte"] < 9
    code, out, _ = cli("generate", "trained", "--prompt", "7 squared", "--max-new-tokens", 2, "--seed", 1)
    assert code == 0 and out.startswith("7 squared")
    code, out, _ = cli("inspect", "trained", "--context-length", "64k", "--chunk-length", 256)
    assert code == 0 and "reversible" in out
    # the latter began with what was trained
    for folder in ("model", tunings[-1]):
        code, out, err = cli(
            *("verify", folder, "--reversal", "--gradients", "--context", 7, "--chunk", 3, "--tokens", 4)
        )
        assert code == 0, out + err
        assert "bit-exact at all 3 boundaries: yes" in out
        if not architecture.startswith("coupled-"):  # in RWKV's own memory decays divide
            assert "plain division" not in out
        assert float(re.search(r"memory remnants\s+([\d.]+) %", out)[1]) <= 100
        assert "rwkv: not run, the rwkv package knows no" in out
        assert "its own values; there is no other original" in out
    code, out, _ = cli("verify", "trained", "--json", "--tokens", 4, "--no-reversal", "--no-gradients")
    assert [row["oracle"] for row in json.loads(out)["oracles"]] == ["naive"]
    for target in ("blinkdl", "hf"):
        code, _, err = cli("export", "trained", "--output", "out", "--to", target)
        assert code == 1 and "no other tool reads models of" in err and not (tmp_path / "out").exists()
    code, _, err = cli("verify", "trained", "--oracle", "rwkv")
    assert code == 1 and "use --oracle naive" in err


@pytest.mark.parametrize("architecture", ["linear-attention", "coupled"])
def test_of_what_forgets_nothing_no_division_is_told(cli: Cli, tmp_path: Path, architecture: str) -> None:
    init(architecture, tmp_path / "model", settings=TINY)
    code, out, _ = cli("inspect", "model", "--numerics")
    assert code == 0 and "No step forgets anything" in out and "NUHMC" in out and "division" not in out
    code, out, _ = cli("inspect", "model", "--numerics", "--json")
    assert code == 0 and all(row["division_steps"] == {} for row in json.loads(out)["numerics"])


def test_a_damaged_scan_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That verification compares with something else than the model itself."""
    from rwkv_rev.architectures import linear_attention

    init("linear-attention", tmp_path / "model", settings=TINY)
    _perturb(tmp_path / "model")
    assert rwkv_rev.verify(tmp_path / "model", tokens=40).passed
    honest = linear_attention._scan_attention
    monkeypatch.setattr(linear_attention, "_scan_attention", lambda *given: 1.001 * honest(*given))
    report = rwkv_rev.verify(tmp_path / "model", tokens=40)
    assert not report.passed and report.divergence.startswith("block 0 attention")


@pytest.mark.parametrize(
    ("architecture", "field", "value", "reason"),
    [
        ("6", "hiden_size", 64, "no field 'hiden_size'; did you mean hidden_size"),
        ("6", "mixrank", 64, "did you mean mix_rank"),
        ("5.2", "mix_rank", 64, "no field 'mix_rank'"),
        ("7", "hidden_size", 100, "25 heads of 4 numbers: use a multiple of 64 .* head_size=4"),
        ("linear-attention", "hidden_size", 100, "25 heads of 4"),
    ],
)
def test_fields_that_cannot_be_meant(
    tmp_path: Path, architecture: str, field: str, value: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        init(architecture, tmp_path / "model", settings={field: value})
    assert not (tmp_path / "model").exists()


def test_small_heads_for_who_asks_for_them(tmp_path: Path) -> None:
    made = init("7", tmp_path / "model", settings={"hidden_size": 20, "head_size": 4, "num_hidden_layers": 1})
    assert (made.config.num_attention_heads, made.config.head_size) == (5, 4)


def _perturb(folder: Path) -> None:
    """Maps that are zero at first, as every block's last one, hide what is before them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in values(folder).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_generations_are_verified_against_others(tmp_path: Path) -> None:
    """Fresh RWKV is its own original, too, and the implementations of others run it."""
    pytest.importorskip("rwkv")
    init("5.2", tmp_path / "model", settings={**TINY, "head_size": 8})
    _perturb(tmp_path / "model")
    report = rwkv_rev.verify(tmp_path / "model", tokens=32)
    assert report.passed and {row.oracle for row in report.rows} >= {"rwkv", "naive"}


def test_sizes_follow(tmp_path: Path) -> None:
    config = init("5.2", tmp_path / "a", settings={"hidden_size": 64, "num_hidden_layers": 1}).config
    assert (config.num_attention_heads, config.head_size, config.intermediate_size) == (1, 64, 224)
    for given in ({"head_size": 16}, {"num_attention_heads": 4}):
        config = init("5.2", tmp_path / "b", settings={"hidden_size": 64, **given}, force=True).config
        assert (config.num_attention_heads, config.head_size, config.num_hidden_layers) == (4, 16, 4)


@pytest.mark.parametrize(
    ("architecture", "given", "message"),
    [
        ("5.3", {}, r"architecture = '5.3' must be one of 4, 5.0, 5.1, 5.2, "),
        ("4", {"memory_bits": 32}, "RWKV-4 has no field 'memory_bits'; there are vocab_size, "),
        ("linear-attention", {"memory_bits": 8}, "memory_bits = 8 must be one of 16, 32, 64"),
        ("linear-attention", {"hidden_size": 0}, "hidden_size = 0 must be from 1 to"),
        ("linear-attention", {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ("linear-attention", {"head_size": 5}, "^head_size = 5 must divide hidden_size = 128$"),
        (
            "linear-attention",
            {"hidden_size": 32, "head_size": 33},
            "^head_size = 33 must divide hidden_size = 32$",
        ),
        ("7", {"num_attention_heads": 200}, "^num_attention_heads = 200 must divide hidden_size = 128$"),
        ("linear-attention", {"head_size": 0}, "head_size = 0 must be from 1 to"),
        (
            *("4", {"hidden_size": 10**9}),
            "intermediate_size = 4000000000 must be from 1 to 2147483648, and follows from hidden_size = 1000000000$",
        ),
        (
            "coupled",
            {"cell_size": 10**9},
            "cells of cell_size = 1000000000 do not fit this machine's memory: use sm",
        ),
        (
            "reversible-gru",
            {"cell_size": 2**50},
            "GRUs? of cell_size = 1125899906842624 do not fit this machine's",
        ),
        ("reversible-gru", {"forget_limit": "2"}, "forget_limit = '2' must be a number$"),
        ("linear-attention", {"memory_bits": "32"}, "memory_bits = '32' must be a whole number$"),
        ("7", {"layer_norm_epsilon": "1e-5"}, "'layer_norm_epsilon' expected float, got str"),
        ("linear-attention", {"dtype": "float16"}, "has no field 'dtype'"),
        (
            "linear-attention",
            {"memory_exponent": -1000},
            r"from -62 to 0 for int64: on a grid of 2\^-1000 a 1 does not fit",
        ),
        (
            "linear-attention",
            {"memory_bits": 16, "memory_exponent": 1},
            r"memory_exponent = 1 must be from -14 to 0 for int16: on a grid of 2\^1 a 1 is rounded away",
        ),
        (
            "linear-attention",
            {"memory_bits": 32, "memory_numbers": "float", "memory_exponent": -24},
            "memory_exponent = -24 must be from -23 to 0 for float32",
        ),
        ("coupled", {"nothing": 1}, r"intermediate_size, layer_norm_epsilon, tie_word_embeddings, cell_size"),
        ("coupled", {"group_norm_epsilon": 1e-3}, "has no field 'group_norm_epsilon'"),
        ("coupled", {"bonus_is_exponential": True}, "has no field 'bonus_is_exponential'"),
        ("6", {"bonus_is_exponential": True}, "RWKV-6 has no field 'bonus_is_exponential'"),
        ("4", {"head_size": 8}, "RWKV-4 has no field 'head_size'"),
    ],
)
def test_refused(tmp_path: Path, architecture: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        init(architecture, tmp_path / "model", settings=given)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init("linear-attention", tmp_path / "model", settings=TINY)
    before = values(tmp_path / "model")
    with pytest.raises(OutputError, match="exists"):
        init("linear-attention", tmp_path / "model", settings=TINY, seed=1)
    monkeypatch.setattr("rwkv_rev.fresh.write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        init("linear-attention", tmp_path / "model", settings=TINY, seed=1, force=True)
    assert torch.equal(values(tmp_path / "model")["head.weight"], before["head.weight"])
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_a_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="the byte tokenizer has ids up to 255 but the model only 100 rows"
    ):
        init("4", tmp_path / "model", settings={**TINY, "vocab_size": 100})


def test_numbers_without_a_dot(cli: Cli) -> None:
    """YAML reads 1e-9 as a text."""
    given = ("--set", "forget_limit=1e-9", "--set", "layer_norm_epsilon=1e-6", "--set", "hidden_size=16")
    code, out, _ = cli("init", "--architecture", "reversible-gru", "--output", "model", "--json", *given)
    config = json.loads(out)["config"]
    assert code == 0 and (config["forget_limit"], config["layer_norm_epsilon"]) == (1e-9, 1e-6)
    for value in ("1_0e1", "small", "'1e'"):
        code, _, err = cli(
            "init", "--architecture", "reversible-gru", "--output", "b", "--set", f"forget_limit={value}"
        )
        assert code == 2 and "forget_limit" in err


@pytest.mark.parametrize("pair", ["hidden_size", "hidden_size=[1", "=3"])
def test_what_is_no_pair(cli: Cli, pair: str) -> None:
    code, _, err = cli("init", "--architecture", "4", "--output", "model", "--set", pair)
    assert code in (1, 2) and pair.split("=")[0] in err


def test_whole_numbers_and_small_widths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layer_norm_epsilon = 0\.0 must be above 0"):
        rwkv_rev.init("5.2", tmp_path / "a", settings={"layer_norm_epsilon": 0})
    with pytest.raises(ConfigError, match="hidden_size = 1 is too small"):
        rwkv_rev.init("5.1", tmp_path / "a", settings={"hidden_size": 1})
    assert list(tmp_path.iterdir()) == []


def test_names_of_architectures() -> None:
    registry.register(registry.architecture("4"))
    with pytest.raises(ValueError, match="needs a name"):
        registry.register(replace(registry.architecture("4"), version=""))
    with pytest.raises(ValueError, match="already"):
        registry.register(replace(registry.architecture("4"), state={}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_the_identity_at_first(tmp_path: Path, architecture: str) -> None:
    """By the architecture's own initialisation, of cells too that own no parameter but through linear maps."""
    init(architecture, tmp_path / "model", settings=TINY)
    model = load_model(tmp_path / "model", "cpu", "auto")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        found, embedded = model.model(ids).last_hidden_state, model.model.embed(ids, None)
        assert torch.equal(found, model.model.ln_out(embedded))
