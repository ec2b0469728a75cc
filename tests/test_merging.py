"""Adapters merged and written: against the formulas written out in float64, RWKV-PEFT's names by hand, and peft itself.

What the merged folder holds is compared with the conversion of a checkpoint that was merged by hand, number by number.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finetune_cases import counting_text, finetune, settings
from foreign import blinkdl_state_dict
from safetensors.torch import load_file
from torch import Tensor

import rwkv_rev
from rwkv_rev.errors import CheckpointError, ConfigError, OutputError
from rwkv_rev.modeling import RwkvRevForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore::UserWarning:peft"
)
Cli = Callable[..., tuple[int, str, str]]
VERSIONS = ("4", "5.2", "6", "7")
VOCAB, RANK = 256, 3
MAPS = {
    "4": ("att.key", "att.value", "att.receptance", "att.output", "ffn.key", "ffn.receptance", "ffn.value"),
    "7": ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"),
}
MAPS["5.2"] = MAPS["6"] = (*MAPS["4"], "att.gate")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(version: str, prefix: str = "", rank: int = RANK) -> dict[str, Tensor]:
    """As RWKV-PEFT saves it; with ``init_`` as prefix what it saves before a PiSSA."""
    found, base = {}, blinkdl_state_dict(version)
    for layer in range(2):
        for place, name in enumerate(MAPS[version]):
            out, inner = base[f"blocks.{layer}.{name}.weight"].shape
            seed = 100 * layer + place + (1000 if prefix else 0)
            found[f"blocks.{layer}.{name}.{prefix}lora_A"] = normal(seed, rank, inner)
            found[f"blocks.{layer}.{name}.{prefix}lora_B"] = normal(seed + 50, out, rank)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for version in VERSIONS:
        torch.save(blinkdl_state_dict(version, vocab=VOCAB), root / "a.pth")
        rwkv_rev.convert(root / "a.pth", root / version)
    return {version: root / version for version in VERSIONS}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def compare(folder: Path, by_hand: dict[str, Tensor], tmp_path: Path) -> None:
    """A merged folder and the conversion of a checkpoint merged by hand: the same bits."""
    torch.save(by_hand, tmp_path / "by-hand.pth")
    rwkv_rev.convert(tmp_path / "by-hand.pth", tmp_path / "by-hand")
    found, expected = weights(folder), weights(tmp_path / "by-hand")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("version", VERSIONS)
def test_lora_of_rwkv_peft(models: dict[str, Path], tmp_path: Path, version: str) -> None:
    adapter, by_hand = lora(version), blinkdl_state_dict(version, vocab=VOCAB)
    torch.save(adapter, tmp_path / "lora.pth")
    for layer in range(2):
        for name in MAPS[version]:
            place = f"blocks.{layer}.{name}"
            down, up = adapter[f"{place}.lora_A"].double(), adapter[f"{place}.lora_B"].double()
            by_hand[f"{place}.weight"] = (
                by_hand[f"{place}.weight"].double() + 16 / RANK * (up @ down)
            ).float()
    made = rwkv_rev.merge(models[version], tmp_path / "lora.pth", tmp_path / "out", alpha=16)
    compare(tmp_path / "out", by_hand, tmp_path)
    assert (made.kind, made.ranks, made.alphas) == ("LoRA", (RANK,), (16.0,))
    assert made.weights == 2 * len(MAPS[version])
    assert rwkv_rev.verify(tmp_path / "out", tokens=16, oracle="naive").passed


def test_pissa(models: dict[str, Path], tmp_path: Path) -> None:
    """The base changes too; newer versions of RWKV-PEFT write a prefix before what it began with."""
    adapter, began = lora("7"), lora("7", "init_")
    by_hand = blinkdl_state_dict("7", vocab=VOCAB)
    torch.save(adapter, tmp_path / "rwkv-0.pth")
    torch.save({f"model.{name}": tensor for name, tensor in began.items()}, tmp_path / "init_pissa.pth")
    for name in [f"blocks.{layer}.{each}" for layer in range(2) for each in MAPS["7"]]:
        difference = (
            adapter[f"{name}.lora_B"].double() @ adapter[f"{name}.lora_A"].double()
            - began[f"{name}.init_lora_B"].double() @ began[f"{name}.init_lora_A"].double()
        )
        by_hand[f"{name}.weight"] = by_hand[f"{name}.weight"].double() + difference
    made = rwkv_rev.merge(
        models["7"], tmp_path / "rwkv-0.pth", tmp_path / "out", init=tmp_path / "init_pissa.pth"
    )
    assert made.kind == "PiSSA"
    torch.save(by_hand, tmp_path / "by-hand.pth")
    rwkv_rev.convert(tmp_path / "by-hand.pth", tmp_path / "by-hand", dtype="float32")
    for name, tensor in weights(tmp_path / "by-hand").items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], tensor, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("rank", [8, 5, 3])
def test_disha(models: dict[str, Path], tmp_path: Path, rank: int) -> None:
    """``bone``: y = W x + D^T (the sum of x in pieces of r, the last one padded), written out for every unit input."""
    by_hand = blinkdl_state_dict("6", vocab=VOCAB)
    adapter = {}
    for place, name in enumerate(("blocks.0.att.key", "blocks.1.ffn.value")):
        weight = by_hand[f"{name}.weight"].double()
        out, inner = weight.shape
        adapter[f"{name}.disha"] = normal(place, rank, out)
        for unit in range(inner):
            x = torch.zeros(-(-inner // rank) * rank, dtype=torch.float64)
            x[unit] = 1
            weight[:, unit] += x.reshape(-1, rank).sum(0) @ adapter[f"{name}.disha"].double()
        by_hand[f"{name}.weight"] = weight.float()
    torch.save(adapter, tmp_path / "disha.pth")
    made = rwkv_rev.merge(models["6"], tmp_path / "disha.pth", tmp_path / "out")
    assert (made.kind, made.ranks, made.weights) == ("DiSHA", (rank,), 2)
    compare(tmp_path / "out", by_hand, tmp_path)


def test_disha_that_multiplies(models: dict[str, Path], tmp_path: Path) -> None:
    """``bat``: W_ab + W_ab D_b + D_b of each piece, by hand."""
    by_hand, rank, name = blinkdl_state_dict("7", vocab=VOCAB), 4, "blocks.1.ffn.key"
    weight = by_hand[f"{name}.weight"].double()
    out, inner = weight.shape
    values = normal(1, inner // rank, rank, rank)
    expected = weight.clone()
    for a in range(out // rank):
        for b in range(inner // rank):
            rows, columns = slice(a * rank, (a + 1) * rank), slice(b * rank, (b + 1) * rank)
            expected[rows, columns] += weight[rows, columns] @ values[b].double() + values[b].double()
    torch.save({f"{name}.disha": values}, tmp_path / "bat.pth")
    rwkv_rev.merge(models["7"], tmp_path / "bat.pth", tmp_path / "out")
    found = weights(tmp_path / "out")["model.blocks.1.channel_mix.key.weight"]
    torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=1e-7)


def test_what_was_trained_whole_and_what_stays(tmp_path: Path) -> None:
    """Norms and decays in RWKV-PEFT's file replace the model's; all others keep type and bits."""
    base = blinkdl_state_dict("5.2", vocab=VOCAB, dtype=torch.bfloat16)
    torch.save(base, tmp_path / "a.pth")
    rwkv_rev.convert(tmp_path / "a.pth", tmp_path / "model")
    adapter = {name: tensor for name, tensor in lora("5.2").items() if ".0.att.key" in name}
    whole = {"blocks.1.ln2.bias": normal(3, 32), "blocks.0.att.time_decay": normal(4, 4, 8)}
    torch.save(adapter | whole, tmp_path / "lora.pth")
    made = rwkv_rev.merge(tmp_path / "model", tmp_path / "lora.pth", tmp_path / "out", alpha=1)
    assert (made.weights, made.replaced) == (1, 2)
    rwkv_rev.export(tmp_path / "out", tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    for name, tensor in base.items():
        if name in whole:
            assert torch.equal(found[name].flatten(), whole[name].flatten())
        elif name == "blocks.0.att.key.weight":
            assert found[name].dtype == torch.float32
        else:
            assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor), name
    rwkv_rev.merge(
        tmp_path / "model", tmp_path / "lora.pth", tmp_path / "half", alpha=1, save_dtype="bfloat16"
    )
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.bfloat16}


def adapted(folder: Path, output: Path, **config: Any) -> RwkvRevForCausalLM:
    """A LoRA of peft, saved; gives the model that peft merges it into."""
    model = RwkvRevForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    for place, (name, parameter) in enumerate(wrapped.named_parameters()):
        if "lora_B" in name:
            parameter.data = normal(place, *parameter.shape)
    wrapped.save_pretrained(str(output), save_embedding_layers=False)
    merged: Any = wrapped.merge_and_unload()
    return merged


@pytest.mark.parametrize(
    ("version", "config"),
    [
        ("5.2", {"r": 4, "lora_alpha": 6, "target_modules": ["key", "gate", "head"]}),
        ("6", {"r": 4, "lora_alpha": 6, "target_modules": ["decay_down", "key_mix_up"], "use_rslora": True}),
        ("7", {"r": 4, "target_modules": ["key", "value"], "alpha_pattern": {"time_mix.key": 3, "value": 1}}),
        ("7", {"r": 4, "target_modules": ["key", "value"], "rank_pattern": {"blocks.1.channel_mix.key": 2}}),
    ],
    ids=["head", "rslora", "alphas", "ranks"],
)
def test_lora_of_peft(models: dict[str, Path], tmp_path: Path, version: str, config: dict[str, Any]) -> None:
    """As peft itself merges it, which does so in float32."""
    expected = adapted(models[version], tmp_path / "adapter", **config).state_dict()
    rwkv_rev.merge(models[version], tmp_path / "adapter", tmp_path / "out")
    before, found = weights(models[version]), weights(tmp_path / "out")
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert changed and found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_translate_into_each_other(
    cli: Cli, models: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Every bit, and peft loads what is written for it."""
    original = {name: tensor.to(dtype) for name, tensor in lora("5.2").items()}
    torch.save(original, tmp_path / "a.pth")
    code, out, err = cli("adapter", models["5.2"], "a.pth", "--alpha", 6, "--to", "peft", "--output", "b")
    assert (code, err) == (0, "") and "b: 16 linear maps of rank 3, lora_alpha 6, layout peft" in out
    assert cli("adapter", models["5.2"], "b", "--output", "c.pth", "--quiet")[:2] == (0, "c.pth\n")
    back = torch.load(tmp_path / "c.pth", weights_only=True)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name
    for source in ("b", "c.pth"):  # which say their alpha, and their generation
        attention = {name: tensor for name, tensor in original.items() if ".att." in name}
        torch.save(attention, tmp_path / "attention.pth")
        rwkv_rev.save_adapter(
            models["5.2"],
            tmp_path / "attention.pth",
            tmp_path / f"attention-{source}",
            alpha=6,
            to="peft" if source == "b" else "rwkv-peft",
        )
        with pytest.raises(CheckpointError, match=r"is an adapter of RWKV-5.2, and .* is of RWKV-6"):
            rwkv_rev.merge(models["6"], tmp_path / f"attention-{source}", tmp_path / "m", force=True)
        rwkv_rev.merge(models["5.2"], tmp_path / source, tmp_path / "m", force=True)
        model: Any = RwkvRevForCausalLM.from_pretrained(str(models["5.2"]), dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(model, str(tmp_path / "b")).merge_and_unload().state_dict()
        for name, tensor in weights(tmp_path / "m").items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5)


def test_what_finetune_leaves(cli: Cli, shallow: dict[str, Path], tmp_path: Path) -> None:
    """Its adapter, merged into its base, is its model; and goes to RWKV-PEFT and back."""
    data = counting_text(tmp_path / "data.txt", 50)
    run = settings(
        shallow["7"], data, tmp_path / "tuned", tune="lora", lr=0.01, context_length=64, max_steps=2
    )
    run.lora_targets = ["receptance", "key", "value", "output"]
    finetune(run)
    assert cli("merge", shallow["7"], "tuned/adapter", "--output", "merged")[0] == 0
    code, _, err = cli("merge", shallow["6"], "tuned/adapter", "--output", "other")
    assert code == 1 and "tuned/adapter is an adapter of RWKV-7, and" in err
    expected = weights(tmp_path / "tuned")
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-5, atol=1e-6)
    assert cli("adapter", shallow["7"], "tuned/adapter", "--output", "lora.pth")[0] == 0
    assert "blocks.1.ffn.value.lora_B" in torch.load(tmp_path / "lora.pth", weights_only=True)
    code, out, _ = cli("merge", shallow["7"], "lora.pth", "--output", "again")
    assert code == 0 and "LoRA of key, output, receptance, value" in out
    for name, tensor in weights(tmp_path / "merged").items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name])


def changed(kind: str) -> dict[str, Tensor]:
    state = lora("6")
    name = "blocks.1.att.key"
    if kind == "no A":
        del state[f"{name}.lora_A"]
    elif kind == "no B":
        del state[f"{name}.lora_B"]
    elif kind == "rank":
        state[f"{name}.lora_B"] = state[f"{name}.lora_B"][:, :2]
    elif kind == "flat":
        state[f"{name}.lora_A"] = state[f"{name}.lora_A"].flatten()
    elif kind == "layer":
        state |= {key.replace("blocks.1", "blocks.2"): tensor for key, tensor in state.items()}
    elif kind == "target":
        state |= {f"blocks.0.att.time_decay.{part}": normal(1, 3, 3) for part in ("lora_A", "lora_B")}
    elif kind == "embedding":
        state |= {"emb.lora_A": normal(1, 3, 32), "emb.lora_B": normal(1, VOCAB, 3)}
    elif kind == "width":
        state |= {f"{name}.lora_A": normal(1, 3, 48), f"{name}.lora_B": normal(1, 48, 3)}
    elif kind == "nan":
        state[f"{name}.lora_A"][0, 0] = float("nan")
    elif kind == "both":
        state["blocks.0.att.value.disha"] = normal(1, 4, 32)
    elif kind == "unknown":
        state["blocks.0.att.key.scale"] = normal(1, 3)
    elif kind == "bone":
        state = {"blocks.0.att.key.bone": normal(1, 4, 32)}
    elif kind == "disha":
        state = {"blocks.0.att.key.disha": normal(1, 4, 48)}
    elif kind == "whole tensor":
        state["blocks.0.ln1.bias"] = normal(1, 48)
    elif kind == "state":
        state |= {f"blocks.{i}.att.time_state": normal(1, 4, 8, 8) for i in range(2)}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no A", "lacks blocks.1.att.key.lora_A, the other half"),
        ("no B", "lacks blocks.1.att.key.lora_B, the other half"),
        ("rank", "the rank of blocks.1.att.key.lora_A is 3, that of lora_B 2"),
        ("flat", "blocks.1.att.key.lora_A has the shape (96,), which is no matrix"),
        (
            "layer",
            "changes blocks.2.att.key, which is no linear map of {model}; is it another model's?",
        ),
        ("target", "changes blocks.0.att.time_decay, which is no linear map of"),
        ("embedding", "changes emb, which is no linear map of"),
        ("width", "blocks.1.att.key has (3, 48) and (48, 3), which fits no map of (32, 32); is it another"),
        ("nan", "blocks.1.att.key.lora_A has 1 value that is NaN or infinite"),
        ("both", "holds both LoRA and DiSHA"),
        ("unknown", "holds blocks.0.att.key.scale, which is neither LoRA nor DiSHA nor of the model"),
        ("bone", "holds no adapter that is understood (it has blocks.0.att.key.bone)"),
        ("disha", "blocks.0.att.key has (4, 48), which fits no map of (32, 32)"),
        ("whole tensor", "blocks.0.ln1.bias has the shape (48,), in {model} (32,)"),
        ("state", "holds blocks.0.att.time_state, which is neither LoRA nor DiSHA nor of the model"),
    ],
)
def test_bad_files(cli: Cli, models: dict[str, Path], tmp_path: Path, kind: str, message: str) -> None:
    torch.save(changed(kind), tmp_path / "bad.pth")
    alpha = () if kind == "disha" else ("--alpha", 3)
    for command, output in (("merge", "out"), ("adapter", "out.pth")):
        code, out, err = cli(command, models["6"], "bad.pth", *alpha, "--output", output)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message.format(model=models["6"]) in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOKR"}, "peft_type = 'LOKR' is not LORA; merge it with peft's merge_and_unload"),
        ({"use_dora": True}, "use_dora = True is not understood; merge it with peft's"),
        ({"bias": "all"}, "bias = 'all' is not understood"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not understood"),
        ({"new_method": 3}, "new_method = 3 is not understood"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern = {'(a+)+$': …} is no name"),
        ({"alpha_pattern": 3}, "adapter_config.json is damaged: alpha_pattern = 3"),
        ({"r": 2}, "model.blocks.0.time_mix.key is of rank 4, adapter_config.json says 2"),
        ({"lora_alpha": None}, "adapter_config.json is damaged: lora_alpha = None"),
    ],
    ids=lambda value: str(*value) if isinstance(value, dict) else "",
)
def test_what_peft_has_besides(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapted(models["7"], tmp_path / "adapter", r=4, target_modules=["time_mix.key"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        rwkv_rev.merge(models["7"], tmp_path / "adapter", tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_alphas_and_beginnings(models: dict[str, Path], tmp_path: Path) -> None:
    """What a file does not say is asked for; what it says is not contradicted."""
    base, out = models["7"], tmp_path / "out"
    torch.save(lora("7"), tmp_path / "lora.pth")
    torch.save(lora("7", "init_"), tmp_path / "init.pth")
    torch.save({"blocks.0.att.key.disha": normal(1, 4, 32)}, tmp_path / "disha.pth")
    rwkv_rev.save_adapter(base, tmp_path / "lora.pth", tmp_path / "told.pth", alpha=8)
    lacking = {name: tensor for name, tensor in lora("7", "init_").items() if ".1.ffn.key" not in name}
    torch.save(lacking, tmp_path / "lacking.pth")
    torch.save(lora("7", "init_", rank=2), tmp_path / "narrow.pth")
    merge: Callable[..., Any] = rwkv_rev.merge
    for file, given, kind, message in (
        ("lora", {}, CheckpointError, r"lora.pth does not say its alpha: give .* as alpha=X, or, for PiSSA"),
        ("told", {"alpha": 4}, CheckpointError, r"alpha.* contradicts .*told.pth, which says 8"),
        ("lora", {"alpha": 4, "init": "init"}, ConfigError, "alpha is without effect beside init"),
        ("disha", {"alpha": 4}, CheckpointError, "alpha is without effect: .*disha.pth is DiSHA"),
        ("lora", {"alpha": float("nan")}, CheckpointError, "alpha = nan is no number"),
        ("lora", {"alpha": 0}, CheckpointError, "alpha = 0.* is no number above 0"),
        ("lora", {"alpha": -1}, CheckpointError, "alpha = -1.* is no number above 0"),
        ("lora", {"init": "lora"}, CheckpointError, "it must be the init_pissa.pth of that run"),
        (
            "lora",
            {"init": "lacking"},
            CheckpointError,
            r"differ in blocks.1.ffn.key; it must be that run's own",
        ),
        ("lora", {"init": "narrow"}, CheckpointError, "has other shapes than in the adapter"),
        ("init", {"alpha": 1}, CheckpointError, "holds no adapter that is understood"),
    ):
        named = {key: tmp_path / f"{each}.pth" if key == "init" else each for key, each in given.items()}
        with pytest.raises(kind, match=message):
            merge(base, tmp_path / f"{file}.pth", out, **named)
    assert merge(base, tmp_path / "told.pth", out).alphas == (8.0,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["decay_down"]},
            "large maps of blocks alone.*decay_down.*lora_targets receptance,key,value,output,gate, or",
        ),
        ({"target_modules": ["head", "key"]}, "RWKV-PEFT adapts the large maps of blocks alone.*head"),
        (
            {"target_modules": ["key"], "rank_pattern": {"time_mix.key": 2}},
            "has the ranks 2, 4, and is written",
        ),
        (
            {"target_modules": ["key"], "alpha_pattern": {"time_mix.key": 2}},
            r"are scaled by 0\.5, 2, and it is",
        ),
    ],
    ids=["low rank", "head", "ranks", "alphas"],
)
def test_what_rwkv_peft_has_no_place_for(
    models: dict[str, Path], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    adapted(models["6"], tmp_path / "adapter", r=4, **config)
    with pytest.raises(OutputError, match=message):
        rwkv_rev.save_adapter(models["6"], tmp_path / "adapter", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
